"""The live page's runs, load and events, without a browser: what it shows is what happened."""

import contextlib
import http.client
import json
import re
import threading
import time
from pathlib import Path

import pytest

from dspark.engine.model import Model
from dspark.errors import UsageError
from dspark.scheduling.cost_table import CostPoint, CostTable
from dspark.serving.context import Settings
from dspark.serving.engine_thread import EngineLock
from dspark.serving.live import routes as live_module
from dspark.serving.live.engines import Choice
from dspark.serving.live.routes import EXAMPLES

PROMPT = EXAMPLES["chat"][0]
RUN = "/v1/dspark/live"


def cost_table(model):
    """What a machine might cost: a step of n rows takes 10 + n / 4 ms, drafting 2 ms."""
    points = tuple(
        CostPoint(r + n, r, 10 + (r + n) / 4, 2.0, 0.5)
        for r in (1, 2, 4)
        for n in sorted({0, r, 3 * r, 7 * r})
    )
    return CostTable(points, model.machine)


@pytest.fixture(scope="module")
def measured(model):
    return Model(
        model.target,
        model.drafter,
        name=model.name,
        calibration=model.calibration,
        costs=cost_table(model),
    )


@pytest.fixture(scope="module")
def shown(measured, kit):
    """A server whose page offers a measured drafter and prompt lookup, which nobody measured."""
    from dspark.engine.loading import load_draft

    drafters = {"dspark": measured, "ngram": load_draft(measured.target, "ngram")}
    with kit.serve(measured, drafters=drafters, schedule="lagged") as started:
        yield started


class Events:
    """A stream of server-sent events that is being read."""

    def __init__(self, server, method, path, body=None, **headers):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        data = None if body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, data, {"content-type": "application/json", **headers})
        self.reply = self.connection.getresponse()
        assert self.reply.status == 200, self.reply.read()
        assert self.reply.getheader("content-type").startswith("text/event-stream")

    def __iter__(self):
        return self

    def __next__(self):
        lines = []
        while True:
            line = self.reply.readline().decode("ascii")
            if not line:
                raise StopIteration
            if line != "\n":
                lines.append(line.rstrip("\n"))
                continue
            assert [text.partition(": ")[0] for text in lines] == ["event", "data"]
            return lines[0].partition(": ")[2], json.loads(lines[1].partition(": ")[2])

    def until(self, name):
        """The next event of a name."""
        for found, body in self:
            if found == name:
                return body
        raise AssertionError(f"the stream ended without {name}")

    def close(self):
        self.reply.close()
        self.connection.close()


def fields(**given):
    wish = {"prompt": PROMPT, "drafter": "dspark", "schedule": "fixed", "max_tokens": 24}
    return wish | given


@contextlib.contextmanager
def run(server, **given):
    events = Events(server, "POST", RUN, fields(**given))
    try:
        yield events
    finally:
        events.close()


def whole(server, **given):
    """All events of a run by name, and their names in order."""
    with run(server, **given) as events:
        found = list(events)
    return {n: [b for m, b in found if m == n] for n, _ in found}, [n for n, _ in found]


def text_of(found, side):
    return "".join(p[0] for body in found["text"] if body["side"] == side for p in body["pieces"])


def test_a_run_shows_what_was_decoded_and_both_sides_equal_the_api(shown, kit):
    answer = shown.post(
        "/v1/chat/completions", {"messages": kit.messages(PROMPT), "max_tokens": 24}
    ).json["choices"][0]["message"]["content"]
    found, names = whole(shown)
    assert names[0] == "start"
    assert names[-1] == "done"
    assert found["done"] == [
        {"identical": True, "speedup": found["done"][0]["speedup"], "load_changed": False}
    ]
    assert text_of(found, "speculative") == text_of(found, "plain") == answer
    ours, plain = found["end"]
    assert (ours["side"], plain["side"]) == ("speculative", "plain")
    assert ours["text"] == answer
    assert ours["tokens"] == plain["tokens"] == 24
    assert (plain["verified"], plain["drafted"]) == (0, 0)
    assert ours["rounds"] < plain["tokens"]
    speedup = ours["tokens_per_s"] / plain["tokens_per_s"]
    assert found["done"][0]["speedup"] == pytest.approx(speedup)
    assert ours["tokens_per_s"] == pytest.approx(24 / ours["seconds"], rel=1e-3)


