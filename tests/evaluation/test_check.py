"""A check finds planted faults by trying the alternatives, and leaves sound pairs alone."""

import math
from dataclasses import replace

import pytest
import torch

from dspark.data.conversations import Prompt
from dspark.data.templates import START
from dspark.drafters.base import Proposal
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.model import Model
from dspark.errors import CompatibilityError, DSparkError
from dspark.evaluation.check import live
from dspark.evaluation.check.check import (
    check,
    judge_acceptance,
    judge_sampling,
    judge_speed,
    judge_tail,
    variants,
)
from dspark.evaluation.check.findings import CheckReport, Finding, LiveRun, Trial, by_severity
from dspark.evaluation.check.live import ObservedDrafter, accepted, other_renderings, race, render
from dspark.request import Request, SamplingParams, Stats

SHORT = {"max_new_tokens": 12}


@pytest.fixture(autouse=True)
def _raced_once(monkeypatch, request):
    """Speeds of made-up drafters say nothing; acceptance is the same in every run."""
    if "race" not in request.node.name:
        monkeypatch.setattr("dspark.evaluation.check.live.REPEATS", 1)


def texts(report, severity):
    return [f.what for f in report.findings if f.severity == severity]


def test_a_drafter_that_fits(tiny, target, prompts):
    report = check(Model(target, tiny.KnowingDrafter(target)), prompts, **SHORT)
    assert report.ok
    assert texts(report, "error") == []
    assert [run.temperature for run in report.runs] == [0, 1]
    assert report.runs[0].accepted_length > 3
    assert report.runs[0].first_acceptance > 0.95
    assert report.expected_speedup == report.runs[0].speedup
    shifted = [t for t in report.trials if "layer id" in t.what]
    assert [t.accepted_length for t in shifted] == [1.0, 1.0]


@pytest.mark.parametrize(("taps", "shift"), [((1, 3), "lowered by 1"), ((-1, 1), "raised by 1")])
def test_layer_ids_off_by_one_are_named(tiny, target, prompts, taps, shift):
    report = check(Model(target, tiny.KnowingDrafter(target, taps=taps)), prompts, **SHORT)
    assert not report.ok
    (finding,) = [f for f in report.findings if f.severity == "error"]
    assert f"with every layer id {shift}" in finding.what
    assert "gains 1.00 tokens" in finding.what
    assert "target_layer_ids to [0, 2]" in finding.remedy
    best = max(report.trials, key=lambda trial: trial.accepted_length)
    assert f"{best.accepted_length:.2f}" in finding.what
    assert best.accepted_length > 3


@pytest.mark.parametrize(
    ("convention", "named", "set_to"),
    [
        (True, "slot 0 of every block thrown away", "false"),
        (False, "slot 0 of every block drafting", "true"),
    ],
)
def test_the_other_slot_convention_is_named(tiny, target, prompts, convention, named, set_to):
    drafter = tiny.make_drafter(target, kind=tiny.OtherwiseBlocks, sample_from_anchor=convention)
    drafter.knowing, drafter.other = tiny.KnowingDrafter(target), not convention
    report = check(Model(target, drafter), prompts, **SHORT)
    (finding,) = [f for f in report.findings if f.severity == "error"]
    assert "gains 1.00 tokens" in finding.what
    assert f"with {named}" in finding.what
    assert finding.remedy.startswith(f"Set sample_from_anchor to {set_to} ")


@pytest.mark.parametrize(
    ("reads", "wants", "drafts", "shift"),
    [
        ((1, 3), (0, 2), 4, "lowered by 1"),
        ((-1, 1), (0, 2), 4, "raised by 1"),
        ((3,), (4,), 1, "raised by 1"),  # MTP-1, which reads the last layer
    ],
)
def test_layer_ids_of_eagle3_and_mtp_off_by_one_are_named(
    tiny, target, prompts, reads, wants, drafts, shift
):
    drafter = tiny.make_eagle3(target, kind=tiny.KnowingChain, taps=reads, ttt_length=drafts)
    drafter.knowing = tiny.KnowingDrafter(target, wants=wants, block_size=drafts)
    report = check(Model(target, drafter), prompts, **SHORT)
    (finding,) = [f for f in report.findings if f.severity == "error"]
    assert f"with every layer id {shift}" in finding.what
    assert f"target_layer_ids to {list(wants)}" in finding.remedy
    assert f"counted from 1, as speculators does: {[i + 1 for i in wants]}" in finding.remedy
    best = max(report.trials, key=lambda trial: trial.accepted_length)
    assert best.accepted_length > 0.7 * (1 + drafts)


