"""Confidences of drafters without a head, and that nobody pays for those that no one reads."""

from __future__ import annotations

import pytest
import torch

from dspark.drafters.heads import ConfidenceHead
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.speculation import speculator as speculator_module
from dspark.engine.speculation.draft import Drawing
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams

PROCESSORS = (
    SamplingParams(12),
    SamplingParams(12, temperature=0.3, seed=1),
    SamplingParams(12, temperature=2.0, top_p=0.6, seed=2),
    SamplingParams(12, temperature=1.0, repetition_penalty=1.5, logit_bias={3: 4.0}, seed=3),
)


def forbid(monkeypatch, owner, name):
    def fail(*_args, **_kwargs):
        raise AssertionError(f"{name} was computed")

    monkeypatch.setattr(owner, name, fail)


def test_margin_is_that_of_the_raw_logits_whatever_the_processors(tiny, target, monkeypatch):
    drafter = tiny.HeadlessDrafter(64)
    best_V2 = drafter.logits_VV.sort(dim=1, descending=True).values[:, :2]
    margin_V = best_V2[:, 0] - best_V2[:, 1]
    seen, choose = [], speculator_module.choose

    def watch(drawing, proposal, *rest):
        seen.append((torch.stack(drawing.tokens, dim=1), proposal.confidence_logits_RK))
        return choose(drawing, proposal, *rest)

    monkeypatch.setattr(speculator_module, "choose", watch)
    requests = [Request((5, 9), params) for params in PROCESSORS]
    tiny.decode(target, drafter, requests, threshold=0.6)
    assert len(seen) > 3
    for tokens_RK, confidence_RK in seen:
        assert confidence_RK.dtype == torch.float32
        assert torch.equal(confidence_RK[:, 1:], margin_V[tokens_RK[:, :-1]])


def test_first_margin_belongs_to_the_anchor(tiny, target, monkeypatch):
    drafter = tiny.HeadlessDrafter(64)
    best_V2 = drafter.logits_VV.topk(2, dim=1).values
    margin_V = best_V2[:, 0] - best_V2[:, 1]
    seen, propose = [], speculator_module.propose

    def watch(drafter, context, ready, *rest, **options):
        drawing, proposal = propose(drafter, context, ready, *rest, **options)
        seen.append(([r.tokens[-1] for r in ready], proposal.confidence_logits_RK[:, 0]))
        return drawing, proposal

    monkeypatch.setattr(speculator_module, "propose", watch)
    tiny.decode(target, drafter, [Request((5, 9), p) for p in PROCESSORS], threshold=0.6)
    assert len(seen) > 3
    for anchors, first_R in seen:
        assert torch.equal(first_R, margin_V[anchors])


def test_half_precision_logits_have_margins_in_full(tiny, target):
    drawing = Drawing(state=None, keeps_logits=True)  # type: ignore[arg-type]
    drawing.logits.append(torch.tensor([[256.0, 3.0, 257.0], [0.5, 0.0, -1.0]]).bfloat16())
    assert drawing.margins().tolist() == [[0.0], [0.5]]
    assert drawing.margins().dtype == torch.float32


@pytest.mark.parametrize("schedule", ["fixed", "off"])
@pytest.mark.parametrize("kind", ["headless", "dspark", "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_computed_that_the_schedule_does_not_read(
    tiny, target, monkeypatch, kind, schedule, temperature
):
    forbid(monkeypatch, Drawing, "margins")
    forbid(monkeypatch, NgramDrafter, "confidence_logit")
    forbid(monkeypatch, ConfidenceHead, "forward")
    kept = []
    monkeypatch.setattr(
        speculator_module,
        "choose",
        lambda drawing, *rest, choose=speculator_module.choose: (
            kept.append(drawing.logits) or choose(drawing, *rest)
        ),
    )
    drafter = drafter_of(tiny, target, kind)
    prompt = Request((1, 2, 1, 2, 1), SamplingParams(12, temperature=temperature))
    tiny.decode(target, drafter, [prompt], schedule=Schedule(schedule))
    assert bool(kept) == (schedule == "fixed")
    assert not any(kept)


def drafter_of(tiny, target, kind):
    if kind == "ngram":
        return tiny.ngram(target)
    if kind == "headless":
        return tiny.HeadlessDrafter(64)
    return tiny.make_drafter(target, confidence_head=kind != "dflash")


def test_a_drafter_s_own_confidence_is_taken(tiny, target, monkeypatch):
    forbid(monkeypatch, Drawing, "margins")
    [output] = tiny.decode(
        target, tiny.MarkovDrafter(64), [Request((5, 9), SamplingParams(12))], threshold=0.6
    )
    assert output.stats.verified < output.stats.drafted


@pytest.mark.parametrize("verifier", ["token", "block", "coupled"])
@pytest.mark.parametrize("kind", ["headless", "dflash", "ngram"])
def test_threshold_trims_any_drafter_and_leaves_the_tokens(tiny, target, kind, verifier):
    prompts = [*tiny.make_prompts(4, 64), [1, 2, 3, 1, 2, 3, 1, 2], [7, 7, 7, 7]]
    requests = tiny.make_requests(prompts, max_new_tokens=20)
    expected = tiny.token_ids(tiny.decode(target, None, requests))
    drafter, verified = drafter_of(tiny, target, kind), []
    for threshold in (0.0, 0.55, 1.0):
        outputs = tiny.decode(
            target, drafter, requests, threshold=threshold, verifier=verifier, max_requests=3
        )
        assert tiny.token_ids(outputs) == expected
        verified.append(sum(output.stats.verified for output in outputs))
    assert verified[0] > verified[1] > verified[2] == 0


@pytest.mark.parametrize("kind", ["dflash", "ngram"])
def test_confidence_does_not_hang_on_the_company(tiny, target, kind):
    drafter = drafter_of(tiny, target, kind)
    prompts = [[1, 2, 3, 1, 2, 3, 1], [7, 7, 7], *tiny.make_prompts(4, 64, seed=8)]
    requests = tiny.make_requests(prompts, max_new_tokens=16, temperature=0.9, seed=50)
    options = {"threshold": 0.55, "verifier": "token"}
    alone = [tiny.decode(target, drafter, [r], **options)[0] for r in requests]
    for batch in (2, 6):
        together = tiny.decode(target, drafter, requests, max_requests=batch, **options)
        assert tiny.token_ids(together) == tiny.token_ids(alone)
        assert [o.stats.verified for o in together] == [o.stats.verified for o in alone]
