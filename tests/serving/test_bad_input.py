"""Whatever comes is answered in the API's shape, and the server goes on."""

import contextlib
import json
import socket
import time

import pytest

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(autouse=True)
def _still_answers(live):
    yield
    live.wait_until(lambda now: now.running == now.queued == 0)
    reply = live.post(TEXT, {"prompt": "The", "max_tokens": 2})
    assert reply.status == 200
    assert live.ask("GET", "/health").status == 200


def chat(**fields):
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}


TOOLS = [{"type": "function", "function": {"name": "f"}}]
FORCE = {"type": "function", "function": {"name": "f"}}
DEEP = b'{"prompt":' + b"[" * 100_000
RAW = [
    (b"", 422),
    (b"{", 400),
    (b"nothing", 400),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b'{"prompt": 1' + b"0" * 5000 + b"}", 400),
    (DEEP, 400),
    (b"[]", 422),
    (b"null", 422),
    (b'"text"', 422),
    (b'{"prompt": NaN}', 422),
    (b'{"prompt": "x", "temperature": NaN}', 422),
    (b'{"prompt": "x", "temperature": Infinity}', 422),
]


@pytest.mark.parametrize(("body", "status"), RAW, ids=range(len(RAW)))
def test_bodies_that_are_no_request(live, body, status):
    reply = live.ask("POST", TEXT, body)
    assert reply.status == status
    assert reply.error["type"] == "invalid_request_error"


WRONG = [
    (TEXT, {}, 422, "prompt"),
    (TEXT, {"prompt": ""}, 400, None),
    (TEXT, {"prompt": []}, 422, None),
    (TEXT, {"prompt": ["a", [1]]}, 422, None),
    (TEXT, {"prompt": [[]]}, 422, None),
    (TEXT, {"prompt": [-1]}, 422, None),
    (TEXT, {"prompt": [10**30]}, 422, None),
    (TEXT, {"prompt": [4096]}, 400, None),
    (TEXT, {"prompt": [1] * 256}, 400, None),
    (TEXT, {"prompt": "word " * 2000}, 400, None),
    (TEXT, {"prompt": "\ud800"}, 400, None),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 422, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": "2"}, 422, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 2.5}, 422, "max_tokens"),
    (TEXT, {"prompt": "x", "temperature": -1}, 422, "temperature"),
    (TEXT, {"prompt": "x", "temperature": True}, 422, "temperature"),
    (TEXT, {"prompt": "x", "top_p": 0}, 422, "top_p"),
    (TEXT, {"prompt": "x", "n": 0}, 422, "n"),
    (TEXT, {"prompt": "x", "n": 129}, 422, "n"),
    (TEXT, {"prompt": "x", "n": 21}, 400, None),
    (TEXT, {"prompt": "x", "logprobs": 21}, 422, "logprobs"),
    (TEXT, {"prompt": "x", "stop": [""]}, 422, "stop"),
    (TEXT, {"prompt": "x", "stop": ["x"] * 65}, 422, "stop"),
    (TEXT, {"prompt": "x", "logit_bias": {"a": 1}}, 422, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"5000": 1}}, 400, None),
    (TEXT, {"prompt": "x", "seed": 1 << 63}, 422, "seed"),
    (TEXT, {"prompt": "x", "timeout_s": 0}, 422, "timeout_s"),
    (TEXT, {"prompt": "x", "echo": True, "logprobs": 1, "stream": True}, 400, "echo"),
    (TEXT, {"prompt": "x", "suffix": "y"}, 422, "suffix"),
    (TEXT, {"prompt": "x", "best_of": 2}, 400, "best_of"),
    (TEXT, {"prompt": "x", "stream_options": {}}, 400, "stream_options"),
    (TEXT, {"prompt": "x", "stream": True, "stream_options": {"a": 1}}, 400, "stream_options.a"),
    (TEXT, {"prompt": "x", "beam_width": 3}, 400, "beam_width"),
    (TEXT, {"prompt": "x", "\ud800": 3}, 422, None),
    (TEXT, {"prompt": "x", "model": "\ud800"}, 404, "model"),
    (TEXT, {"prompt": "x", "response_format": {"type": "xml"}}, 422, "response_format"),
    (CHAT, {"messages": []}, 422, "messages"),
    (CHAT, {"messages": "Hi"}, 422, "messages"),
    (CHAT, {"messages": [{"content": "Hi"}]}, 422, "messages.0.role"),
    (CHAT, {"messages": [{"role": "boss", "content": "Hi"}]}, 422, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": "Hi", "mood": "x"}]}, 400, "messages.0.mood"),
    (CHAT, {"messages": [{"role": "user", "content": "\udfff"}]}, 400, None),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(max_completion_tokens=3), 400, "max_tokens"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(tool_choice="perhaps", tools=TOOLS), 400, "tool_choice"),
    (CHAT, chat(tool_choice={"type": "custom"}, tools=TOOLS), 400, "tool_choice"),
    (CHAT, chat(tool_choice=1, tools=TOOLS), 422, "tool_choice"),
    (CHAT, chat(tool_choice=FORCE | {"function": {"name": "g"}}, tools=TOOLS), 400, "tool_choice"),
    (CHAT, chat(tool_choice=FORCE | {"mode": 1}, tools=TOOLS), 400, "tool_choice"),
    (CHAT, chat(parallel_tool_calls=False), 400, "parallel_tool_calls"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, None),
    (CHAT, chat(chat_template_kwargs={"enable_thinking": False}), 400, None),
    (CHAT, chat(model="gpt-6"), 404, "model"),
    (CHAT, chat(functions=[]), 400, "functions"),
    (CHAT, chat(response_format={"type": "regex", "pattern": "\ud800"}), 400, None),
    (CHAT, chat(response_format={"type": "grammar", "grammar": 'start: "\ud800"'}), 400, None),
    (CHAT, chat(bad_words=["\ud800"]), 400, None),
    (CHAT, {"messages": [{"role": "user", "content": "\udcff"}]}, 400, None),
    ("/v1/responses", {"input": "\udcff"}, 400, None),
    ("/tokenize", {"prompt": "\udcff"}, 400, None),
    ("/v1/dspark/live", {"prompt": "\udcff", "drafter": "own"}, 422, None),
    (CHAT, chat(beam_width=2), 400, "beam_width"),
    (CHAT, chat(skip_special_tokens=False), 422, "skip_special_tokens"),
    (CHAT, chat(modalities=["audio"]), 422, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG, ids=range(len(WRONG)))