def test_rounds_tell_every_token_of_the_text_and_add_up(shown):
    found, _ = whole(shown, compare=False)
    rounds, (end,) = found["round"], found["end"]
    assert [each["round"] for each in rounds] == list(range(len(rounds)))
    tokens = []
    for each in rounds:
        tokens += [draft["token_id"] for draft in each["drafts"] if draft["accepted"]]
        tokens += [each["next_token"]["token_id"]] if each["next_token"] else []
    assert tokens == [p[1] for body in found["text"] for p in body["pieces"]]
    drafts = [draft for each in rounds for draft in each["drafts"]]
    assert sum(draft["accepted"] for draft in drafts) == end["accepted"]
    assert sum(draft["sent"] for draft in drafts) == end["verified"]
    assert all(0 <= draft["confidence"] <= 1 for draft in drafts)
    assert any(draft["accepted"] for draft in drafts)
    flags = [p[2] for body in found["text"] for p in body["pieces"]]
    assert sum(flags) == end["accepted"]
    assert all(each["rows"] == each["requests"] + each["verified"] for each in rounds[1:])


@pytest.mark.parametrize(
    ("given", "identical"),
    [
        ({"temperature": 0.8, "seed": 7, "verifier": "coupled"}, True),
        ({"temperature": 0.8, "seed": 7}, None),
        ({"drafter": "ngram"}, True),
        ({"schedule": "threshold", "threshold": 0.6}, True),
        ({"schedule": "lagged"}, True),
    ],
)
def test_sides_are_held_against_each_other_where_they_must_agree(shown, given, identical):
    found, _ = whole(shown, **given)
    assert found["done"][0]["identical"] is identical


@pytest.mark.parametrize("given", [{"drafter": "none"}, {"schedule": "off"}])
def test_without_a_drafter_there_is_one_side(shown, given):
    found, names = whole(shown, **given)
    assert [end["side"] for end in found["end"]] == ["plain"]
    assert "round" not in names
    assert found["done"][0]["speedup"] is None


def engines_of(server):
    return server.server.app.state.context.engines


def engines():
    return [each for each in threading.enumerate() if each.name == "dspark-engine"]


def test_background_requests_are_real_and_end_when_nobody_watches(shown):
    with run(shown, load=3, max_tokens=200, ignore_eos=True, compare=False) as events:
        events.until("round")
        seen = [events.until("round")["requests"] for _ in range(3)]
        assert max(seen) == 4
        (page_engine,) = [s for c, s in engines_of(shown)._open.items() if c.drafter == "dspark"]
        assert page_engine.service.snapshot().running == 4
    until = time.monotonic() + 20
    while page_engine.service.snapshot().running or engines_of(shown).in_line:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert page_engine.service.engine.memory.pool.in_use == 0
    assert shown.service.snapshot().running == 0


def test_trees_of_the_server_are_the_page_s_too(measured, kit):
    with kit.serve(measured, drafters={"dspark": measured}, tree_nodes=11) as server:
        found, _ = whole(server, schedule="fixed")
    assert found["done"][0]["identical"]
    parents = [draft["parent"] for each in found["round"] for draft in each["drafts"]]
    assert len(parents) > len(set(parents))  # siblings
    assert max(len(each["drafts"]) for each in found["round"]) == 11


