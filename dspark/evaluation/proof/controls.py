"""Controls: wrong variants that the proof must detect.

Where possible, the wrong variant is production code misused, and the right one is measured in the
same worlds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.evaluation.proof import schedules
from dspark.evaluation.proof.case import Case, control, exact
from dspark.evaluation.proof.exact import PROCESSED
from dspark.evaluation.proof.pairs import SmallPair
from dspark.evaluation.proof.rounds import (
    RULES,
    IntArray,
    Memory,
    Schedule,
    Verifier,
    View,
    Walk,
    continued,
    outcomes,
)
from dspark.evaluation.proof.worlds import (
    Distance,
    Distributions,
    World,
    WorldAfter,
    random_world,
    target_distribution,
)
from dspark.sampling.verification import Rule
from dspark.scheduling.budget import fill_budget, threshold_lengths
from dspark.scheduling.online import OnlineLogistic, observed
from dspark.scheduling.survival import confidence, survival

WORLDS = 6
ROUNDED = 1e-5
"""What drawing in bf16 must show at least."""


def control_cases(seed: int = 0) -> Iterator[Case]:
    """Every wrong variant that enumeration can show."""
    yield _first_failure(seed)
    for control_of in (_stop_node, _drawn_in_bf16, _swapped_within, _stale_rows, _unrestricted):
        yield from (control_of(rule, seed) for rule in RULES)
    for of_schedule in (_drawn_probability, _behind_failure, _ties_by_value, _global_search):
        yield from (of_schedule(rule, seed) for rule in RULES)
    for rule in RULES:
        yield from _appendix_a(rule)
    yield from (_crossed(rule, seed) for rule in RULES)
    yield _own_outcome(seed)


def _measure(requests: Sequence[WorldAfter], verifier: Verifier, schedule: Schedule) -> Distance:
    walk = Walk(requests, verifier, schedule)
    return Distance.of(walk.law(), walk.targets())


def _alone(world: World) -> list[WorldAfter]:
    """A world as the only request's only round."""
    return [lambda _prefix: world]


def _both(seed: int, logits: Distributions | None = None) -> list[WorldAfter]:
    """Two requests' only rounds, with these confidence logits or random ones."""
    worlds = [random_world(seed + WORLDS * r, 2, 2, peak=2.0) for r in (0, 1)]
    if logits is not None:
        worlds = [replace(world, logits=logits) for world in worlds]
    return [_alone(world)[0] for world in worlds]


def _worlds(seed: int, vocab_size: int = 3, block_size: int = 3) -> list[World]:
    return [random_world(s, vocab_size, block_size, peak=2.0) for s in range(seed, seed + WORLDS)]


def _beside(
    worlds: Sequence[World],
    wrong: tuple[Verifier, Schedule],
    right: tuple[Verifier, Schedule],
) -> tuple[Distance, Distance]:
    """The farthest that each of two ways comes from plain decoding in the same worlds."""
    found = [
        Distance.farthest([_measure(_alone(world), *way) for world in worlds])
        for way in (wrong, right)
    ]
    return found[0], found[1]


def _first_failure(seed: int) -> Case:
    block, token = Verifier.of("block"), Verifier.of("token")
    full = schedules.fixed(3)
    both = _beside(_worlds(seed), (replace(block, decide=token.decide), full), (block, full))
    return control("block: stops at the first failure", *both, documented=0.76)


def _stop_node(rule: Rule, seed: int) -> Case:
    """Where trimming ends the block, the next token is not a corrected one."""
    right = Verifier.of(rule)

    def residual(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, kept: Tensor) -> Tensor:
        beyond = torch.where(lengths < drafts.shape[1], lengths + 1, lengths)
        return right.next_distribution(p, q, drafts, beyond, kept)

    trimmed = schedules.threshold(0.6)
    both = _beside(
        _worlds(seed), (replace(right, next_distribution=residual), trimmed), (right, trimmed)
    )
    return control(f"{rule}: residual at the stop node", *both, documented=0.78)


def _drawn_in_bf16(rule: Rule, seed: int) -> Case:
    """The verifier is told a distribution in full precision that no draft was drawn from."""
    full, verifier = schedules.fixed(3), Verifier.of(rule)
    wrong, right = [], []
    for world in _worlds(seed, vocab_size=4):
        rounded = [law.bfloat16().double() for law in world.draft]
        drawn = tuple(law / law.sum(1, keepdim=True) for law in rounded)
        wrong.append(_measure(_alone(replace(world, drawn=drawn)), verifier, full))
        right.append(_measure(_alone(replace(world, draft=drawn)), verifier, full))
    return control(
        f"{rule}: q drawn in bf16, reported in fp32",
        Distance.farthest(wrong),
        Distance.farthest(right),
        limit=ROUNDED,
        documented=3e-4,
    )


