"""The proof itself: its sums against a slow reference, and that it notices what breaks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from dspark.errors import NumericsError
from dspark.evaluation.proof import case as cases
from dspark.evaluation.proof import exact, noise, schedules
from dspark.evaluation.proof.case import control, of_schedule
from dspark.evaluation.proof.controls import control_cases
from dspark.evaluation.proof.exact import coupled_cases
from dspark.evaluation.proof.pairs import SmallPair, telling_pair
from dspark.evaluation.proof.proof import Proof
from dspark.evaluation.proof.rounds import RULES, Verifier, View, Walk
from dspark.evaluation.proof.worlds import Distance, number, random_world
from dspark.request import SamplingParams
from dspark.sampling import verification
from dspark.scheduling import budget as prefix
from dspark.scheduling import lookahead, survival

NAN = float("nan")


def at(laws, tokens):
    """The law after some tokens, as a list."""
    vocab_size = laws[0].shape[1]
    return laws[len(tokens)][int(number(torch.tensor([tokens]).view(1, -1), vocab_size))].tolist()


def score(logits, tokens):
    """The confidence logit of the draft after some tokens."""
    vocab_size = logits[1].shape[0]
    return float(logits[len(tokens)][int(number(torch.tensor([tokens]).view(1, -1), vocab_size))])


def normed(values):
    return [value / sum(values) for value in values]


def verdicts(rule, p, q, drafts, length):
    """(accepted, next law, chance) as the papers state the rules, written out number by number."""
    ratios = [p[k][x] / q[k][x] for k, x in enumerate(drafts)]
    if rule == "token":
        reached = 1.0
        for k in range(length):
            keep = min(1.0, ratios[k])
            if keep < 1:
                rest = normed([max(a - b, 0.0) for a, b in zip(p[k], q[k], strict=True)])
                yield k, rest, reached * (1 - keep)
            reached *= keep
        yield length, p[length], reached
        return
    weight = [1.0]
    for ratio in ratios[:length]:
        weight.append(min(weight[-1] * ratio, 1.0))
    excess = [
        [max(weight[i] * a - b, 0.0) for a, b in zip(p[i], q[i], strict=True)]
        for i in range(length)
    ]
    keep = [sum(row) / (sum(row) + 1 - w) for row, w in zip(excess, weight, strict=False)]
    keep.append(weight[length])
    missed = 1.0  # every test behind i has failed
    for i in range(length, 0, -1):
        if keep[i] > 0:
            yield i, p[length] if i == length else normed(excess[i]), missed * keep[i]
        missed *= 1 - keep[i]
    if missed > 0:
        yield 0, normed(excess[0]) if length else p[0], missed


def reference(requests, rule, schedule, rounds):
    """Chances of all requests' whole outputs, by recursion over everything that can happen."""
    known = {}

    def walk(prefixes, memory, rounds):
        key = prefixes, memory, rounds
        if key not in known:
            known[key] = (rest if rounds == 0 else play)(prefixes, memory, rounds)
        return known[key]

    def rest(prefixes, _memory, _rounds):
        total = {(): 1.0}
        for request, done in zip(requests, prefixes, strict=True):
            target = request(()).target
            ends = {done: 1.0}
            for _ in range(len(target) - len(done)):
                ends = {
                    (*x, token): chance * law
                    for x, chance in ends.items()
                    for token, law in enumerate(at(target, x))
                }
            total = {(*xs, x): a * b for (xs, a), (x, b) in product(total.items(), ends.items())}
        return total

    def play(prefixes, memory, rounds):
        worlds = [request(done) for request, done in zip(requests, prefixes, strict=True)]
        total = defaultdict(float)
        block_size, vocab_size = worlds[0].block_size, worlds[0].vocab_size
        for drafts in product(product(range(vocab_size), repeat=block_size), repeat=len(worlds)):
            each = list(zip(worlds, drafts, strict=True))
            q = [[at(w.draft, x[:k]) for k in range(block_size)] for w, x in each]
            p = [[at(w.target, x[:k]) for k in range(block_size + 1)] for w, x in each]
            logits = [[score(w.logits, x[:k]) for k in range(block_size)] for w, x in each]
            probs = [
                [row[token] for row, token in zip(rows, x, strict=True)]
                for rows, x in zip(q, drafts, strict=True)
            ]
            view = View(np.array(logits), np.array(drafts), np.array(probs))
            lengths = schedule.lengths(view, memory)
            options = [
                list(verdicts(rule, *rows, int(length)))
                for *rows, length in zip(p, q, drafts, lengths, strict=True)
            ]
            for chosen in product(*options):
                accepted = np.array([kept for kept, _, _ in chosen])
                remembered = schedule.remember(view, accepted, lengths)
                for tokens in product(range(vocab_size), repeat=len(worlds)):
                    chance = float(np.prod(probs))
                    for (_, law, verdict), token in zip(chosen, tokens, strict=True):
                        chance *= verdict * law[token]
                    if chance == 0:
                        continue
                    played = zip(prefixes, drafts, accepted, tokens, strict=True)
                    after = tuple((*done, *x[:kept], token) for done, x, kept, token in played)
                    for outputs, share in walk(after, remembered, rounds - 1).items():
                        total[outputs] += chance * share
        return total

    chances = walk(((),) * len(requests), None, rounds)
    vocab_size, horizon = requests[0](()).vocab_size, requests[0](()).horizon
    law = torch.zeros((vocab_size,) * (horizon * len(requests)), dtype=torch.float64)
    for outputs, chance in chances.items():
        law[tuple(token for x in outputs for token in x)] = chance
    return law.view((vocab_size**horizon,) * len(requests))