def test_variants_of_an_eagle3_drafter_change_its_features_alone(tiny, target):
    drafter = tiny.make_eagle3(target)
    lowered, raised = variants(drafter, tiny.layers)
    assert [v.drafter.taps for v in (lowered, raised)] == [(-1, 1), (1, 3)]
    requests = [Request((5, 9, 7), SamplingParams(12)), Request((8,), SamplingParams(12))]
    fresh = tiny.make_eagle3(target, taps=(1, 3))
    fresh.load_state_dict(drafter.state_dict())
    got = accepted(Model(target), raised.drafter, requests)
    assert got == accepted(Model(target), fresh, requests)
    (last,) = variants(tiny.make_eagle3(target, taps=(4,), ttt_length=1), tiny.layers)
    assert last.drafter.taps == (3,)


def test_a_drafter_that_nothing_helps(tiny, target, prompts):
    report = check(Model(target, tiny.KnowingDrafter(target, wants=(1, 4))), prompts, **SHORT)
    (what,) = texts(report, "error")
    assert "hardly more than plain decoding" in what
    assert "in vain: every layer id lowered by 1, every layer id raised by 1, raw" in what


def test_a_drafter_that_knows_raw_prompts_only(tiny, target, tokenizer, prompts):
    start = tokenizer.convert_tokens_to_ids(START)
    drafter = tiny.KnowingDrafter(target, pleased=lambda tokens: start not in tokens)
    report = check(Model(target, drafter), prompts, **SHORT)
    (finding,) = [f for f in report.findings if f.severity == "error"]
    assert "with raw prompts" in finding.what
    assert "seems trained with raw prompts" in finding.remedy


def test_a_drafter_of_the_other_thinking_mode(tiny, prompts):
    tokenizer = tiny.new_tokenizer()
    tokenizer.chat_template += (
        "{% if enable_thinking is defined and not enable_thinking %}#{% endif %}"
    )
    target = tiny.make_target(tokenizer)
    (mark,) = tokenizer("#")["input_ids"]
    model = Model(target, tiny.KnowingDrafter(target, pleased=lambda tokens: mark in tokens))
    assert list(other_renderings(model, prompts)) == ["raw prompts", "enable_thinking=False"]
    (what,) = texts(check(model, prompts, **SHORT), "error")
    assert "with enable_thinking=False" in what


def test_prompts_without_messages_are_raw_already(target):
    model, prompts = Model(target), [Prompt(None, "the cat")]
    assert render(model, prompts) == [model.encode("the cat")]
    assert other_renderings(model, prompts) == {}


def test_dialogues_go_through_the_template_whole(target):
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "the dog")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    (ids,) = render(Model(target), [Prompt(messages, "the dog")])
    assert ids == Model(target).encode(messages)


def test_a_drafter_that_computes_nan(tiny, target, prompts):
    class Broken(tiny.KnowingDrafter):
        def propose(self, context, batch, draw):
            draw(0, torch.full((len(batch.tables), target.vocab_size), math.nan))
            return Proposal()

    report = check(Model(target, Broken(target)), prompts, **SHORT)
    (what,) = texts(report, "error")
    assert "The drafter failed" in what
    assert report.expected_speedup is None


def test_an_alternative_that_computes_nan_is_none(tiny, target, prompts):
    drafter = tiny.KnowingDrafter(target, ill_at_ease=math.nan)
    report = check(Model(target, drafter), prompts, **SHORT)
    assert report.ok
    assert report.runs
    assert [trial.what for trial in report.trials] == ["raw prompts"]


def test_prompt_lookup_is_not_held_to_a_trained_drafter_s_standard(target, prompts):
    lookup = NgramDrafter()
    lookup.bind(target.parts())
    report = check(Model(target, lookup), prompts, **SHORT)
    assert report.ok
    assert report.trials == ()
    assert report.expected_speedup > 0


def test_without_a_drafter_or_a_tokenizer(tiny, target, tokenizer, prompts):
    (finding,) = check(Model(target), prompts).findings
    assert "has no drafter" in finding.what
    assert "dspark train" in finding.remedy
    dumb = tiny.make_target(vocab=50)
    report = check(Model(dumb, tiny.KnowingDrafter(dumb)), prompts)
    assert texts(report, "error") == ["tiny has no tokenizer, so no prompt can be tried."]


def test_too_few_rounds_are_not_judged(tiny, target, prompts):
    drafter = tiny.KnowingDrafter(target, taps=(1, 3))
    report = check(Model(target, drafter), prompts, max_new_tokens=3)
    assert report.ok
    assert any("too few to judge" in what for what in texts(report, "warning"))