def test_requests_that_cannot_be_served(live, path, body, status, param):
    reply = live.post(path, body)
    assert reply.status == status, reply.body
    error = reply.error
    if param is not None:
        assert error["param"] == param or error["param"].startswith(f"{param}.")
    # nothing is streamed before it is known to be served
    if "stream_options" not in body:
        assert live.post(path, {**body, "stream": True}).status == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
    ],
)
def test_routes_that_are_not_there(live, method, path, status):
    reply = live.ask(method, path)
    assert reply.status == status
    assert reply.json["error"]["message"]


def test_a_body_that_is_no_json_by_its_type(live):
    reply = live.ask("POST", TEXT, b'{"prompt": "x"}', {"content-type": "text/plain"})
    assert reply.status == 422
    assert reply.error


@contextlib.contextmanager
def connect(live):
    with contextlib.closing(socket.create_connection(("127.0.0.1", live.port), 20)) as connection:
        yield connection


def read_head(connection):
    got = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in got:
            part = connection.recv(65536)
            if not part:
                break
            got += part
    return got


def status_of(head):
    return int(head.split(b" ", 2)[1])


def test_a_body_of_100_megabytes_by_its_length(live):
    with connect(live) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 104857600\r\n\r\n"
        )
        assert status_of(read_head(connection)) == 413  # before a byte of it is sent


def test_a_body_of_100_megabytes_without_a_length(live):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    with connect(live) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            while sent < 100 << 20:
                connection.sendall(chunk)
                sent += 65536
        head = read_head(connection)
    # The server has hung up long before all was sent.
    assert sent < 50 << 20
    assert not head or status_of(head) == 413


@pytest.mark.parametrize("name", [b"a: ", b"x" * 40_000 + b": "])
def test_a_flood_of_headers(live, name):
    with connect(live) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        connection.sendall((name + b"y" * 100 + b"\r\n") * 2000 + b"\r\n")
        head = read_head(connection)
        if head:
            assert status_of(head) == 400
            assert json.loads(head.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\nx"])
def test_a_head_that_does_not_end(live, start):
    with connect(live) as connection:
        sent = 0
        with contextlib.suppress(ConnectionError):
            connection.sendall(start)
            while sent < 16 << 20:
                connection.sendall(b"y" * 4096)
                sent += 4096
        head = read_head(connection)
        assert sent < 16 << 20
        assert not head or status_of(head) == 400


def test_a_head_within_the_limit(live):
    with connect(live) as connection:
        for part in (b"GET /health HTTP/1.1\r\nhost: x\r\nx: ", b"y" * 30_000, b"\r\n\r\n"):
            connection.sendall(part)
            time.sleep(0.02)
        assert status_of(read_head(connection)) == 200


@pytest.mark.parametrize("noise", [b"\x00\xff" * 100, b"GET\r\n\r\n", b"\r\n\r\nx y z\r\n\r\n"])
def test_what_is_no_http(live, noise):
    with connect(live) as connection:
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)
        head = read_head(connection)
        assert not head or status_of(head) == 400


def test_a_client_that_leaves_in_the_middle_of_its_body(live):
    with connect(live) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n{"
        )
    time.sleep(0.05)
