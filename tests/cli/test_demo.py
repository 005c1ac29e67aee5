import io
import itertools

import pytest
from rich.console import Console

from dspark.cli import replay as replay_module
from dspark.cli.decoding import Decoded, run_report
from dspark.cli.replay import Side, replay
from dspark.engine.sequence import Piece
from dspark.request import Output, Stats
from dspark.sources import names
from tests.helpers.keys import COMPARE

DOMAINS = ["math", "code", "chat"]


@pytest.fixture
def bundled(pair, monkeypatch):
    monkeypatch.setattr(names, "BUNDLED", pair.attached)
    # The byte-level tokenizer of the test spells prompts out; the context is to hold them.
    from dspark.cli import demo

    monkeypatch.setattr(demo, "PROMPTS", {name: f"a {name} table" for name in DOMAINS})


def test_three_domains_plain_beside_dspark(dspark, bundled):
    result = dspark("demo", "--max-new-tokens", 6, "--json")
    report = result.json
    assert result.status == 0
    assert report.keys() >= COMPARE | {"domains"}
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


def test_one_domain_sampled(dspark, bundled):
    words = ["demo", "--only", "chat", "--max-new-tokens", 6, "--temperature", 1]
    result = dspark(*words, "--json")
    assert list(result.json["domains"]) == ["chat"]
    assert result.json["identical"] is None
    shown = dspark(*words)
    assert shown.status == 0
    assert "Sampled: the same law" in shown.out


def test_without_a_bundled_model_or_its_drafter(dspark, pair, monkeypatch, tmp_path):
    monkeypatch.setattr(names, "BUNDLED", tmp_path / "absent")
    missing = dspark("demo")
    assert missing.status == 1
    assert "The bundled model is missing" in missing.err
    monkeypatch.setattr(names, "BUNDLED", pair.target)
    bare = dspark("demo")
    assert bare.status == 1
    assert "has no drafter attached" in bare.err


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
