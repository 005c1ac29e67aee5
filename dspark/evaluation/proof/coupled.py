"""`coupled` under proof: every output is plain decoding's own, token for token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.heads import MARKOV_KINDS, MarkovKind
from dspark.evaluation.proof import schedules
from dspark.evaluation.proof.case import Case, control, of_schedule
from dspark.evaluation.proof.pairs import SmallPair, telling_pair
from dspark.evaluation.proof.rounds import Memory, Schedule, View
from dspark.evaluation.proof.worlds import Distance, Prefix, World
from dspark.sampling import verification
from dspark.sampling.distribution import Dense
from dspark.sampling.noise import seed_tensor

SEEDS, TOKENS = 24, 5


def coupled_cases(seed: int = 0) -> Iterator[Case]:
    """Every schedule and head, compared over many seeds, and a key that breaks the identity."""
    for head in MARKOV_KINDS:
        yield from _coupled(head, seed)
    pairs = _pairs("vanilla", seed)
    wrong, _seen = _differing(_Drawn(pairs, keyed_by_slot=True), schedules.fixed(3), seed)
    yield control("coupled: noise keyed by the slot in the block", wrong)


def _pairs(head: MarkovKind, seed: int) -> list[SmallPair]:
    return [telling_pair(2 * seed + r, 2, 3, head, TOKENS + 4, tied=False) for r in range(2)]


def _coupled(head: MarkovKind, seed: int) -> Iterator[Case]:
    """A global search over this round, wrong elsewhere, is right here like any other schedule."""
    drawn, costs = _Drawn(_pairs(head, seed)), schedules.step_costs(6).values()
    ways = {
        "fixed": [schedules.fixed(3)],
        "threshold": [schedules.threshold(0.7)],
        "prefix": [schedules.prefix(step_ms) for step_ms in costs],
        "lagged": [schedules.lagged(step_ms) for step_ms in costs],
        "lookahead": [schedules.lookahead(step_ms) for step_ms in costs],
        "global search": [schedules.searched_globally(step_ms) for step_ms in costs],
    }
    for name, settings in ways.items():
        found = [_differing(drawn, schedule, seed) for schedule in settings]
        distance = Distance.farthest([distance for distance, _seen in found])
        lengths = max(seen for _distance, seen in found)
        yield of_schedule("coupled", name, head, 2, distance, lengths)


def _differing(drawn: _Drawn, schedule: Schedule, seed: int) -> tuple[Distance, int]:
    """The share of outputs, and of pairs of outputs, that are not plain decoding's own.

    Returns:
        The shares, and how many different lengths the schedule has chosen.
    """
    different, seen = [], set[tuple[int, ...]]()
    for first in range(seed, seed + 2 * SEEDS, 2):
        outputs = _speculative(drawn, schedule, first, seen)
        plain = drawn.plain(first)
        different.append([ours != theirs for ours, theirs in zip(outputs, plain, strict=True)])
    shares = np.array(different)
    return Distance(float(shares.mean(axis=0).max()), float(shares.any(axis=1).mean())), len(seen)


@dataclass
class _Drawn:
    """What requests with seeds `first`, `first + 1` draw; it hangs on no schedule.

    Attributes:
        pairs: of the requests.
        keyed_by_slot: key noise by the slot in the block (a wrong variant).
    """

    pairs: Sequence[SmallPair]
    keyed_by_slot: bool = False
    _plain: dict[int, list[Prefix]] = field(default_factory=dict)
    _blocks: dict[tuple[int, tuple[Prefix, ...]], _Block] = field(default_factory=dict)

    def plain(self, first: int) -> list[Prefix]:
        """Plain decoding's own samples."""
        if first not in self._plain:
            seeds_R = self._seeds(first)
            own = [_plain(pair, seeds_R[r : r + 1]) for r, pair in enumerate(self.pairs)]
            self._plain[first] = own
        return self._plain[first]

    def block(self, first: int, outputs: tuple[Prefix, ...]) -> _Block:
        """What is drafted and judged after these outputs."""
        if (first, outputs) not in self._blocks:
            worlds = [pair(done) for pair, done in zip(self.pairs, outputs, strict=True)]
            starts_R = torch.tensor([0 if self.keyed_by_slot else len(done) for done in outputs])
            self._blocks[first, outputs] = _Block.draw(worlds, self._seeds(first), starts_R)
        return self._blocks[first, outputs]

    def _seeds(self, first: int) -> Tensor:
        return seed_tensor(list(range(first, first + len(self.pairs))))


def _plain(pair: SmallPair, seed_1: Tensor) -> Prefix:
    tokens: Prefix = ()
    while len(tokens) < TOKENS:
        law_1V = Dense.of(pair(tokens).target[0])
        tokens += (int(verification.coupled_tokens(law_1V, seed_1, torch.tensor([len(tokens)]))),)
    return tokens


def _speculative(
    drawn: _Drawn, schedule: Schedule, first: int, seen: set[tuple[int, ...]]
) -> list[Prefix]:
    """The first tokens of requests that share their rounds; one that is done idles along."""
    outputs: list[Prefix] = [()] * len(drawn.pairs)
    memory: Memory = None
    while min(map(len, outputs)) < TOKENS:
        block = drawn.block(first, tuple(outputs))
        lengths = schedule.lengths(block.view, memory)
        seen.add(tuple(map(int, lengths)))
        accepted = verification.accepted_by_identity(
            block.own_RK1, block.drafts_RK, torch.from_numpy(lengths)
        )
        memory = schedule.remember(block.view, accepted.numpy(), lengths)
        for r, kept in enumerate(accepted.tolist()):
            outputs[r] = (*outputs[r], *block.own_RK1[r, : kept + 1].tolist())[:TOKENS]
    return outputs


@dataclass(frozen=True)
class _Block:
    """A drafted block of every request, and the target's own token at each of its rows."""

    drafts_RK: Tensor
    own_RK1: Tensor
    view: View

    @classmethod
    def draw(cls, worlds: Sequence[World], seeds_R: Tensor, starts_R: Tensor) -> _Block:
        """Draft K tokens after each request's prefix, and take the target's own along them."""
        places = [0] * len(worlds)
        drafts, probs, logits, own = [], [], [], []
        for k in range(worlds[0].block_size + 1):
            here = list(zip(worlds, places, strict=True))
            judged = torch.stack([(w.judged or w.target)[k][n] for w, n in here])
            own.append(verification.coupled_tokens(Dense.of(judged), seeds_R, starts_R + k))
            if k == worlds[0].block_size:
                break
            law_RV = torch.stack([w.draft[k][n] for w, n in here])
            drafts.append(verification.coupled_tokens(Dense.of(law_RV), seeds_R, starts_R + k))
            probs.append(law_RV.gather(1, drafts[-1][:, None]).squeeze(1))
            logits.append(torch.stack([w.logits[k][n] for w, n in here]))
            places = [
                n * w.vocab_size + x for (w, n), x in zip(here, drafts[-1].tolist(), strict=True)
            ]
        columns = (torch.stack(c, dim=1) for c in (logits, drafts, probs))
        view = View(*(column.numpy() for column in columns))
        return cls(torch.stack(drafts, dim=1), torch.stack(own, dim=1), view)