def same_as_reference(requests, rule, schedule, rounds=1):
    walk = Walk(requests, Verifier.of(rule), schedule)
    law = walk.law(rounds)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(law, reference(requests, rule, schedule, rounds), rtol=0, atol=1e-13)
    return Distance.of(law, walk.targets()).largest


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("requests", "rounds", "schedule"),
    [
        (1, 1, schedules.threshold(0.7)),
        (2, 1, schedules.prefix([1.0, 1.3, 1.5, 1.9, 2.4])),
        (1, 2, schedules.lagged([1.0, 1.4, 1.7])),
        (2, 2, schedules.lagged([1.0, 1.3, 1.6, 1.9, 2.3])),
    ],
)
def test_rounds_sum_to_what_a_plain_recursion_finds(rule, requests, rounds, schedule):
    telling = [telling_pair(r, 2, 2, "rnn", 3 * rounds, tied=False) for r in range(requests)]
    assert same_as_reference(telling, rule, schedule, rounds) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_biased_rounds_sum_to_what_a_plain_recursion_finds(rule):
    logits = tuple(torch.tensor(c, dtype=torch.float64) for c in ([2.0], [4.0, -2.0]))
    worlds = [replace(random_world(seed, 2, 2, peak=2.0), logits=logits) for seed in (0, 6)]
    schedule = schedules.searched_globally([1.0, 2.0, 2.0, 2.2, 2.2])
    assert same_as_reference([lambda _, w=w: w for w in worlds], rule, schedule) > 1e-3


def test_a_small_pair_is_one_story_whatever_prefix_it_is_asked_after():
    pair = SmallPair(0, 2, 2, "rnn", horizon=6)
    first, after = pair(()), pair((1, 0))
    assert torch.equal(after.target[0][0], first.target[2][2])
    assert torch.equal(after.target[1], first.target[3].view(4, 2, 2)[2])
    for world in (first, after):
        for judged, plain in zip(world.judged, world.target, strict=False):
            assert torch.equal(judged, plain)
        assert all(torch.allclose(law.sum(1), torch.ones(()).double()) for law in world.draft)
    assert not torch.allclose(first.draft[0], after.draft[0])


