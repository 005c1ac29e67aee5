"""Markov and confidence heads: the sequential stage of a DSpark drafter (docs/method.md, 2).

Every Markov head turns the previous token, and maybe the slot's hidden state, into a feature u of
width r, and adds u W2^T to the backbone's logits (eqs. 4-6). It has two forms that must agree:
`step`, with the state passed explicitly, for drafting, and `block`, teacher forced, for training.
Letters: M blocks, K slots, r rank, H width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.layers import Pack, packed
from dspark.errors import CompatibilityError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
MarkovKind = Literal["vanilla", "gated", "rnn"]
MARKOV_KINDS: tuple[MarkovKind, ...] = get_args(MarkovKind)


class MarkovHead(nn.Module):
    """Vanilla head: the feature is the previous token's embedding, u = W1[x] (eq. 5).

    Args:
        vocab_size: V.
        rank: r.
        hidden_size: H, unused by the vanilla head.
        draft_vocab_size: tokens that the bias is for, where the drafter knows only some of the V.
    """

    def __init__(
        self,
        vocab_size: int,
        rank: int,
        hidden_size: int,  # noqa: ARG002
        draft_vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size or vocab_size, bias=False)

    def initial_state(self, hidden_RH: Tensor) -> Tensor | None:  # noqa: ARG002
        """State before the first draft; None for heads that have none."""
        return None

    def step(
        self,
        previous_R: Tensor,
        hidden_RH: Tensor,  # noqa: ARG002
        state_Rr: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Feature [R, r] of the next slot, and the state after it."""
        return F.embedding(previous_R, self.markov_w1.weight), state_Rr

    def block(self, previous_MK: Tensor, hidden_MKH: Tensor) -> Tensor:  # noqa: ARG002
        """Features [M, K, r] of whole blocks whose previous tokens are given."""
        return F.embedding(previous_MK, self.markov_w1.weight)

    def bias(self, feature_Nr: Tensor) -> Tensor:
        """Bias [..., V] that a feature adds to the logits of the tokens that the drafter knows."""
        return F.linear(feature_Nr, self.markov_w2.weight)

    def bias_of(self, feature_Rr: Tensor, columns_RN: Tensor) -> Tensor:
        """Columns [R, N] of the bias, each request's own; only their rows of W2 are read."""
        rows_RNr = F.embedding(columns_RN, self.markov_w2.weight)
        return torch.matmul(rows_RNr, feature_Rr.unsqueeze(-1)).squeeze(-1)