def test_the_load_changes_while_a_run_goes_on(shown):
    with run(shown, load=0, max_tokens=200, ignore_eos=True, compare=True) as events:
        run_id = events.until("start")["run_id"]
        assert events.until("round")["requests"] == 1
        path = f"{RUN}/{run_id}/load"
        assert shown.ask("PUT", path, {"load": 2}).json == {"load": 2}
        for name, body in events:
            assert name != "done", "the load never came"
            if name == "round" and body["requests"] == 3:
                break
        assert shown.ask("PUT", path, {"load": 99}).status == 422
        done = events.until("done")
        assert (done["load_changed"], done["speedup"]) == (True, None)
    assert shown.ask("PUT", path, {"load": 1}).status == 404


@pytest.mark.usefixtures("by_the_table")
def test_the_budget_shrinks_as_the_load_grows(measured, kit):
    """With rows that cost much, a full house verifies fewer drafts of each request."""
    steep = tuple(
        CostPoint(r + n, r, 5.0 + 2.0 * (r + n), 1.0, 0.5) for r in (1, 2, 4) for n in (0, r, 7 * r)
    )
    model = Model(
        measured.target,
        measured.drafter,
        calibration=measured.calibration,
        costs=CostTable(steep, measured.machine),
    )

    def checked(server, load):
        found, _ = whole(
            server, schedule="lagged", load=load, max_tokens=48, compare=False, ignore_eos=True
        )
        alike = [r for r in found["round"] if r["requests"] == load + 1]
        return sum(r["verified"] for r in alike) / sum(r["requests"] for r in alike)

    with kit.serve(model, drafters={"dspark": model}, schedule="lagged") as server:
        assert checked(server, 3) < checked(server, 0)


def test_runs_take_turns(shown):
    with run(shown, max_tokens=120, ignore_eos=True) as first:
        first.until("round")
        with run(shown, max_tokens=4, compare=False) as second:
            assert second.until("phase") == {"phase": "waiting", "ahead": 1}
            first.close()
            assert second.until("done")


def test_a_visitor_too_many_is_sent_away(shown, monkeypatch):
    monkeypatch.setattr("dspark.serving.live.engines.MOST_WAITING", 0)
    with run(shown, max_tokens=120, ignore_eos=True) as first:
        first.until("round")
        with run(shown) as second:
            error = second.until("error")["error"]
    assert error["type"] == "rate_limit_error"
    assert "visitors wait" in error["message"]


def test_only_the_engines_in_use_stay_open(shown):
    before = len(engines()) - len(engines_of(shown)._open)
    for drafter in ("dspark", "ngram", "dspark"):
        whole(shown, drafter=drafter, max_tokens=4)
        opened = engines_of(shown)._open
        assert [choice for choice in opened if not choice.plain] == [Choice(drafter)]
        plain = [choice for choice in opened if choice.plain]
        assert len(engines()) - before == 1 + len(plain)


def page(found, name, *labels):
    """A counter of the page, by drafter, schedule and verifier."""
    return found[(f"dspark_page_{name}_total", *labels)]


def test_the_page_s_rounds_are_counted_apart(measured, kit):
    with kit.serve(measured, schedule="lagged") as server:
        untouched = server.figures()
        assert untouched["dspark_page_engines",] == 0
        found, _ = whole(server, drafter="own", verifier="token")
        ours, plain = found["end"]
        first = server.figures()
        assert first["dspark_page_engines",] == 2
        rounds = page(first, "rounds", "own", "fixed", "token")
        verified = page(first, "verified_tokens", "own", "fixed", "token")
        assert rounds > ours["rounds"]  # the engine's warming up has some
        assert verified > ours["verified"]
        assert ours["accepted"] < page(first, "accepted_tokens", "own", "fixed", "token")
        assert page(first, "verified_tokens", "none", "off", "block") == 0
        assert page(first, "steps", "none", "off", "block") > plain["tokens"]
        assert page(first, "step_seconds", "own", "fixed", "token") > 0
        for name in ("vllm:spec_decode_num_drafts_total", "dspark_step_seconds_count"):
            assert first[name,] == untouched[name,] == 0
        whole(server, drafter="ngram", compare=False)  # whose engine takes the other's place
        then = server.figures()
        assert then["dspark_page_engines",] == 2
        assert {key: then[key] for key in first if "own" in key} == {
            key: first[key] for key in first if "own" in key
        }
        assert page(then, "steps", "ngram", "fixed", "block") > 0
        whole(server, drafter="own", verifier="token", compare=False)
        assert page(server.figures(), "rounds", "own", "fixed", "token") > rounds