@pytest.mark.parametrize(
    ("head", "remembers"), [("vanilla", False), ("gated", False), ("rnn", True)]
)
def test_only_the_rnn_head_remembers_more_than_one_token(head, remembers):
    law = SmallPair(0, 2, 3, head)(()).draft[2]  # after 00, 01, 10, 11
    assert torch.allclose(law[0], law[2], atol=1e-9) != remembers
    assert not torch.allclose(law[0], law[1], atol=1e-3)


def test_penalties_that_ignore_the_drafts_show_in_the_rows():
    params = SamplingParams(temperature=0.7, frequency_penalty=0.9)
    rows, stale = (SmallPair(0, 2, 2, params=params, stale=s)(()) for s in (False, True))
    assert torch.equal(rows.judged[0], stale.judged[0])
    assert torch.equal(rows.judged[2], rows.target[2])
    assert not torch.allclose(stale.judged[2], stale.target[2], atol=1e-3)


def test_ties_within_and_between_requests_are_exact_ties():
    requests = [telling_pair(r, 3, 2, "vanilla", 3, tied=True)(()) for r in range(2)]
    first, second = (
        survival.survival(survival.confidence(world.path_logits().numpy())) for world in requests
    )
    assert first[0, 0] == second[0, 0]
    tied = first[:, 1] == first[:, 0]
    assert 0 < tied.sum() < len(tied)  # whether a_2 ties with a_1 hangs on x_1


def test_a_drafter_without_telling_confidences_is_refused(monkeypatch):
    monkeypatch.setattr(SmallPair, "telling", False)
    with pytest.raises(NumericsError, match="No drafter with a rnn head"):
        telling_pair(0, 2, 2, "rnn", 3, tied=False)


@pytest.mark.parametrize(
    ("case", "passed"),
    [
        (cases.exact("a", Distance(1e-15)), True),
        (cases.exact("a", Distance(1e-15, 2e-12)), False),
        (cases.exact("a", Distance(NAN)), False),
        (cases.exact("a", Distance(1e-15, NAN)), False),
        (cases.exact("a", Distance(0.0), holds=False), False),
        (of_schedule("token", "prefix", "rnn", 1, Distance(0.0), 2), True),
        (of_schedule("token", "prefix", "rnn", 1, Distance(0.0), 1), False),
        (of_schedule("token", "fixed", "rnn", 1, Distance(0.0), 1), True),
        (control("a", Distance(0.01)), True),
        (control("a", Distance(0.01), Distance(1e-15)), True),
        (control("a", Distance(0.01), Distance(1e-9)), False),
        (control("a", Distance(0.01), Distance(NAN)), False),
        (control("a", Distance(1e-4)), False),
        (control("a", Distance(1e-4), limit=1e-5), True),
        (control("a", Distance(1e-17, 0.01)), True),
        (control("a", Distance(NAN)), False),
        (control("a", Distance(0.01), holds=False), False),
    ],
)
def test_when_a_case_passes(case, passed):
    assert case.passed is passed


def test_a_proof_needs_cases_of_both_kinds_and_all_of_them():
    good, bad = cases.exact("a", Distance(0.0)), cases.exact("b", Distance(0.1))
    wrong = control("c", Distance(0.1))
    assert Proof((good, wrong)).ok
    assert not Proof((good,)).ok
    assert not Proof((wrong,)).ok
    assert not Proof((good, wrong, bad)).ok
    assert not Proof(()).ok


def test_the_farthest_distance_lets_nan_through():
    assert np.isnan(Distance.farthest([Distance(0.1), Distance(NAN), Distance(0.2)]).request)
    found = Distance.farthest([Distance(0.1, 0.3), Distance(0.2, 0.1)])
    assert (found.request, found.joint, found.largest) == (0.2, 0.3, 0.3)


def stops_at_first_failure(_rule, *rest, right=verification.accepted_lengths):
    return right("token", *rest)