class GatedHead(MarkovHead):
    """Gated head: u = g * e, g = sigmoid(W [h; e]), e = W1[x] (of the published code)."""

    def __init__(
        self, vocab_size: int, rank: int, hidden_size: int, draft_vocab_size: int | None = None
    ) -> None:
        super().__init__(vocab_size, rank, hidden_size, draft_vocab_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(
        self, previous_R: Tensor, hidden_RH: Tensor, state_Rr: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.block(previous_R, hidden_RH), state_Rr

    def block(self, previous_MK: Tensor, hidden_MKH: Tensor) -> Tensor:
        embedded = F.embedding(previous_MK, self.markov_w1.weight)
        gate = torch.sigmoid(self.gate_proj(torch.cat((hidden_MKH, embedded), dim=-1)))
        return gate * embedded


class RnnHead(MarkovHead):
    """RNN head: z = [s; e; h], (g, c, o) = W z, s' = sig(g) s + (1 - sig(g)) tanh(c), u = tanh(o).

    The state s starts at zero with the block (eq. 6, with the published code's bias).
    """

    def __init__(
        self, vocab_size: int, rank: int, hidden_size: int, draft_vocab_size: int | None = None
    ) -> None:
        super().__init__(vocab_size, rank, hidden_size, draft_vocab_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def initial_state(self, hidden_RH: Tensor) -> Tensor | None:
        return hidden_RH.new_zeros(hidden_RH.shape[0], self.rank)

    def step(
        self, previous_R: Tensor, hidden_RH: Tensor, state_Rr: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if state_Rr is None:
            state_Rr = self.initial_state(hidden_RH)
        assert state_Rr is not None
        embedded = F.embedding(previous_R, self.markov_w1.weight)
        joint = self.joint_proj(torch.cat((state_Rr, embedded, hidden_RH), dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state_Rr + (1 - keep) * torch.tanh(candidate)

    def block(self, previous_MK: Tensor, hidden_MKH: Tensor) -> Tensor:
        state = self.initial_state(hidden_MKH)
        features = []
        for k in range(previous_MK.shape[1]):
            feature, state = self.step(previous_MK[:, k], hidden_MKH[:, k], state)
            features.append(feature)
        return torch.stack(features, dim=1)


class ConfidenceHead(nn.Module):
    """Chance that draft k survives given that those before it did, as a logit (eq. 7).

    Args:
        hidden_size: H.
        markov_rank: r when the head also reads the previous token's Markov embedding, else 0.
        bias: whether it has a bias.
    """

    def __init__(self, hidden_size: int, markov_rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.with_markov = markov_rank > 0
        self.proj = nn.Linear(hidden_size + markov_rank, 1, bias=bias)

    def forward(self, hidden_NH: Tensor, embedded_Nr: Tensor | None) -> Tensor:
        """Logits [...] of c, at least fp32; `embedded_Nr` is W1[previous], if read."""
        inputs = hidden_NH
        if self.with_markov:
            assert embedded_Nr is not None
            inputs = torch.cat((hidden_NH, embedded_Nr), dim=-1)
        own: Tensor | None = self.proj.bias
        bias = None if own is None else at_least_fp32(own)
        return F.linear(at_least_fp32(inputs), at_least_fp32(self.proj.weight), bias).squeeze(-1)


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor, in fp32 if it had a shorter dtype."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def build_markov_head(
    kind: str, vocab_size: int, rank: int, hidden_size: int, draft_vocab_size: int | None = None
) -> MarkovHead:
    """The head of that name.

    Raises:
        CompatibilityError: the kind is unknown.
    """
    heads = {"vanilla": MarkovHead, "gated": GatedHead, "rnn": RnnHead}
    if kind not in heads:
        raise CompatibilityError(
            f"markov_head_type is {kind!r}, but only {', '.join(MARKOV_KINDS)} are known."
        )
    return heads[kind](vocab_size, rank, hidden_size, draft_vocab_size)


def confidence_of(
    head: ConfidenceHead | None,
    markov: MarkovHead | None,
    hidden: Tensor,
    previous: Tensor,
    embedded: Tensor | None = None,
    *,
    detach: bool = False,
) -> Tensor | None:
    """Confidence logits [..] of drafts, at least fp32, or None without a confidence head.

    Args:
        head: the confidence head, if any.
        markov: whose embeddings of previous tokens the confidence head may read.
        hidden: hidden states [.., H] of the drafts' slots.
        previous: the token [..] before each draft.
        embedded: their Markov embeddings [.., r], where they have been looked up already.
        detach: let gradients reach the confidence head only.
    """
    if head is None:
        return None
    if head.with_markov and markov is not None and embedded is None:
        embedded = F.embedding(previous, markov.markov_w1.weight)
    if detach:
        hidden, embedded = hidden.detach(), None if embedded is None else embedded.detach()
    logits: Tensor = head(hidden, embedded)
    return logits


def with_packed_bias(head: MarkovHead, pack: Pack) -> MarkovHead:
    """A copy that shares all parameters, with the second table laid out for the CPU's kernels."""
    head = copy.copy(head)
    # An attribute of the instance, which hides the class's method.
    vars(head)["bias"] = packed(pack, head.markov_w2.weight)
    return head


def converted(module: ModuleT | None, like: Tensor) -> ModuleT | None:
    """The module if it has the dtype and device of `like`, else a copy that has."""
    if module is None or all(
        p.dtype == like.dtype and p.device == like.device for p in module.parameters()
    ):
        return module
    return copy.deepcopy(module).to(device=like.device, dtype=like.dtype)
