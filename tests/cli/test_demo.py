import dataclasses
import io
import itertools

import pytest
from rich.console import Console

from dspark.cli import demo as replay_module
from dspark.cli.demo import Side, replay
from dspark.cli.measure.decoding import Decoded, run_report
from dspark.engine.requests.sequence import Piece
from dspark.errors import CheckpointError
from dspark.request import Output, Stats
from dspark.sources import names, smollm2
from tests.helpers.keys import COMPARE

DOMAINS = ["math", "code", "chat"]


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    """The byte-level tokenizer of the test spells prompts out; the context is to hold them."""
    from dspark.cli import demo

    prompts = {name: f"a {name} table" for name in DOMAINS}
    shows = {name: dataclasses.replace(show, prompts=prompts) for name, show in demo.SHOWS.items()}
    monkeypatch.setattr(demo, "SHOWS", shows)


@pytest.fixture
def bundled(pair, monkeypatch):
    monkeypatch.setattr(names, "BUNDLED", pair.attached)


@pytest.fixture
def real(pair, bundled, monkeypatch):
    """A tiny pair in the place of the real model and its drafter."""
    monkeypatch.setattr(smollm2, "locate", lambda **_: pair.target)
    monkeypatch.setattr(names, "SMOLLM2", pair.drafter)
    monkeypatch.setattr("dspark.drafters.checkpoints.checkpoint.SMOLLM2", pair.drafter)


def test_three_domains_plain_beside_dspark(dspark, bundled):
    result = dspark("demo", "--model", "bundled", "--max-new-tokens", 6, "--json")
    report = result.json
    assert result.status == 0
    assert report.keys() >= COMPARE | {"domains", "model"}
    assert report["model"] == "bundled"
    assert list(report["domains"]) == DOMAINS
    assert all(domain.keys() >= COMPARE for domain in report["domains"].values())
    assert report["identical"] is True
    for key in ("rounds", "drafted", "accepted", "generated_tokens"):
        assert report[key] == sum(domain[key] for domain in report["domains"].values())
    assert len(report["outputs"]) == 3
    assert len(result.out.splitlines()) == 1
    assert result.err.count("Identical, token by token.") == 3
    assert result.err.count("[plain]") == result.err.count("[DSpark]") == 3
    assert "speed-up" in result.err
    assert "all " in result.err
    assert "dispatch overhead" in " ".join(result.err.split())


@pytest.mark.parametrize("words", [(), ("--model", "smollm2")])
def test_the_real_model_is_shown_as_it_decodes(dspark, real, words):
    result = dspark("demo", *words, "--max-new-tokens", 6, "--threads", 1, "--json")
    assert (result.status, result.json["model"]) == (0, "smollm2")
    assert result.json["identical"] is True
    assert list(result.json["domains"]) == DOMAINS
    assert result.json["drafted"] > 0
    assert result.err.count("[plain]") == result.err.count("[DSpark]") == 3
    for output in result.json["outputs"]:
        line = output["text"].split("\n")[0].strip()
        assert result.err.count(line) >= 2  # plainly, and with DSpark
    assert "SmolLM2-135M-Instruct" in result.err
    assert "tiny" not in result.err


def test_without_the_real_model_the_bundled_one_takes_its_place(dspark, bundled, monkeypatch):
    def nowhere(**_):
        raise CheckpointError("smollm2 is not on this machine; fetch it.")

    monkeypatch.setattr(smollm2, "locate", nowhere)
    words = ("demo", "--only", "chat", "--max-new-tokens", 4, "--json")
    result = dspark(*words)
    assert (result.status, result.json["model"]) == (0, "bundled")
    said = "smollm2 is not on this machine; fetch it. The tiny bundled model takes its place.\n"
    assert result.err.startswith(said)
    refused = dspark(*words, "--model", "smollm2")
    assert refused.status == 1
    assert refused.err == "dspark: smollm2 is not on this machine; fetch it.\n"


def test_a_real_model_without_its_drafter_is_no_demo(dspark, real, monkeypatch, tmp_path):
    monkeypatch.setattr(names, "SMOLLM2", tmp_path)
    monkeypatch.setattr("dspark.drafters.checkpoints.checkpoint.SMOLLM2", tmp_path)
    result = dspark("demo", "--only", "chat", "--max-new-tokens", 4, "--json")
    assert result.json["model"] == "bundled"
    assert "smollm2 has no drafter attached; reinstall dspark. The tiny bundled" in result.err


