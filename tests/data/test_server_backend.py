"""Regeneration by servers that answer, fail, hang up and lie."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import dspark.data.answers.chat_server as server_module
from dspark.data.answers.chat_server import ChatServer, served_model, server_url
from dspark.data.answers.regenerate import journal_path, regenerate
from dspark.data.answers.replay import AnswerFilters
from dspark.data.answers.sampling import Sampling
from dspark.data.answers.server_backend import ServerResponder
from dspark.errors import DataError, UsageError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def completion(text, reason="stop", **message):
    said = {"role": "assistant", "content": text, **message}
    return {
        "choices": [{"message": said, "finish_reason": reason}],
        "usage": {"completion_tokens": 7},
    }


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(server_module, "_FIRST_WAIT_S", 0.001)


def responder(*servers, retries=3, timeout_s=20.0, concurrency=4, api_key=None, **options):
    urls = tuple(server_url(server.url) for server in servers)
    chat = ChatServer(urls, "fake", api_key, timeout_s=timeout_s, retries=retries)
    sampling = options.pop("sampling", Sampling({"temperature": 0.7}))
    return ServerResponder(chat, sampling, concurrency=concurrency, **options)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def last(body):
    return body["messages"][-1]["content"]


def echo(body, count):
    return f"re: {last(body)}"


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "p.jsonl", *({"id": i, "turns": [f"q{i}"]} for i in range(40)))


def test_every_turn_is_answered_after_the_regenerated_ones(fake_server, tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "old 1"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "old 2"},
                {"role": "user", "content": "c"},
            ]
        },
    )
    fake = fake_server(lambda body, count: f"new {count}")
    report = regenerate(responder(fake), source, tmp_path / "o.jsonl")
    assert (report.records, report.tokens) == (1, 6)
    (record,) = lines(tmp_path / "o.jsonl")
    assert [m["content"] for m in record["messages"]] == [
        "s", "a", "new 1", "b", "new 2", "c", "new 3"
    ]  # fmt: skip
    assert record["finish_reason"] == "stop"
    assert [m["content"] for m in fake.bodies[1]["messages"]] == ["s", "a", "new 1", "b"]


def test_what_is_asked_is_sent(fake_server, tmp_path):
    fake = fake_server(echo)
    sampling = Sampling({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0})
    asked = responder(
        fake,
        sampling=sampling,
        seed=5,
        max_new_tokens=9,
        template_options={"enable_thinking": False},
        api_key="secret",
    )
    source = write(
        tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    )
    regenerate(asked, source, tmp_path / "o.jsonl")
    (body,) = fake.bodies
    assert body == {
        "model": "fake",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 9,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "seed": 5,
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert fake.keys == ["Bearer secret"]
    (record,) = lines(tmp_path / "o.jsonl")
    assert record["chat_template_kwargs"] == {"enable_thinking": False}
    assert record["tools"] == TOOLS


def test_servers_share_the_work_and_one_record_stands_for_each_line(fake_server, prompts, tmp_path):
    both = [fake_server(echo), fake_server(echo)]
    out = tmp_path / "o.jsonl"
    report = regenerate(responder(*both), prompts, out)
    assert (report.input, report.records, report.failed, report.skipped) == (40, 40, 0, 0)
    assert [record["id"] for record in lines(out)] == list(range(40))
    assert [r["messages"][-1]["content"] for r in lines(out)] == [f"re: q{i}" for i in range(40)]
    assert sum(len(fake.bodies) for fake in both) == 40
    assert all(fake.bodies for fake in both)
    assert not journal_path(out).exists()


def test_faults_that_pass_are_tried_again(fake_server, prompts, tmp_path):
    faults = [
        500,
        503,
        429,
        None,
        b"not json",
        b"[1]",
        {"choices": []},
        completion(None),
        completion("half", None),
        completion("x", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
    ]

    def flaky(body, count):
        return faults[count % 20] if count % 20 < len(faults) else echo(body, count)

    fake = fake_server(flaky)
    report = regenerate(responder(fake, retries=12), prompts, tmp_path / "o.jsonl")
    assert (report.records, report.failed) == (40, 0)
    assert len(fake.bodies) > 60
    answers = [record["messages"][-1]["content"] for record in lines(tmp_path / "o.jsonl")]
    assert answers == [f"re: q{i}" for i in range(40)]


def test_a_server_that_died_hands_its_work_to_the_other(fake_server, prompts, tmp_path):
    dead, alive = fake_server(echo), fake_server(echo)
    dead.close()
    dead.server.server_close()
    report = regenerate(responder(dead, alive), prompts, tmp_path / "o.jsonl")
    assert (report.records, len(alive.bodies)) == (40, 40)


def test_faults_that_stay_are_listed_with_the_reason(fake_server, prompts, tmp_path):
    def respond(body, count):
        number = int(last(body)[1:])
        if number == 3:
            return 400
        if number == 5:
            return 500
        if number == 7:
            return completion("", "stop", reasoning_content="hm, hm")
        return completion("cut", "length") if number == 9 else echo(body, count)

    with prompts.open("a") as file:
        file.write('{"turns": []}\n{"prompt": "raw"}\n{"turns": ["cut o')
    out = tmp_path / "o.jsonl.gz"
    filters = AnswerFilters(finished=True)
    report = regenerate(responder(fake_server(respond), filters=filters, retries=1), prompts, out)
    assert (report.input, report.records, report.failed, report.skipped) == (43, 36, 6, 1)
    assert report.failures == tmp_path / "o_failed.jsonl"
    failures = {record["line"]: record for record in lines(report.failures)}
    assert failures.keys() == {4, 6, 8, 41, 42, 43}
    assert failures[4]["error"] == "status 400, sorry, 400"
    assert failures[4]["turns"] == ["q3"]  # so that the list can be given again as prompts
    assert "status 500" in failures[6]["error"]
    assert "within its thinking" in failures[8]["error"]
    assert "'turns'" in failures[41]["error"]
    assert "Raw prompts" in failures[42]["error"]
    assert "not valid JSON" in failures[43]["error"]
    again = regenerate(responder(fake_server(echo)), report.failures, tmp_path / "again.jsonl")
    assert (again.records, again.failed) == (3, 3)


def test_strict_ends_at_a_malformed_line(fake_server, prompts, tmp_path):
    with prompts.open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match="line 41 is not valid JSON"):
        regenerate(responder(fake_server(echo)), prompts, tmp_path / "o.jsonl", strict=True)


def test_a_reply_that_does_not_come_in_time_is_a_fault(fake_server, tmp_path):
    release = threading.Event()

    def slow(body, count):
        if last(body) == "q1":
            release.wait(5)
        return echo(body, count)

    source = write(tmp_path / "p.jsonl", {"turns": ["q0"]}, {"turns": ["q1"]})
    asked = responder(fake_server(slow), timeout_s=0.2, retries=1)
    report = regenerate(asked, source, tmp_path / "o.jsonl")
    release.set()
    assert (report.records, report.failed) == (1, 1)
    assert "no reply within 0.2 s" in lines(report.failures)[0]["error"]


def test_thinking_is_kept_apart(fake_server, tmp_path):
    replies = {
        "a": completion("2", reasoning_content="one and one"),
        "b": completion("<think>\none and one\n</think>\n\n2"),
        "c": completion("one and one\n</think>\n\n2"),
        "d": completion("2"),
    }
    source = write(tmp_path / "p.jsonl", *({"turns": [name]} for name in replies))
    fake = fake_server(lambda body, count: replies[last(body)])
    regenerate(responder(fake), source, tmp_path / "o.jsonl")
    answers = [record["messages"][-1] for record in lines(tmp_path / "o.jsonl")]
    thought = {"role": "assistant", "content": "2", "thinking": "one and one"}
    assert answers == [thought, thought, thought, {"role": "assistant", "content": "2"}]


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WITH_TOOLS = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "it is 2"},
    ],
}


def test_a_conversation_with_tools_goes_on_where_the_same_call_is_made(fake_server, tmp_path):
    def respond(body, count):
        if last(body) == "2":
            assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
            assert body["messages"][1]["reasoning_content"] == "I add"
            return "two"
        return completion(None, "tool_calls", tool_calls=[CALL], reasoning_content="I add")

    source = write(tmp_path / "p.jsonl", WITH_TOOLS)
    regenerate(responder(fake_server(respond)), source, tmp_path / "o.jsonl")
    (record,) = lines(tmp_path / "o.jsonl")
    assert [m["content"] for m in record["messages"]] == ["x", "", "2", "two"]
    other = {**CALL, "function": {"name": "add", "arguments": '{"a": 2}'}}
    fake = fake_server(lambda body, count: completion("", "tool_calls", tool_calls=[other]))
    regenerate(responder(fake), source, tmp_path / "o.jsonl")
    (record,) = lines(tmp_path / "o.jsonl")
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
    assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}


def test_a_dead_server_ends_the_run_and_nothing_is_lost(fake_server, prompts, tmp_path):
    fake = fake_server(lambda body, count: echo(body, count) if count <= 10 else None)
    out = tmp_path / "o.jsonl"
    with pytest.raises(DataError, match=r"No server has answered \d+ conversations in a row"):
        regenerate(responder(fake, retries=0), prompts, out)
    assert not out.exists()
    healthy = fake_server(echo)
    report = regenerate(responder(healthy), prompts, out)
    assert (report.records, report.failed, report.resumed) == (40, 0, 10)
    assert len(healthy.bodies) == 30
    assert [record["id"] for record in lines(out)] == list(range(40))


def test_a_full_disk_ends_the_run_with_one_sentence_and_loses_nothing(
    fake_server, prompts, tmp_path, small_disk
):
    out, fake = tmp_path / "o.jsonl", fake_server(echo)
    refused = r"journal cannot be written \(File too large\); what was"
    with pytest.raises(DataError, match=refused), small_disk(2000):
        regenerate(responder(fake), prompts, out)
    noted = len(lines(journal_path(out))) - 1  # every line of it is whole
    assert 5 < noted < 40
    other = fake_server(echo)
    report = regenerate(responder(other), prompts, out)
    assert (report.records, report.resumed) == (40, noted)
    assert len(other.bodies) == 40 - noted
    assert [record["id"] for record in lines(out)] == list(range(40))


def test_a_wrong_key_or_model_ends_the_run_at_once(fake_server, prompts, tmp_path):
    fake = fake_server(lambda body, count: 401)
    with pytest.raises(DataError, match="refuses the request: status 401, sorry, 401"):
        regenerate(responder(fake, concurrency=1), prompts, tmp_path / "o.jsonl")
    assert len(fake.bodies) <= 2


def test_a_run_with_other_settings_does_not_go_on(fake_server, prompts, tmp_path):
    out = tmp_path / "o.jsonl"
    with pytest.raises(DataError, match="in a row"):
        regenerate(responder(fake_server(lambda body, count: None), retries=0), prompts, out)
    hotter = responder(fake_server(echo), sampling=Sampling({"temperature": 1.0}))
    with pytest.raises(DataError, match=r"with temperature 0\.7, but this one has 1\.0"):
        regenerate(hotter, prompts, out)


def test_changed_prompts_are_told(fake_server, prompts, tmp_path):
    out = tmp_path / "o.jsonl"
    fake = fake_server(lambda body, count: echo(body, count) if count <= 10 else None)
    with pytest.raises(DataError, match="in a row"):
        regenerate(responder(fake, retries=0), prompts, out)
    prompts.write_text(prompts.read_text().replace("q", "r"))
    with pytest.raises(DataError, match=r"line \d+ has changed since the run began"):
        regenerate(responder(fake_server(echo)), prompts, out)


def test_no_answer_at_all_is_an_error(fake_server, prompts, tmp_path):
    out = tmp_path / "o.jsonl"
    with pytest.raises(
        DataError, match=r"No line of .* could be answered; the first fault: status 400"
    ):
        regenerate(responder(fake_server(lambda body, count: 400)), prompts, out)
    assert not out.exists()
    with pytest.raises(DataError, match="The filters rejected all 40 answers"):
        regenerate(
            responder(fake_server(echo), filters=AnswerFilters(without=("re:",))), prompts, out
        )
    assert not out.exists()
    assert not (tmp_path / "o_failed.jsonl").exists()


def test_names_of_servers_and_models(fake_server):
    one, two = fake_server(echo), fake_server(echo, models=("a", "b"))
    assert served_model(responder(one).server, "owner/name") == "fake"
    assert served_model(responder(two).server, "b") == "b"
    with pytest.raises(DataError, match="has no model 'c', but a, b"):
        served_model(responder(two).server, "c")
    one.close()
    with pytest.raises(DataError, match="does not answer: no connection"):
        served_model(responder(one).server, "fake")
    assert server_url("http://h:1/") == server_url("http://h:1/v1/") == "http://h:1/v1"
    with pytest.raises(UsageError, match="--server is 'localhost:30000'"):
        server_url("localhost:30000")


def test_a_killed_run_goes_on_without_losing_or_repeating_a_line(fake_server, tmp_path):
    prompts = write(tmp_path / "p.jsonl", *({"id": i, "turns": [f"q{i}"]} for i in range(120)))
    out = tmp_path / "o.jsonl"

    def slowly(body, count):
        time.sleep(0.01)
        return echo(body, count)

    fake = fake_server(slowly)
    words = ["data", "regenerate", "fake", "--concurrency", "3", "--offline", "--json"]
    words += ["--prompts", str(prompts), "--out", str(out), "--server"]
    command = [sys.executable, "-m", "dspark", *words]
    for goal in (20, 60):
        run = subprocess.Popen(
            [*command, fake.url], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while len(fake.bodies) < goal and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert not out.exists()
    noted = len(lines(journal_path(out))) - 1
    assert 0 < noted < 120
    other = fake_server(echo)
    done = subprocess.run([*command, other.url], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["records"], report["failed"], report["skipped"]) == (120, 0, 0)
    assert report["resumed"] == noted
    assert len(other.bodies) == 120 - noted
    assert [record["id"] for record in lines(out)] == list(range(120))
    answers = [record["messages"][-1]["content"] for record in lines(out)]
    assert answers == [f"re: q{i}" for i in range(120)]
