from itertools import islice, product

import pytest

from dspark.evaluation.proof import proof
from dspark.sampling import verification


@pytest.fixture
def shortened(monkeypatch):
    """The first few cases of each kind."""
    kinds = ("exact", "coupled", "control", "noise", "tree", "level_tree")
    for name in (f"{kind}_cases" for kind in kinds):
        whole = getattr(proof, name)
        monkeypatch.setattr(proof, name, lambda seed, whole=whole: islice(whole(seed), 2))


def test_the_whole_proof_holds_and_says_so_in_json(dspark):
    result = dspark("prove", "--json")
    assert result.status == 0
    report = result.json
    assert report["ok"] is True
    cases = {case["name"]: case for case in report["cases"]}
    assert len(cases) == len(report["cases"])  # names are unique
    verifiers, heads = ("token", "block"), ("vanilla", "gated", "rnn")
    names = ("fixed", "threshold", "prefix", "lagged", "lookahead", "measured")
    for verifier, schedule, head in product(verifiers, names, heads):
        one = cases[f"{verifier} / {schedule} / {head} / one request"]
        two = cases[f"{verifier} / {schedule} / {head} / two requests"]
        assert one["expected"] == two["expected"] == "exact"
        assert one["tv_joint"] is None
        assert max(one["tv_request"], two["tv_request"], two["tv_joint"]) < 1e-12
    for schedule, head in product((*names[:-1], "global search"), heads):
        case = cases[f"coupled / {schedule} / {head} / two requests"]
        assert case["tv_request"] == case["tv_joint"] == 0
    controls = [case for case in cases.values() if case["expected"] == "biased"]
    assert len(controls) > 20
    for case in controls:
        limit = 1e-5 if "bf16" in case["name"] else 1e-3
        assert max(case["tv_request"], case["tv_joint"] or 0) > limit == case["limit"]
        assert case["correct"] is None or case["correct"] < 1e-12
    assert all(case["passed"] for case in cases.values())
    assert "controls fail as they must" in result.err


def test_a_broken_rule_is_status_1_and_named(dspark, monkeypatch, shortened):
    right = verification.accepted_lengths
    monkeypatch.setattr(
        verification, "accepted_lengths", lambda _rule, *rest: right("block", *rest)
    )
    result = dspark("prove", "--json")
    assert result.status == 1
    assert result.json["ok"] is False
    failing = [case["name"] for case in result.json["cases"] if not case["passed"]]
    assert failing[0] == "token / fixed / vanilla / one request"
    assert f"are not as they must be: {'; '.join(failing)}." in result.err


def test_a_control_that_does_not_fail_is_status_1_too(dspark, monkeypatch, shortened):
    """Where the block rule itself stops at its first failure, the control shows nothing new."""
    right = verification.accepted_lengths
    monkeypatch.setattr(
        verification, "accepted_lengths", lambda _rule, *rest: right("token", *rest)
    )
    result = dspark("prove", "--json")
    assert result.status == 1
    failing = [case["name"] for case in result.json["cases"] if not case["passed"]]
    assert "block: stops at the first failure" in failing


def test_tables_show_every_case(dspark, shortened):
    result = dspark("prove", "--seed", 3)
    assert result.status == 0
    for words in ("vanilla", "token", "block", "coupled", "fixed", "stops at the first failure"):
        assert words in result.out
    assert "!" not in result.out
    assert "controls fail as they must" in result.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--device", "cuda"), "the proof runs on the CPU; leave it out."),
        (("--dtype", "bfloat16"), "the proof computes in float64; leave it out."),
    ],
)
def test_options_that_would_do_nothing_are_refused(dspark, words, sentence):
    result = dspark("prove", *words)
    assert result.status == 2
    assert sentence in result.err