def test_options_say_what_can_be_chosen_and_why_not(shown, measured):
    found = shown.ask("GET", RUN).json
    own, lookup, none = found["drafters"]
    assert (own["name"], lookup["name"], none["name"]) == ("dspark", "ngram", "none")
    assert set(own["schedules"].values()) == {None}
    assert own["calibrated"]
    refused = {name for name, reason in lookup["schedules"].items() if reason}
    assert refused == {"prefix", "lagged", "lookahead"}
    assert "dspark profile" in lookup["schedules"]["lagged"]
    assert lookup["cost"] is None
    assert found["max_load"] == 3
    for curve in own["cost"]["curves"]:
        table, requests = measured.costs, curve["requests"]
        expected = table.step_ms(requests, table.most_tokens(requests) - requests)
        assert curve["step_ms"] == pytest.approx(list(expected), abs=1e-3)
    assert [curve["requests"] for curve in own["cost"]["curves"]] == [1, 2, 3, 4]
    assert len(own["cost"]["points"]) == len(measured.costs.points)


@pytest.mark.parametrize(
    ("given", "status", "word"),
    [
        ({"drafter": "nobody"}, 422, "dspark, ngram, none"),
        ({"drafter": "ngram", "schedule": "lagged"}, 422, "dspark profile"),
        ({"schedule": "threshold"}, 422, "threshold"),
        ({"threshold": 0.5}, 422, "threshold"),
        ({"load": 4}, 422, "load"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": "word " * 400}, 400, "tokens"),
        ({"prompt": "x" * 20_001}, 422, "prompt"),
        ({"temperature": -1}, 422, "temperature"),
        ({"colour": "red"}, 400, "colour"),
        ({"verifier": "none"}, 422, "verifier"),
    ],
)
def test_bad_wishes_are_refused_in_the_api_s_shape(shown, given, status, word):
    reply = shown.post(RUN, fields(**given))
    assert reply.status == status
    assert word in reply.error["message"]


def test_an_unknown_verifier_is_refused_without_a_server():
    with pytest.raises(UsageError, match="verifier"):
        Choice("dspark", "best")


def test_more_tokens_than_fit_are_cut(shown):
    with run(shown, max_tokens=10_000) as events:
        start = events.until("start")
    assert start["max_tokens"] + start["prompt_tokens"] == 256


@pytest.mark.usefixtures("by_the_table")
def test_events_tell_the_rounds_of_a_request_and_of_a_run(shown):
    events = Events(shown, "GET", "/v1/dspark/events?request_id=mine")
    everything = Events(shown, "GET", "/v1/dspark/events")
    try:
        assert events.until("hello")["id"] == "bundled"
        assert events.until("state")["max_requests"] == 4
        everything.until("state")
        messages = [{"role": "user", "content": PROMPT}]
        body = {"messages": messages, "max_tokens": 8}
        shown.post("/v1/chat/completions", body, x_request_id="other")
        shown.post("/v1/chat/completions", body, x_request_id="mine")
        found = events.until("round")
        assert (found["request_id"], found["round"], found["answer"]) == ("mine", 0, 0)
        assert events.until("round")["drafts"]
        assert everything.until("round")["request_id"] == "other"
        with run(shown, max_tokens=4) as events_of_run:
            run_id = events_of_run.until("start")["run_id"]
            events_of_run.until("done")
        while everything.until("round")["request_id"] != run_id:
            pass
    finally:
        events.close()
        everything.close()


def test_a_page_that_only_looks_costs_the_engine_nothing(shown):
    events = Events(shown, "GET", "/v1/dspark/events?rounds=false")
    try:
        events.until("state")
        shown.chat(max_tokens=8)
        names = [next(events)[0] for _ in range(2)]
        assert set(names) == {"state"}
        assert not shown.service._thread.heard
        assert not engines_of(shown).listeners
    finally:
        events.close()


def test_a_server_that_stops_ends_streams_and_runs(measured, kit):
    with kit.serve(measured, drafters={"dspark": measured}, schedule="fixed") as server:
        feed = Events(server, "GET", "/v1/dspark/events")
        with run(server, load=2, max_tokens=200, ignore_eos=True) as events:
            events.until("round")
            server.server.should_exit = True
            assert events.until("error")["error"]["type"] == "service_unavailable_error"
            assert list(events) == []
        assert [name for name, _ in feed][-1] == "bye"
        feed.close()


def test_a_key_is_needed_for_all_but_the_page_itself(measured, kit):
    with kit.serve(measured, Settings("bundled", api_keys=("secret",))) as server:
        assert server.ask("GET", "/").status == 200
        assert server.ask("GET", RUN).status == 401
        assert server.post(RUN, fields()).status == 401
        assert server.ask("GET", "/v1/dspark/events").status == 401
        named = {"authorization": "Bearer secret"}
        assert server.ask("GET", RUN, headers=named).json["drafters"][0]["name"] == "own"


PAGE = sorted(live_module.PAGE.iterdir())


def test_the_page_is_served_under_a_strict_policy(live):
    reply = live.ask("GET", "/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["content-type"].startswith("text/html")
    text = reply.body.decode()
    assert re.search(r"<script(?![^>]*\bsrc=)", text) is None, "inline script"
    assert re.search(r"\son\w+=|<style|\sstyle=", text) is None, "inline handler or style"
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    for name in re.findall(r"""(?:src|href)="(/page/[^"]+)""", text):
        assert live.ask("GET", name).status == 200


@pytest.mark.parametrize("path", PAGE, ids=lambda path: path.name)
def test_every_file_of_the_page_is_served_and_leans_on_files_that_are(live, path):
    reply = live.ask("GET", f"/page/{path.name}")
    assert reply.body == path.read_bytes()
    if path.suffix == ".js":
        source = path.read_text(encoding="utf-8")
        for name in re.findall(r'from "\./([^"]+)"', source):
            assert (live_module.PAGE / name).is_file()
        for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert danger not in source
        # The page keeps one thing in the browser: that somebody has been here.
        kept = set(re.findall(r"localStorage\.?\w*(?:\(\w+)?", source))
        assert kept <= {"localStorage.getItem(VISITED", "localStorage.setItem(VISITED"}
        assert "sessionStorage" not in source
        assert "cookie" not in source


@pytest.mark.parametrize("name", ["../live.py", "..%2Flive.py", "nothing.js", "%00"])
def test_nothing_else_is_served(live, name):
    assert live.ask("GET", f"/page/{name}").status == 404


def test_the_page_goes_into_the_wheel():
    source = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"serving/live/page/*"' in source


def test_turns_come_in_the_order_of_asking_and_never_overlap():
    """Who has just had a turn and asks again at once comes behind those that wait already."""
    lock, held, order = EngineLock(), [0], []

    def work(name):
        for _ in range(50):
            with lock.hold():
                held[0] += 1
                assert held[0] == 1
                order.append(name)
                held[0] -= 1

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    with lock.hold():
        for asked, thread in enumerate(threads, start=2):
            thread.start()
            while lock._given < asked:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order[:3] == ["a", "b", "c"]
    assert [order.count(name) for name in "abc"] == [50, 50, 50]


def test_a_turn_that_fails_is_given_back():
    lock = EngineLock()
    with pytest.raises(ValueError, match="x"), lock.hold():
        raise ValueError("x")
    with lock.hold():
        pass
