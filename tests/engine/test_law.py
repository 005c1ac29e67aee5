"""The engine end to end at T > 0: its tokens follow the target's exact law.

Thousands of requests with a vocabulary of six: the first three tokens of each against the law of
the target alone, worked out by hand over all prefixes. Requests of three kinds, with different
lengths, join and leave a batch all the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import Proposal
from dspark.engine.engine import Engine
from dspark.engine.speculation.draft import Drawing
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.sampling_state import RoundState
from dspark.engine.speculation.schedule import Schedule
from dspark.engine.speculation.trees import draft, levels
from dspark.request import Request, SamplingParams
from dspark.sampling.noise import Stream
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from tests.helpers.laws import tempered_top_p

VOCAB, TOKENS, PER_KIND = 6, 3, 1000
EXACT, BIASED = 4.0, 6.0  # standard deviations
KINDS = (
    ((1, 2, 3), {"temperature": 1.0}),
    (
        (4, 4),
        {
            "temperature": 0.9,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logit_bias": {2: 0.7, 5: -0.5},
        },
    ),
    ((0, 5, 2, 1, 3), {"temperature": 1.4, "top_p": 0.85}),
)


@pytest.fixture(scope="module")
def small(tiny):
    target = tiny.make_target(vocab=VOCAB, seed=4)
    target._anatomy.head.weight.mul_(0.5)  # closer to even, so that all outcomes are seen
    return target


def raw_logits(target, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    batch = RaggedBatch.fresh(sequences)
    last = torch.tensor(batch.offsets[1:]) - 1
    with torch.inference_mode():
        return target.forward(batch, logit_rows=last).logits_NV.double().numpy()


def hand_made_law(logits, params: SamplingParams, prompt, output) -> np.ndarray:
    """Processors written out, slowly and obviously."""
    scores = logits.copy()
    for token in range(VOCAB):
        count = list(output).count(token)
        if count or token in prompt:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        scores[token] += params.logit_bias.get(token, 0.0)
    return tempered_top_p(scores, params.temperature, params.top_p)


def exact_law(target, prompt, params) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of the first TOKENS tokens."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        prefixes = list(law)
        logits = raw_logits(target, [[*prompt, *prefix] for prefix in prefixes])
        law = {
            (*prefix, token): law[prefix] * p
            for prefix, row in zip(prefixes, logits, strict=True)
            for token, p in enumerate(hand_made_law(row, params, prompt, prefix))
        }
    return law


def sampled(
    target, drafter, *, kinds=KINDS, threshold=None, schedule=None, per_kind=PER_KIND, **options
):
    """Outputs of many requests of every kind, decoded 192 at a time, joining and leaving."""
    if threshold is not None:
        schedule = Schedule("threshold", threshold)
    engine = Engine(target, drafter, max_requests=192, max_length=16, schedule=schedule, **options)
    requests = [
        Request(prompt, SamplingParams(5 + i % 4, seed=1000 * i + kind, **params))
        for i in range(per_kind)
        for kind, (prompt, params) in enumerate(kinds)
    ]
    outputs = engine.run(requests)
    return [outputs[kind :: len(kinds)] for kind in range(len(kinds))]


def deviations(tiny, target, outputs_by_kind, kinds=KINDS) -> list[float]:
    return [
        tiny.deviation(
            Counter(output.token_ids[:TOKENS] for output in outputs),
            exact_law(target, prompt, SamplingParams(**params)),
        )
        for outputs, (prompt, params) in zip(outputs_by_kind, kinds, strict=True)
    ]


@pytest.mark.parametrize("threshold", [None, 0.6])
@pytest.mark.parametrize("verifier", ["token", "block"])
def test_tokens_follow_the_law_of_the_target(tiny, small, verifier, threshold):
    drafter = tiny.MarkovDrafter(VOCAB)
    outputs = sampled(small, drafter, verifier=verifier, threshold=threshold)
    assert max(deviations(tiny, small, outputs)) < EXACT
    stats = [output.stats for kind in outputs for output in kind]
    accepted, verified = sum(s.accepted for s in stats), sum(s.verified for s in stats)
    assert 0.2 < accepted / verified < 0.9
    assert (verified < sum(s.drafted for s in stats)) == (threshold is not None)


def test_a_dspark_drafter_and_the_joint_law_of_neighbours(tiny, small):
    drafter = tiny.make_drafter(small, head="rnn", block_size=4)
    outputs = sampled(small, drafter, verifier="block", threshold=0.5)
    assert max(deviations(tiny, small, outputs)) < EXACT
    prompt, params = KINDS[0]
    law = exact_law(small, prompt, SamplingParams(**params))
    second = np.zeros(VOCAB)
    for outcome, p in law.items():
        second[outcome[1]] += p
    pairs = {(a, b): second[a] * second[b] for a, b in product(range(VOCAB), repeat=2)}
    tokens = [output.token_ids[1] for output in outputs[0]]
    assert tiny.deviation(Counter(pairwise(tokens)), pairs) < EXACT


def jagged_costs():
    """Steps in stairs of 96 tokens, so that budgets hang on confidences of many requests."""
    points = tuple(
        CostPoint(tokens, requests, 4.0 + 3.0 * (tokens // 96), 0.5)
        for requests in (1, 8, 32, 96, 192)
        for tokens in sorted({requests, *range(max(requests, 24), 8 * requests + 1, 24)})
    )
    return CostTable(points, MachineKey("test", 1, "float32", "tiny", "tiny"))


@pytest.mark.usefixtures("by_the_table")
@pytest.mark.parametrize("name", ["prefix", "lagged", "lookahead"])
@pytest.mark.parametrize("verifier", ["token", "block"])
def test_lengths_weighed_against_costs_leave_the_law(tiny, small, verifier, name):
    drafter = tiny.MarkovDrafter(VOCAB)
    schedule = Scheduler(
        Schedule(name), verifier, drafter.block_size, Calibration(), jagged_costs()
    )
    outputs = sampled(small, drafter, verifier=verifier, schedule=schedule)
    assert max(deviations(tiny, small, outputs)) < EXACT
    trimmed(outputs)


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
@pytest.mark.parametrize("verifier", ["token", "block"])
def test_a_chain_of_drafts_follows_the_law(tiny, small, verifier, name):
    drafter = tiny.make_eagle3(small, mtp=name == "mtp", passes=3)
    outputs = sampled(small, drafter, verifier=verifier, per_kind=800)
    assert max(deviations(tiny, small, outputs)) < EXACT
    stats = [output.stats for kind in outputs for output in kind]
    accepted, verified = sum(s.accepted for s in stats), sum(s.verified for s in stats)
    assert 0.1 < accepted / verified < 0.9


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_a_drafter_that_knows_some_tokens_and_one_that_wastes_a_slot(tiny, small, verifier):
    drafter = tiny.make_drafter(small, known=(0, 2, 3, 5), sample_from_anchor=False)
    outputs = sampled(small, drafter, verifier=verifier, per_kind=600)
    assert max(deviations(tiny, small, outputs)) < EXACT
    drafted = sum(output.stats.drafted for kind in outputs for output in kind)
    assert drafted > sum(output.stats.accepted for kind in outputs for output in kind) > 0


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_confidence_from_the_margin_of_the_raw_logits(tiny, small, verifier):
    drafter = tiny.HeadlessDrafter(VOCAB)
    outputs = sampled(small, drafter, verifier=verifier, threshold=0.6)
    assert max(deviations(tiny, small, outputs)) < EXACT
    trimmed(outputs)


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_prompt_lookup_trimmed_by_its_own_confidence(tiny, small, verifier):
    outputs = sampled(small, tiny.ngram(small), verifier=verifier, threshold=0.4)
    assert max(deviations(tiny, small, outputs)) < EXACT
    trimmed(outputs)


def trimmed(outputs):
    """Some drafts were not verified, and of the others some were kept."""
    stats = [output.stats for kind in outputs for output in kind]
    accepted, verified = sum(s.accepted for s in stats), sum(s.verified for s in stats)
    assert 0.1 * verified < accepted < verified < 0.95 * sum(s.drafted for s in stats)


@pytest.mark.usefixtures("by_the_table")
def test_each_request_has_a_verifier_of_its_own(tiny, small):
    """Block beside coupled in every round: both follow the law, and each judges by its own rule."""
    drafter = tiny.MarkovDrafter(VOCAB)
    schedule = Scheduler(
        Schedule("lagged"), "block", drafter.block_size, Calibration(), jagged_costs()
    )
    engine = Engine(small, drafter, max_requests=192, max_length=16, schedule=schedule)
    requests = [
        Request(
            prompt,
            SamplingParams(5 + i % 4, seed=1000 * i + kind, **params),
            reproducible=bool(i % 2),
        )
        for i in range(2 * 700)
        for kind, (prompt, params) in enumerate(KINDS)
    ]
    outputs = engine.run(requests)
    for reproducible in (False, True):
        mine = [i for i, request in enumerate(requests) if request.reproducible == reproducible]
        own = [outputs[i] for i in mine]
        assert max(deviations(tiny, small, [own[k::3] for k in range(3)])) < EXACT
        some = [replace(requests[i], reproducible=True) for i in mine[:300]]
        plain = tiny.decode(small, None, some, max_length=16, max_requests=64)
        same = tiny.token_ids(plain) == tiny.token_ids(own[:300])
        assert same == reproducible


def test_coupled_follows_the_law_too(tiny, small):
    outputs = sampled(small, tiny.MarkovDrafter(VOCAB), verifier="coupled", per_kind=800)
    assert max(deviations(tiny, small, outputs)) < EXACT


@pytest.mark.parametrize("name", ["fixed", "lagged"])
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_trees_follow_the_law(tiny, small, name, kind):
    drafter = tiny.make_drafter(small, block_size=3)
    if kind == "eagle3":
        drafter = tiny.make_eagle3(small, passes=3)
    schedule = Scheduler(
        Schedule(name), "block", 6, Calibration(), jagged_costs(), tree_depth=drafter.block_size
    )
    outputs = sampled(small, drafter, schedule=schedule, tree_nodes=6, per_kind=700)
    assert max(deviations(tiny, small, outputs)) < EXACT
    stats = [output.stats for kind in outputs for output in kind]
    accepted, verified = sum(s.accepted for s in stats), sum(s.verified for s in stats)
    assert 0.1 * verified < accepted
    assert (verified < sum(s.drafted for s in stats)) == (name == "lagged")


# Controls: each wrong engine must fail the test above.


def control(tiny, target, drafter, *, requests=2500, **options) -> float:
    outputs = sampled(target, drafter, kinds=KINDS[:1], per_kind=requests, **options)
    return deviations(tiny, target, outputs, KINDS[:1])[0]


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_control_reported_law_is_not_the_one_drawn_from(tiny, small, verifier, monkeypatch):
    draw = Drawing.__call__

    def misreport(self, step, logits_RC, tokens=None):
        tokens_R = draw(self, step, logits_RC, tokens)
        for laws in self.distributions.values():
            laws[-1].probs_NC.sqrt_()
            laws[-1].probs_NC.div_(laws[-1].probs_NC.sum(dim=1, keepdim=True))
        return tokens_R

    monkeypatch.setattr(Drawing, "__call__", misreport)
    assert control(tiny, small, tiny.MarkovDrafter(VOCAB), verifier=verifier) > BIASED


def test_control_reported_law_is_not_the_one_that_trees_are_drawn_from(tiny, small, monkeypatch):
    drawn = draft._Grower.drawn

    def misreport(self, state, rows_M):
        trees, law_MKPC = drawn(self, state, rows_M)
        return trees, law_MKPC.sqrt()

    monkeypatch.setattr(draft._Grower, "drawn", misreport)
    drafter = tiny.make_drafter(small, block_size=3)
    assert control(tiny, small, drafter, tree_nodes=6) > BIASED


def test_control_levels_that_are_ordered_by_the_tokens_drawn(tiny, small, monkeypatch):
    """Survivals that have seen the token that they judge, as EAGLE-2's own have."""
    drawn = levels.Levels._drawn

    def peeking(self, law_MWC, numbers):
        found = []
        for law_WC, r, (survival_WB, columns_WB) in zip(
            law_MWC, numbers, drawn(self, law_MWC, numbers), strict=True
        ):
            above_W1 = self._growths[r].reached[: len(columns_WB), None]
            own_WB = np.take_along_axis(law_WC[: len(columns_WB)], columns_WB, 1)
            found.append((np.where(survival_WB < 0, -1.0, above_W1 * own_WB), columns_WB))
        return found

    monkeypatch.setattr(levels.Levels, "_drawn", peeking)
    drafter = tiny.make_eagle3(small, passes=3)
    assert control(tiny, small, drafter, tree_nodes=4) > BIASED


@pytest.mark.parametrize("stream", [Stream.VERIFY, Stream.NEXT])
def test_control_drafts_drawn_with_the_noise_of_verification(tiny, small, stream, monkeypatch):
    def shared(self, step):
        return self._uniforms[stream][:, step]

    monkeypatch.setattr(RoundState, "draft_uniform", shared)
    drafter = tiny.MarkovDrafter(VOCAB)
    assert control(tiny, small, drafter, verifier="token", requests=4000) > BIASED


def test_control_confidence_that_has_seen_the_token_it_judges(tiny, small):
    class Peeking(tiny.MarkovDrafter):
        def propose(self, context, batch, draw):
            tokens = [batch.anchors_R]
            for step in range(batch.num_drafts):
                tokens.append(draw(step, self.logits_VV[tokens[-1]]))
            return Proposal(self.confidence_V[torch.stack(tokens[1:], dim=1)])

    assert control(tiny, small, tiny.MarkovDrafter(VOCAB), threshold=0.6) < EXACT
    assert control(tiny, small, Peeking(VOCAB), threshold=0.6) > BIASED