def never_corrects(_rule, p, _q, _drafts, _lengths, accepted):
    rows = p.row_RL[torch.arange(len(accepted)), accepted]
    return verification.Dense.of(p.distribution.dense()[rows])


def keeps_too_much(*args, right=verification.keep_probabilities):
    return right(*args) ** 0.9


def looks_behind(confidence_RK, threshold):
    reached = np.asarray(confidence_RK) >= threshold
    return (reached * np.arange(1, reached.shape[1] + 1)).max(axis=1)


def searches_this_round(survival_RK, *rest, best=prefix.best_budget, fill=prefix.fill_budget):
    step_ms = rest[-1]
    return fill(survival_RK, best(survival_RK, step_ms))


def ranks_ties_backwards(survival_RK, limits_R, right=prefix._ranked):
    ranked = right(survival_RK, limits_R)
    order = np.argsort(ranked.survival_D, kind="stable")[::-1]
    return replace(ranked, requests_D=ranked.requests_D[order], survival_D=ranked.survival_D[order])


@pytest.mark.parametrize(
    ("module", "name", "wrong", "schedule"),
    [
        (verification, "accepted_lengths", stops_at_first_failure, "fixed"),
        (verification, "next_distribution", never_corrects, "fixed"),
        (verification, "keep_probabilities", keeps_too_much, "fixed"),
        (prefix, "threshold_lengths", looks_behind, "threshold"),
        (prefix, "prefix_lengths", searches_this_round, "prefix"),
        (prefix, "_ranked", ranks_ties_backwards, "prefix"),
        (prefix, "_ranked", ranks_ties_backwards, "lagged"),
        (lookahead, "lookahead_lengths", searches_this_round, "lookahead"),
    ],
)
def test_a_broken_production_function_breaks_the_proof(monkeypatch, module, name, wrong, schedule):
    monkeypatch.setattr(exact, "SCHEDULES", (schedule,))
    monkeypatch.setattr(module, name, wrong)
    assert any(case.distance > 1e-3 and not case.passed for case in exact.exact_cases())


def test_a_broken_comparison_breaks_the_identity(monkeypatch):
    right = verification.accepted_by_identity

    def one_too_many(tokens, drafts, lengths):
        return torch.minimum(right(tokens, drafts, lengths) + 1, lengths)

    monkeypatch.setattr(verification, "accepted_by_identity", one_too_many)
    case = next(coupled_cases())
    assert not case.passed
    assert case.distance > 0.1


def test_controls_find_the_figures_of_the_paper():
    found = {case.name: case for case in control_cases()}
    for rule in RULES:
        wrong = found[f"{rule}: Appendix A, global search"]
        assert wrong.tv_request == pytest.approx(0.15, abs=1e-12)
        assert wrong.note == "P(A), P(B) = 0.85, 0.15"
        assert found[f"{rule} / prefix / Appendix A"].note == "P(A), P(B) = 0.70, 0.30"
        crossed = found[f"{rule}: verified iff the other's draft is A"]
        assert crossed.tv_request < 1e-12
        assert crossed.tv_joint > 1e-3
    assert all(case.passed for case in found.values())


def test_controls_of_noise_need_the_wrong_noise(monkeypatch):
    """Without the wrong variant there is nothing to see, and the control says so."""
    assert all(case.passed for case in noise.noise_cases())
    right = noise.two_round_distribution
    monkeypatch.setattr(
        noise,
        "two_round_distribution",
        lambda world, rule, **_: right(world, rule, keyed_by_position=False),
    )
    case = next(noise.noise_cases())
    assert (case.expected, case.passed) == ("biased", False)


def test_worlds_with_impossible_tokens_are_exact_too():
    world = random_world(2, 3, 2, zeros=True)
    assert min(float(law.min()) for law in world.draft) == 0
    walk = Walk([lambda _: world], Verifier.of("block"), schedules.fixed(2))
    assert Distance.of(walk.law(), walk.targets()).largest < 1e-12
