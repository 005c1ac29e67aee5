"""The target's embedding and output head, as a drafter uses them: references, never copies."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.base import BorrowedParts
from dspark.drafters.heads import at_least_fp32
from dspark.errors import CompatibilityError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Borrowed:
    """An embedding and a head.

    Attributes:
        embedding_VH: input embedding.
        embedding_scale: factor on its rows, rounded to its dtype as the target does.
        head_VH: output head.
        head_bias_V: its bias, if any.
        softcap: cap of the logits, if any.
    """

    embedding_VH: Tensor
    embedding_scale: float
    head_VH: Tensor
    head_bias_V: Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, parts: BorrowedParts) -> Borrowed:
        """The target's own."""
        scale = torch.tensor(parts.embedding_scale, dtype=parts.embedding_VH.dtype)
        return cls(
            embedding_VH=parts.embedding_VH,
            embedding_scale=float(scale),
            head_VH=parts.head_VH,
            head_bias_V=parts.head_bias_V,
            softcap=parts.logit_softcap,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embedding rows [.., H]."""
        rows = F.embedding(tokens, self.embedding_VH)
        return rows if self.embedding_scale == 1.0 else rows * self.embedding_scale

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [.., V], soft-capped, at least fp32."""
        logits = F.linear(hidden_NH.to(self.head_VH.dtype), self.head_VH, self.head_bias_V)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return at_least_fp32(logits)


@dataclass(frozen=True)
class Loan:
    """What a drafter that has been bound holds of its target.

    Attributes:
        target: the target's own tables.
        used: what the drafter reads: the target's, or its own where they differ.
        own_embedding_VH: its own embedding, where it differs from the target's.
        own_head_VH: its own head, likewise.
    """

    target: Borrowed
    used: Borrowed
    own_embedding_VH: Tensor | None
    own_head_VH: Tensor | None


def borrow(
    parts: BorrowedParts,
    *,
    hidden_size: int,
    vocab_size: int,
    taps: tuple[int, ...],
    num_target_layers: int | None,
    own_embedding_VH: Tensor | None,
    own_head_VH: Tensor | None,
) -> Loan:
    """Refer to a target's tables, after checking that the drafter fits it.

    A drafter's own tables are dropped where they equal the target's (in the checkpoint's dtype).
    Where they differ it keeps them, since it was trained with them (the output stays the target's
    either way), and a warning is logged.

    Args:
        parts: the target's parts.
        hidden_size: the drafter's width.
        vocab_size: the drafter's vocabulary.
        taps: captured layers, ascending.
        num_target_layers: the target's decoder layers, to check the taps against.
        own_embedding_VH: an embedding that came with the drafter's checkpoint.
        own_head_VH: a head, likewise.

    Raises:
        CompatibilityError: width, vocabulary or layers are not those of the drafter.
    """
    if parts.hidden_size != hidden_size:
        raise CompatibilityError(
            f"The drafter's hidden_size is {hidden_size}, but the target's is {parts.hidden_size}; "
            "use a drafter made for this target."
        )
    if parts.vocab_size != vocab_size:
        raise CompatibilityError(
            f"The drafter's vocab_size is {vocab_size}, but the target's is "
            f"{parts.vocab_size}; use a drafter made for this target."
        )
    if num_target_layers is not None and taps[-1] >= num_target_layers:
        raise CompatibilityError(
            f"The drafter reads target_layer_ids {list(taps)}, but the "
            f"target has {num_target_layers} layers; use a drafter made for this target."
        )
    target = Borrowed.of(parts)
    embedding = own_table(own_embedding_VH, target.embedding_VH, "embed_tokens.weight")
    head = own_table(own_head_VH, target.head_VH, "lm_head.weight")
    used = replace(
        target,
        embedding_VH=target.embedding_VH if embedding is None else embedding,
        head_VH=target.head_VH if head is None else head,
    )
    return Loan(target, used, embedding, head)


def own_table(own: Tensor | None, target: Tensor, name: str) -> Tensor | None:
    """A checkpoint's table where it differs from the target's (in the checkpoint's dtype).

    Logs a warning then, and returns it in the target's dtype; None where they are equal.
    """
    if own is None:
        return None
    same_shape = own.shape == target.shape
    if same_shape and torch.equal(own.to(target.device), target.to(own.dtype)):
        return None
    logger.warning("The drafter's %s differs from the target's; the drafter keeps its own.", name)
    return own.to(device=target.device, dtype=target.dtype)