def _swapped_within(rule: Rule, seed: int) -> Case:
    """A drafter swapped in the middle of a round: it is asked what the old one's drafts had."""
    full, verifier = schedules.fixed(3), Verifier.of(rule)
    wrong, right = [], []
    for old, new in zip(_worlds(seed), _worlds(seed + WORLDS), strict=True):
        swapped = replace(old, draft=new.draft)
        wrong.append(_measure(_alone(replace(swapped, drawn=old.draft)), verifier, full))
        right.append(_measure(_alone(swapped), verifier, full))
    return control(
        f"{rule}: drafter swapped within a round",
        Distance.farthest(wrong),
        Distance.farthest(right),
    )


def _stale_rows(rule: Rule, seed: int) -> Case:
    """Penalties that do not follow the drafts: every row counts the anchor's tokens only."""
    params, full, verifier = PROCESSED["penalties, top-k"], schedules.fixed(2), Verifier.of(rule)
    wrong, right = (
        Distance.farthest(
            [
                _measure([SmallPair(s, 3, 2, params=params, stale=stale)], verifier, full)
                for s in range(seed, seed + 3)
            ]
        )
        for stale in (True, False)
    )
    return control(f"{rule}: penalties blind to the drafts", wrong, right)


def _unrestricted(rule: Rule, seed: int) -> Case:
    """Drafts come from a slot's two likeliest tokens, but all four are reported."""
    full, verifier = schedules.fixed(2), Verifier.of(rule)
    wrong, right = (
        Distance.farthest(
            [
                _measure(
                    [SmallPair(s, 4, 2, draft_top_k=2, unrestricted=unrestricted)], verifier, full
                )
                for s in range(seed, seed + 3)
            ]
        )
        for unrestricted in (True, False)
    )
    return control(f"{rule}: q of all tokens, drawn from candidates", wrong, right)


def _drawn_probability(rule: Rule, seed: int) -> Case:
    def lengths(view: View, _memory: Memory) -> IntArray:
        return threshold_lengths(view.draft_probs_RK, 0.4)

    verifier = Verifier.of(rule)
    both = _beside(
        _worlds(seed), (verifier, Schedule(lengths)), (verifier, schedules.threshold(0.4))
    )
    return control(f"{rule}: scored by q of the drawn token", *both, documented=0.13)


def _behind_failure(rule: Rule, seed: int) -> Case:
    """Up to the last confidence that reaches the threshold, whatever failed before it."""

    def lengths(view: View, _memory: Memory) -> IntArray:
        reached_RK = confidence(view.logits_RK) >= 0.85
        places = np.arange(1, reached_RK.shape[1] + 1)
        last: IntArray = (reached_RK * places).max(axis=1)
        return last

    verifier = Verifier.of(rule)
    both = _beside(
        _worlds(seed), (verifier, Schedule(lengths)), (verifier, schedules.threshold(0.85))
    )
    return control(f"{rule}: threshold behind its first failure", *both)


def _ties_by_value(rule: Rule, seed: int) -> Case:
    """In fp32 the sigmoid of 20 is 1, so a_2 ties with a_1 or not, as x_1 has it.

    A sort that has no order for ties (here: the last comes first) then gives the budget of one
    draft to another request: x_1 is verified only if it is the token that makes the tie.
    """
    logits = (_float64([2.0]), _float64([20.0, -1.0]))

    def tied_survivals(view: View) -> npt.NDArray[np.float64]:
        return survival(torch.from_numpy(view.logits_RK).float().sigmoid().numpy())

    def by_value(view: View, _memory: Memory) -> IntArray:
        survival_KR = tied_survivals(view).T
        first = int(np.argsort(survival_KR.ravel(), kind="stable")[::-1][0])
        return np.bincount([first % 2], minlength=2)

    def by_place(view: View, _memory: Memory) -> IntArray:
        return fill_budget(tied_survivals(view), 1)

    wrong, right = (
        Distance.farthest(
            [
                _measure(_both(seed + n, logits), Verifier.of(rule), Schedule(way))
                for n in range(WORLDS)
            ]
        )
        for way in (by_value, by_place)
    )
    return control(f"{rule}: ties by value, fp32 sigmoid of 1", wrong, right, documented=0.11)


def _global_search(rule: Rule, seed: int) -> Case:
    """The best budget of this round's own survivals, where a stair pays only with what follows.

    Whether it is climbed, and the first drafts are verified at all, depends on those drafts.
    """
    logits = (_float64([2.0]), _float64([4.0, -2.0]))
    step_ms = [1.0, 2.0, 2.0, 2.2, 2.2]
    wrong, right = [], []
    for s in range(seed, seed + WORLDS):
        requests, verifier = _both(s, logits), Verifier.of(rule)
        wrong.append(_measure(requests, verifier, schedules.searched_globally(step_ms)))
        right.append(_measure(requests, verifier, schedules.prefix(step_ms)))
    return control(
        f"{rule}: global search over this round",
        Distance.farthest(wrong),
        Distance.farthest(right),
        documented=0.225,
    )