def test_variants_stay_within_the_target(tiny, target):
    def shifts(taps):
        found = variants(tiny.KnowingDrafter(target, taps=taps), tiny.layers)
        return [v.drafter.taps for v in found]

    assert shifts((0, 2)) == [(-1, 1), (1, 3)]
    assert shifts((-1, 3)) == [(0, 4)]
    assert shifts((0, 4)) == [(-1, 3)]
    assert shifts((-1, 4)) == []
    assert shifts(()) == []
    several, single = tiny.make_drafter(target), tiny.make_drafter(target, block_size=1)
    assert len(list(variants(several, tiny.layers))) == 3
    assert len(list(variants(single, tiny.layers))) == 2


@pytest.mark.parametrize("convention", [True, False])
def test_the_other_slot_convention_is_the_same_drafter_read_otherwise(tiny, target, convention):
    drafter = tiny.make_drafter(target, sample_from_anchor=convention)
    fresh = tiny.make_drafter(target, sample_from_anchor=not convention)
    requests = [Request((5, 9, 7), SamplingParams(12)), Request((8,), SamplingParams(12))]
    before = accepted(Model(target), drafter, requests)
    other = list(variants(drafter, tiny.layers))[-1].drafter
    assert other.block_size == (3 if convention else 4)
    assert all(a is b for a, b in zip(other.parameters(), drafter.parameters(), strict=True))
    got = accepted(Model(target), other, requests)
    assert got == accepted(Model(target), fresh, requests) != before
    assert accepted(Model(target), drafter, requests) == before


def test_an_observed_drafter_changes_nothing_and_sees_the_first_law(tiny, target):
    requests = [Request((5, 9, 7), SamplingParams(12, seed=2)), Request((8,), SamplingParams(12))]
    drafter = tiny.make_drafter(target)
    observed = ObservedDrafter(drafter, drafter.taps)
    for temperature in (0.0, 1.0):
        asked = [
            Request(r.prompt_ids, replace(r.params, temperature=temperature)) for r in requests
        ]
        assert accepted(Model(target), observed, asked) == accepted(Model(target), drafter, asked)
    sure = ObservedDrafter(tiny.KnowingDrafter(target), (0, 2))
    assert sure.belief is None
    accepted(Model(target), sure, requests[:1])
    batch, peaks = list(requests[0].prompt_ids), []
    ids = Model(target).engine(requests[:1]).run(requests[:1])[0].token_ids
    for at in (1, 6):  # blocks of 4 and the token after them
        logits = sure.drafter.forward([[*batch, *ids[:at]]]).logits_NV
        peaks.append(float(logits.double().softmax(1).max()))
    assert sure.belief == pytest.approx(sum(peaks[:2]) / 2)


def test_race_counts_tokens_of_both_sides(tiny, target):
    drafter = tiny.KnowingDrafter(target)
    requests = [Request((5, 9, 7), SamplingParams(11))] * 2
    run = race(Model(target, drafter), requests, temperature=0, batch_size=2)
    assert (run.tokens, run.accepted_length) == (20, 5.0)
    assert run.first_acceptance == 1.0
    assert run.tokens_per_s > 0
    assert run.plain_tokens_per_s > 0


@pytest.mark.parametrize(
    ("left_s", "ours", "runs"),
    [(1000.0, 2.0, 2), (1000.0, 0.5, 2), (1000.0, 1.1, 4), (25.0, 1.1, 2), (3.0, 1.1, 1)],
)
def test_a_race_ends_where_it_is_decided_or_out_of_time(target, monkeypatch, left_s, ours, runs):
    """A run takes 2 seconds a request; the first one has one request, the others six."""
    clock, asked = [100.0], []

    def both(model, requests, batch_size):
        clock[0] += 2.0 * len(requests)
        asked.append(len(requests))
        return 1.0, ours, Stats()

    monkeypatch.setattr(live, "_both", both)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    requests = [Request((5, 9, 7), SamplingParams(11))] * 6
    run = race(Model(target), requests, temperature=0, batch_size=1, deadline_s=100.0 + left_s)
    assert run.speedup == ours
    assert len(asked) == runs
    assert asked == [1] + [6] * (runs - 1)


def test_a_check_tells_its_steps_and_keeps_to_its_limit(tiny, target, prompts):
    pair, steps = Model(target, tiny.KnowingDrafter(target)), []
    check(pair, prompts, **SHORT, progress=steps.append)
    assert steps[0].startswith("Decoding ")
    assert any(step.startswith("Trying every layer id") for step in steps)
    assert [step for step in steps if "speed" in step] == steps[-2:]
    cut = check(pair, prompts, **SHORT, limit_s=1e-9, progress=steps.append)
    assert cut.trials == ()
    assert len(cut.runs) == 2
    assert any("limit" in what for what in texts(cut, "note"))
    whole = check(pair, prompts, **SHORT, limit_s=1e9)
    assert len(whole.trials) > 0
    assert not any("limit" in what for what in texts(whole, "note"))