def test_one_domain_sampled(dspark, real):
    words = ["demo", "--only", "chat", "--max-new-tokens", 6, "--temperature", 1, "--threads", 1]
    result = dspark(*words, "--json")
    assert list(result.json["domains"]) == ["chat"]
    assert result.json["identical"] is None
    shown = dspark(*words)
    assert shown.status == 0
    assert "Sampled: the same distribution" in shown.out


def test_without_a_bundled_model_or_its_drafter(dspark, pair, monkeypatch, tmp_path):
    monkeypatch.setattr(names, "BUNDLED", tmp_path / "absent")
    missing = dspark("demo", "--model", "bundled")
    assert missing.status == 1
    assert "The bundled model is missing" in missing.err
    monkeypatch.setattr(names, "BUNDLED", pair.target)
    bare = dspark("demo", "--model", "bundled")
    assert bare.status == 1
    assert "has no drafter attached" in bare.err


def test_watched_panels_fill_in_turn_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=30)
    with replay_module.Watched(("plain", "DSpark"), console) as watched:
        for side, word in enumerate(("slow", "fast")):
            step = watched.show(side)
            step(0, [Piece(word, 0, side == 1)], None)
    shown = console.file.getvalue()
    assert shown.index("slow") < shown.index("fast")
    assert "Green: drafted and accepted" in shown


def _run(seconds, *steps):
    """A run whose steps are (moment, [(text, drafted), ...])."""
    moments = [(at, [Piece(text, 0, drafted) for text, drafted in row]) for at, row in steps]
    ids = tuple(piece.token_id for _, row in moments for piece in row)
    output = Output("", "", ids, "length", Stats())
    zero = dict.fromkeys(("draft_ms", "schedule_ms", "verify_ms"), 0.0)
    return Decoded([output], seconds, moments, 2, zero)


def test_a_side_shows_what_had_been_decoded_by_then():
    run = _run(0.3, (0.1, [("a", False)]), (0.3, [("b", True), ("c", False)]))
    side = Side("DSpark", run)
    assert [side.text_at(at).plain for at in (0.0, 0.1, 0.29, 0.3)] == ["", "a", "a", "abc"]
    (span,) = side.text_at(0.3).spans
    assert (span.start, span.end, span.style) == (1, 2, replay_module.DRAFTED)
    assert side.panel_at(0.2).subtitle == "0.20 s"
    assert side.panel_at(5.0).subtitle == "0.30 s, 10 tokens/s"


def test_a_terminal_gets_both_panels_in_the_end(monkeypatch):
    # A clock that jumps: every look at it is a quarter of a second later.
    ticks = itertools.count(0, 0.25)
    monkeypatch.setattr(replay_module.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(replay_module.time, "sleep", lambda _seconds: None)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30)
    slow = _run(0.4, (0.2, [("slow ", False)]), (0.4, [("end", False)]))
    fast = _run(0.1, (0.1, [("quick", True)]))
    replay([Side("plain", slow), Side("DSpark", fast)], console)
    shown = console.file.getvalue()
    last = shown[shown.rindex("plain") :]
    assert "slow end" in last
    assert "quick" in last
    assert "replayed together at 0.1 x their speed" in shown
    assert shown.count("DSpark") > 10


def test_report_over_several_runs_adds_counts_and_weighs_times_by_rounds():
    def decoded(rounds, seconds, draft_ms):
        stats = Stats(rounds=rounds, tokens=2 * rounds, drafted=2 * rounds, verified=2 * rounds)
        output = Output("p", "t", (1,) * (2 * rounds + 1), "length", stats)
        times = {"draft_ms": draft_ms, "schedule_ms": 0.0, "verify_ms": 1.0}
        return Decoded([output], seconds, [], 2, times)

    report = run_report([decoded(1, 1.0, 4.0), decoded(3, 3.0, 8.0)])
    assert report["rounds"] == 4
    assert report["accepted_length"] == 2.0
    assert report["tokens_per_s"] == 10 / 4
    assert report["draft_ms"] == 7.0
    assert report["conditional_acceptance"] == [None, None]