def _appendix_a(rule: Rule) -> Iterator[Case]:
    """Verifying two drafts pays only where c_2 is high, which depends on x_1.

    Searched globally, drafts of A are always verified and drafts of B never.
    """
    half, target = _float64([[0.5, 0.5]]), _float64([[0.7, 0.3]])
    world = World(
        target=(target, target.expand(2, 2), target.expand(4, 2)),
        draft=(half, _float64([[0.7, 0.3], [0.0, 1.0]])),
        logits=(_float64([4.0]).log(), _float64([40.0, -800.0])),
    )
    step_ms = [1.0, 2.0, 2.0]

    def first_token(schedule: Schedule) -> tuple[Distance, list[float]]:
        walk = Walk(_alone(world), Verifier.of(rule), schedule)
        law = walk.law()
        return Distance.of(law, walk.targets()), law.view(2, -1).sum(dim=1).tolist()

    wrong, biased = first_token(schedules.searched_globally(step_ms))
    right, true = first_token(schedules.prefix(step_ms))
    yield control(
        f"{rule}: Appendix A, global search",
        wrong,
        documented=0.15,
        note=f"P(A), P(B) = {_shown(biased)}",
        holds=_near(biased, (0.85, 0.15)),
    )
    yield exact(
        f"{rule} / prefix / Appendix A",
        right,
        note=f"P(A), P(B) = {_shown(true)}",
        holds=_near(true, (0.7, 0.3)),
    )


def _float64(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _shown(law: Sequence[float]) -> str:
    return ", ".join(f"{chance:.2f}" for chance in law)


def _near(law: Sequence[float], expected: Sequence[float]) -> bool:
    return bool(np.allclose(law, expected, rtol=0, atol=1e-12))


def _crossed(rule: Rule, seed: int) -> Case:
    """Each request is verified iff the other has drafted token 0: wrong only for the pair."""

    def lengths(view: View, _memory: Memory) -> IntArray:
        return np.where(view.drafts_RK[::-1, 0] == 0, 2, 0)

    found = []
    for s in range(seed, seed + WORLDS):
        found.append(_measure(_both(s), Verifier.of(rule), Schedule(lengths)))
    wrong = Distance.farthest(found)
    return control(
        f"{rule}: verified iff the other's draft is A",
        wrong,
        documented=0.045,
        note="each request alone is exact",
        holds=wrong.request < 1e-12,
    )


def _own_outcome(seed: int) -> Case:
    """Calibration that learns from a round before the round's lengths are decided.

    A draft that would fail lowers its own confidence below the threshold, so that it is trimmed
    instead of rejected, and no residual corrects for it.
    """
    wrong, right = (
        Distance.farthest(
            [_online_distance(world, at_once=at_once) for world in _worlds(seed, 3, 2)]
        )
        for at_once in (True, False)
    )
    return control("token: calibration learns from this round", wrong, right)


def _online_distance(world: World, *, at_once: bool) -> Distance:
    """A round under the token rule, thresholded on an online logistic of its margins."""
    verifier, drafts = Verifier.of("token"), world.paths()
    p, q = world.rows()
    margins = np.exp(world.path_logits().numpy())
    whole = torch.full((len(drafts),), world.block_size)
    keep = verifier.keep(p, q, drafts, whole)
    rows = torch.arange(len(drafts))
    shape = (len(drafts), 1, world.block_size + 1, world.vocab_size)
    chances = torch.zeros(shape, dtype=torch.float64)
    for uniforms, weight in outcomes(keep):
        learned = verifier.decide(keep, uniforms, whole).numpy() if at_once else None
        lengths = torch.from_numpy(_online_lengths(margins, learned))
        kept = verifier.decide(keep, uniforms, lengths)
        following = verifier.next_distribution(p, q, drafts, lengths, kept)
        chances[rows, 0, kept] += weight[:, None] * following
    law = world.path_weights() @ continued(world, chances)[:, 0]
    return Distance.of(law, [target_distribution(world)])


def _online_lengths(margins_NK: npt.NDArray[np.float64], learned_N: IntArray | None) -> IntArray:
    """Lengths of every path, after its own outcome was learned if there is one to learn."""
    lengths = []
    for n, margins_K in enumerate(margins_NK):
        logistic = OnlineLogistic()
        if learned_N is not None:
            verified = [len(margins_K)]
            logistic.update(*observed(margins_K[None], learned_N[n : n + 1], verified))
        lengths.append(threshold_lengths(confidence(logistic.apply(margins_K)), 0.6))
    return np.array(lengths)
