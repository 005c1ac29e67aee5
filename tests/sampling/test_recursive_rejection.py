"""Recursive rejection: keep probabilities by the formulas, and exactness by enumeration."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from dspark.sampling.recursive_rejection import judge

V = 5


def laws(seed, zeros=False):
    generator = torch.Generator().manual_seed(seed)
    p, q = 1.5 * torch.randn(2, V, generator=generator, dtype=torch.float64)
    if zeros:
        p[1] = q[3] = float("-inf")
    return p.softmax(0), q.softmax(0)


def slow_judge(p, q, children):
    """One node, number by number."""
    p, q, keeps = p.tolist(), q.tolist(), []
    for x in children:
        keeps.append(min(1.0, p[x] / q[x]))
        rest = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
        if sum(rest) > 0:
            p = [a / sum(rest) for a in rest]
        q[x] = 0.0
        q = [b / sum(q) if sum(q) else 0.0 for b in q]
    return keeps, p


@pytest.mark.parametrize("zeros", [False, True])
def test_keep_probabilities_and_what_is_left_equal_the_formulas(zeros):
    nodes, columns = [(2, 0, 4), (1, 2), (4,), ()], [[2, 0, 4], [1, 2, -1], [4, -1, -1], [-1] * 3]
    pairs = [laws(seed, zeros) for seed in range(4)]
    p_NC, q_NC = (torch.stack(rows) for rows in zip(*pairs, strict=True))
    keep_NB, left_NC = judge(p_NC, torch.zeros(4).double(), q_NC, torch.tensor(columns))
    for n, own in enumerate(nodes):
        keeps, left = slow_judge(p_NC[n], q_NC[n], own)
        assert keep_NB[n, : len(own)].tolist() == pytest.approx(keeps, abs=1e-12)
        assert not keep_NB[n, len(own) :].any()
        assert (left_NC[n] / left_NC[n].sum()).tolist() == pytest.approx(left, abs=1e-12)


def output(p, q, count, candidates=None):
    """The law of the token where `count` children are drawn from q without replacement."""
    candidates = list(range(V)) if candidates is None else candidates
    p_1C, q_1C = p[candidates][None], q[candidates][None] / q[candidates].sum()
    rest_1 = (1 - p_1C.sum()).reshape(1)
    law = torch.zeros(V, dtype=torch.float64)
    for children in permutations(range(len(candidates)), count):
        chance, left = 1.0, 1.0
        for x in children:
            chance *= float(q_1C[0, x]) / left
            left -= float(q_1C[0, x])
        if chance <= 0:
            continue
        keep_1B, left_1C = judge(p_1C, rest_1, q_1C, torch.tensor([children]).view(1, -1))
        for x, keep in zip(children, keep_1B[0].tolist(), strict=True):
            law[candidates[x]] += chance * keep
            chance *= 1 - keep
        after = p.clone()
        after[candidates] = left_1C[0]
        law += chance * after / after.sum()
    return law


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("candidates", [None, [0, 2, 4]])
def test_any_number_of_children_leaves_the_law_as_it_is(count, candidates):
    for seed in range(3):
        p, q = laws(seed)
        assert (output(p, q, count, candidates) - p).abs().sum() < 1e-12


def test_equal_laws_keep_the_first_child_and_lose_no_mass():
    p, _ = laws(0)
    columns = torch.tensor([[3, 1]])
    keep_1B, left_1C = judge(p[None], torch.zeros(1).double(), p[None], columns)
    assert keep_1B[0, 0] == 1
    assert left_1C.sum() > 0
    assert left_1C.isfinite().all()
