"""The complete proof: all cases in order, and whether they pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dspark.evaluation.proof.case import Case
from dspark.evaluation.proof.controls import control_cases
from dspark.evaluation.proof.exact import coupled_cases, exact_cases
from dspark.evaluation.proof.level_trees import level_tree_cases
from dspark.evaluation.proof.noise import noise_cases
from dspark.evaluation.proof.trees import tree_cases


@dataclass(frozen=True)
class Proof:
    """All cases, in the order in which they were enumerated."""

    cases: Sequence[Case]

    @property
    def ok(self) -> bool:
        """Whether every case came out as expected, and there are cases of both kinds."""
        kinds = {case.expected for case in self.cases}
        return kinds == {"exact", "biased"} and all(case.passed for case in self.cases)

    def of(self, expected: str) -> list[Case]:
        """The cases that must be exact, or the controls, which must be biased."""
        return [case for case in self.cases if case.expected == expected]


@torch.no_grad()
def prove(seed: int = 0) -> Proof:
    """Enumerate every case.

    Args:
        seed: of the small worlds; another seed proves the same in other worlds.
    """
    return Proof(tuple(all_cases(seed)))


def all_cases(seed: int = 0) -> Iterator[Case]:
    """The cases one by one, exact ones first; `prove` for all of them."""
    yield from exact_cases(seed)
    yield from coupled_cases(seed)
    yield from control_cases(seed)
    yield from noise_cases(seed)
    yield from tree_cases(seed)
    yield from level_tree_cases(seed)
