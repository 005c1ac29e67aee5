"""Clients that leave, and a server that stops: pages return, and every stream ends."""

import contextlib
import json
import signal
import socket
import threading
import time

import pytest

from dspark.serving.context import Settings

ENDLESS = {"prompt": "The command", "max_tokens": 230, "ignore_eos": True}


@contextlib.contextmanager
def asked(live, body):
    """A connection on which a completion has been asked for."""
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    with contextlib.closing(socket.create_connection(("127.0.0.1", live.port), 30)) as connection:
        connection.sendall(head.encode() + data)
        yield connection


def events(connection):
    """All events of a stream, up to its end."""
    got = b""
    while part := connection.recv(65536):
        got += part
        if b"0\r\n\r\n" in part[-8:]:
            break
    lines = [line for line in got.split(b"\n") if line.startswith(b"data: ")]
    return [line.removeprefix(b"data: ").strip() for line in lines]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled(live, stream):
    with asked(live, {**ENDLESS, "stream": stream}) as connection:
        live.wait_until(lambda now: now.running == 1)
        if stream:
            assert connection.recv(1024).startswith(b"HTTP/1.1 200")
    left = live.service.snapshot().steps
    live.wait_until(lambda now: now.running == 0)
    assert live.service.snapshot().pages_held == 0
    assert live.service.snapshot().steps <= left + 3


def test_a_client_that_leaves_the_queue_is_taken_out(model, kit):
    with kit.serve(model, max_requests=1) as live, asked(live, {**ENDLESS, "stream": True}):
        live.wait_until(lambda now: now.running == 1)
        with asked(live, {**ENDLESS, "stream": True}):
            live.wait_until(lambda now: now.queued == 1)
        live.wait_until(lambda now: now.queued == 0)
        assert live.service.snapshot().running == 1


def test_many_that_leave_and_one_that_stays(live, offline):
    (alone,) = offline("The command", raw=True, max_new_tokens=60, ignore_eos=True)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(asked(live, {**ENDLESS, "stream": True}))
        with asked(live, {**ENDLESS, "max_tokens": 60, "stream": True}) as stays:
            live.wait_until(lambda now: now.running == 4)
            stack.close()
            *chunks, done = events(stays)
    assert done == b"[DONE]"
    assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == alone.text


def stopping(model, kit, drain_s, body):
    """What a stream has to say on a server that is told to stop while it runs."""
    settings = Settings("bundled", drain_s=drain_s)
    body = {**body, "stream": True}
    with kit.serve(model, settings) as live, asked(live, body) as connection:
        live.wait_until(lambda now: now.running == 1)
        stop = threading.Thread(target=live.stop)
        stop.start()
        heard = events(connection)
        stop.join()
    return heard


def test_stopping_lets_a_stream_end(model, kit, offline):
    (alone,) = offline("The command", raw=True, max_new_tokens=40, ignore_eos=True)
    *chunks, done = stopping(model, kit, 60.0, {**ENDLESS, "max_tokens": 40})
    assert done == b"[DONE]"
    assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == alone.text
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"


def test_stopping_at_once_ends_a_stream_with_an_error(model, kit):
    *_, error, done = stopping(model, kit, 0.0, ENDLESS)
    assert done == b"[DONE]"
    assert json.loads(error)["error"]["code"] == "unavailable"


def test_a_second_signal_ends_streams_at_once(model, kit):
    settings, body = Settings("bundled", drain_s=600.0), {**ENDLESS, "stream": True}
    with kit.serve(model, settings) as live, asked(live, body) as connection:
        live.wait_until(lambda now: now.running == 1)
        live.server.handle_exit(signal.SIGTERM, None)
        live.server.handle_exit(signal.SIGTERM, None)
        *_, error, done = events(connection)
    assert json.loads(error)["error"]["code"] == "unavailable"
    assert done == b"[DONE]"


def test_while_it_stops_nothing_new_is_taken(model, kit):
    settings, body = Settings("bundled", drain_s=60.0), {**ENDLESS, "stream": True}
    with kit.serve(model, settings) as live, asked(live, body):
        live.wait_until(lambda now: now.running == 1)
        assert live.ask("GET", "/ready").status == 200
        live.server.should_exit = True
        until = time.monotonic() + 10
        while live.service.accepting:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert live.ask("GET", "/ready").status == 503
        assert live.ask("GET", "/health").status == 200
        reply = live.post("/v1/completions", ENDLESS)
        assert (reply.status, reply.error["code"]) == (503, "unavailable")
        assert "retry-after" in reply.headers


def test_an_engine_that_fails_is_said_to_have(model, kit, caplog):
    with kit.serve(model) as live:
        target = live.service.engine.target
        kept, target.forward = target.forward, None
        try:
            reply = live.post("/v1/completions", ENDLESS)
            assert reply.status == 503
            assert live.ask("GET", "/health").status == 503
            assert live.ask("GET", "/ready").status == 503
        finally:
            target.forward = kept
    assert any("engine failed" in record.getMessage() for record in caplog.records)


@pytest.mark.faulty
def test_a_drafter_that_fails_is_not_noticed(model, kit, offline):
    (alone,) = offline("The command", raw=True, max_new_tokens=20)
    with kit.serve(model) as live:
        drafter = live.service.engine.drafter
        kept, drafter.propose = drafter.propose, None
        try:
            reply = live.post("/v1/completions", {"prompt": "The command", "max_tokens": 20})
            assert reply.json["choices"][0]["text"] == alone.text
        finally:
            drafter.propose = kept
