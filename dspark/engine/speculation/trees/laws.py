"""What the children of a tree's nodes are drawn from, or ranked by.

Letters: M requests of one kind, K slots, P parents, C candidates, B children. Candidates may hang
on their parent: T is P then, and 1 elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dspark.engine.speculation.sampling_state import Kind, RoundState
from dspark.sampling.distribution import Sparse
from dspark.sampling.logits_processors import Known, token_distribution
from dspark.sampling.noise import gumbel

# Sharpness of perturbed scores as chances under `coupled` (docs/trees.md).
_COUPLED_SHARPNESS = 1.0


def draft_law(logits_MKPC: Tensor, tokens_MKTC: Tensor, state: RoundState) -> Tensor:
    """The draft distributions [M, K, P, C], float64: bias and filters, but no penalties.

    Penalties would make them hang on a whole path; those of the target count, and a draft is
    judged by what it was really drawn from.

    Args:
        logits_MKPC: of the candidates.
        tokens_MKTC: these, ascending.
        state: of the M requests.
    """
    requests, slots, parents, width = logits_MKPC.shape
    device = logits_MKPC.device
    index_N = torch.arange(requests, device=device).repeat_interleave(slots * parents)
    chain_N = replace(state.sampling.draft_chain, penalised=False).rows(index_N)
    tokens_NC = tokens_MKTC.expand(-1, -1, parents, -1).reshape(-1, width)
    known = Known(tokens_NC, state.sampling.vocab_size)
    found = token_distribution(logits_MKPC.reshape(-1, width), chain_N, None, None, known)
    law_NC = found.probs_NC
    if not (isinstance(found, Sparse) and found.tokens_NC is tokens_NC):
        law_NC = found.at(torch.arange(len(found), device=device), tokens_NC)
    return law_NC.double().view(requests, slots, parents, width)


def ranked_children(
    kind: Kind, logits_MKPC: Tensor, tokens_MKTC: Tensor, state: RoundState, slot: int, most: int
) -> tuple[Tensor, Tensor]:
    """The likeliest children, where a draft stays while it is the target's own token.

    Args:
        kind: of the requests: greedy, or coupled ones whose noise counts.
        logits_MKPC: of the candidates.
        tokens_MKTC: these, ascending.
        state: of the M requests.
        slot: the first of the slots.
        most: children of a node, B.

    Returns:
        Their chances [M, K, P, B], never rising, and their columns.
    """
    if kind.form == "greedy":
        chances_MKPC = logits_MKPC.softmax(dim=-1)
    else:
        _, slots, parents, width = tokens_MKTC.shape
        places_K = torch.arange(slot + 1, slot + slots + 1, device=tokens_MKTC.device)
        positions_MKT = (state.anchors_R[:, None] + places_K).repeat_interleave(parents, dim=1)
        seeds_N = state.sampling.seeds_R.repeat_interleave(slots * parents)
        noise_NC = gumbel(seeds_N, positions_MKT.flatten(), tokens_MKTC.reshape(-1, width))
        scores_MKPC = draft_law(logits_MKPC, tokens_MKTC, state).log()
        scores_MKPC = scores_MKPC + noise_NC.view(tokens_MKTC.shape)
        chances_MKPC = scores_MKPC.mul_(_COUPLED_SHARPNESS).softmax(dim=-1)
    best = chances_MKPC.topk(min(most, chances_MKPC.shape[-1]), dim=-1)
    return best.values.double(), best.indices