# Judgements on made-up numbers


def counts(rounds, survived):
    """Statistics of rounds that verified as many drafts as `survived` has entries."""
    kept = sum(survived)
    return Stats(
        rounds=rounds,
        tokens=rounds + kept,
        accepted=kept,
        survived=list(survived),
        offered=[rounds, *survived[:-1]],
    )


@pytest.mark.parametrize(
    ("trial", "named"),
    [(1.6, True), (1.45, True), (1.3, False)],
)
def test_an_alternative_must_gain_enough(trial, named):
    trials = [
        Trial("every layer id raised by 1", "Do so.", 40, trial),
        Trial("raw prompts", "-", 5, 5.0),
    ]
    (finding,) = judge_acceptance(counts(40, [4, 0]), None, trials)
    assert finding.severity == "error"
    assert (finding.remedy == "Do so.") == named


@pytest.mark.parametrize(("trial", "count"), [(2.82, 0), (2.92, 1)])
def test_the_gain_must_be_large_against_what_there_is(trial, count):
    trials = [Trial("every layer id raised by 1", "Do so.", 40, trial)]
    assert len(list(judge_acceptance(counts(40, [30, 20, 10]), 0.8, trials))) == count


def test_other_text_must_gain_more():
    trial = Trial("raw prompts", "Do so.", 40, 3.5, other_text=True)
    assert list(judge_acceptance(counts(40, [30, 20, 10]), 0.8, [trial])) == []
    (finding,) = judge_acceptance(
        counts(40, [30, 20, 10]), 0.8, [replace(trial, accepted_length=3.8)]
    )
    assert (finding.severity, finding.remedy) == ("warning", "Do so.")


def test_a_gain_over_an_acceptance_that_is_no_collapse_is_a_warning():
    trials = [Trial("every layer id raised by 1", "Do so.", 40, 3.5)]
    (finding,) = judge_acceptance(counts(40, [30, 20, 10]), 0.8, trials)
    assert (finding.severity, finding.remedy) == ("warning", "Do so.")
    assert list(judge_acceptance(counts(40, [30, 20, 10]), 0.8, [])) == []


def test_a_first_draft_far_below_its_own_law():
    (finding,) = judge_acceptance(counts(40, [14, 2, 0]), 0.9, [])
    assert finding.severity == "warning"
    assert "35% of the rounds" in finding.what
    assert "90%" in finding.what
    assert list(judge_acceptance(counts(40, [14, 2, 0]), 0.6, [])) == []


def run_of(length, *, temperature=0.0, speed=2.0, tokens=40):
    return LiveRun(temperature, tokens, length, 0.5, speed, 1.0)


def test_sampling_alone_may_fall_short():
    (finding,) = judge_sampling(run_of(3.0), run_of(1.1, temperature=1.0))
    assert finding.severity == "warning"
    assert "temperature 1 a round gains only 1.10" in finding.what
    assert list(judge_sampling(run_of(3.0), run_of(2.0))) == []
    assert list(judge_sampling(run_of(1.1), run_of(1.1))) == []
    assert list(judge_sampling(run_of(3.0), run_of(1.1, tokens=5))) == []


def test_a_tail_that_hardly_ever_stays():
    (finding,) = judge_tail(counts(100, [80, 50, 4, 2, 0]))
    assert "--block-size 2" in finding.remedy
    assert list(judge_tail(counts(100, [80, 50, 20, 2]))) == []
    assert list(judge_tail(counts(10, [8, 0, 0, 0]))) == []
    assert list(judge_tail(counts(100, [1, 0, 0, 0]))) == []


def test_a_drafter_that_does_not_pay():
    (finding,) = judge_speed([run_of(2.0, speed=0.8), run_of(2.0, temperature=1.0, speed=0.5)])
    assert finding.severity == "warning"
    assert "at temperature 0 and 1: its speed is 0.80 and 0.50 times" in finding.what
    assert list(judge_speed([run_of(2.0, speed=1.2)])) == []
    assert list(judge_speed([run_of(2.0, speed=0.8, tokens=5)])) == []


def test_refusals_become_findings():
    finding = Finding.refusal(CompatibilityError("Width is 8, not 16; use another drafter."))
    assert finding == Finding("Width is 8, not 16.", "error", "Use another drafter.")
    assert Finding.refusal(DSparkError("It broke.")).what == "It broke."


def test_errors_come_first_and_decide():
    kinds = ("note", "error", "warning", "error")
    findings = [Finding(str(i), kind, "-") for i, kind in enumerate(kinds)]
    report = CheckReport(by_severity(findings))
    assert [f.what for f in report.findings] == ["1", "3", "2", "0"]
    assert not report.ok
    assert CheckReport(by_severity([findings[0], findings[2]])).ok
