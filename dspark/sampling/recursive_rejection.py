"""Verification of several drafts for one place: recursive rejection without replacement.

Of a node of a draft tree the children are drawn from its draft distribution q one after the other,
each from what the ones before it have left. They are tested in that order (SpecInfer, Miao et al.
2024; without replacement: Jeon et al. 2024, arXiv 2402.14160; Sequoia, Chen et al. 2024):

    p_1 = p,  q_1 = q
    child i stays with probability min(1, p_i(x_i) / q_i(x_i)); if it does not,
    p_{i+1} = norm(max(p_i - q_i, 0)),  q_{i+1} = norm(q_i without x_i)

and if none stays the next token is drawn from what is left of p. One child is the token rule. It is
exact for any number of children, and however many of them there are: given what has been drawn
before it, a further child changes nothing of the output's distribution on the average over that
child (docs/trees.md). Whether there is one must therefore not hang on its own token.

q may hold a few candidates of the vocabulary: only there can p lose anything, so the columns are
those candidates and all other tokens together are one number.
Letters: N nodes, C candidates, B children.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Judged(NamedTuple):
    """What children make of a node's distribution.

    Attributes:
        keep_NB: with what probability each child stays, given that those before it did not.
        left_NC: what is left of p at the candidates where none stays, in units of p.
    """

    keep_NB: Tensor
    left_NC: Tensor


def judge(p_NC: Tensor, rest_N: Tensor, q_NC: Tensor, children_NB: Tensor) -> Judged:
    """Keep probabilities of all children, and what is left of p behind them.

    Args:
        p_NC: the target's probabilities of the candidates.
        rest_N: of all other tokens together.
        q_NC: the draft distribution over the candidates, which the first child was drawn from.
        children_NB: the column of each child, in the order in which they were drawn, -1 behind
            the last. The children of a node differ.

    Returns:
        Both in the dtype of p. Where rounding leaves p without mass, what is left is what was
        there before.
    """
    left_NC, rest_N, q_NC = p_NC, rest_N.clamp(min=0), q_NC.to(p_NC.dtype)
    keeps = []
    for column_N in children_NB.unbind(1):
        is_child_N, column_N1 = column_N >= 0, column_N.clamp(min=0)[:, None]
        mass_N = left_NC.sum(dim=1) + rest_N
        scale_N1 = (mass_N / q_NC.sum(dim=1).clamp(min=torch.finfo(q_NC.dtype).tiny))[:, None]
        scaled_NC = q_NC * scale_N1
        p_N, q_N = (x.gather(1, column_N1).squeeze(1) for x in (left_NC, scaled_NC))
        keep_N = torch.where(q_N > 0, (p_N / q_N).clamp(max=1), (p_N > 0).to(p_N.dtype))
        keeps.append(torch.where(is_child_N, keep_N, torch.zeros_like(keep_N)))
        after_NC = (left_NC - scaled_NC).clamp(min=0)
        has_mass_N = after_NC.sum(dim=1) + rest_N > 0
        left_NC = torch.where((is_child_N & has_mass_N)[:, None], after_NC, left_NC)
        drawn_NC = q_NC.scatter(1, column_N1, 0)
        q_NC = torch.where(is_child_N[:, None], drawn_NC, q_NC)
    if not keeps:
        return Judged(p_NC.new_zeros(len(p_NC), 0), p_NC)
    return Judged(torch.stack(keeps, dim=1), left_NC)
