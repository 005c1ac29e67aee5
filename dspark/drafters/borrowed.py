"""The target's embedding and output head, as a drafter uses them: references, never copies."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.base import BorrowedParts
from dspark.drafters.heads import at_least_fp32
from dspark.drafters.layers import Pack, Product, packed

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
        head: the head's product with packed weights, bias included; None where there is none.
        pack: packs weights as the target's are; None where those are plain.
    """

    embedding_VH: Tensor
    embedding_scale: float
    head_VH: Tensor
    head_bias_V: Tensor | None
    softcap: float | None
    head: Product | None = None
    pack: Pack | None = None

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
            head=parts.head,
            pack=parts.pack,
        )

    def reduced(self, ids: Tensor) -> Borrowed:
        """The same for the tokens `ids` [Vd] only, whose head may be here already."""
        head, bias = self.head_VH, self.head_bias_V
        return replace(
            self,
            head_VH=head if head.shape[0] == ids.numel() else head[ids],
            head=None,
            head_bias_V=None if bias is None else bias[ids],
        )

    def packed(self) -> Borrowed:
        """The same with a packed head, for decoding.

        Its values may be rounded, since drafts are verified. A head whose product is here
        already, or on weights that stay plain, is left as it is.
        """
        if self.pack is None or self.head is not None:
            return self
        return replace(self, head=packed(self.pack, self.head_VH, self.head_bias_V))

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embedding rows [.., H]."""
        rows = F.embedding(tokens, self.embedding_VH)
        return rows if self.embedding_scale == 1.0 else rows * self.embedding_scale

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [.., V], soft-capped, at least fp32."""
        hidden_NH = hidden_NH.to(self.head_VH.dtype)
        if self.head is None or (torch.is_grad_enabled() and hidden_NH.requires_grad):
            logits = F.linear(hidden_NH, self.head_VH, self.head_bias_V)
        else:
            logits = self.head(hidden_NH)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return at_least_fp32(logits)

    def logits_by_rows(self, hidden: Tensor) -> Tensor:
        """`logits` [.., V] of states [.., H], as one product of rows.

        Given a slice of more than two dimensions, torch multiplies batch by batch instead, and
        copies the head for it.
        """
        logits = self.logits(hidden.reshape(-1, hidden.shape[-1]))
        return logits.view(*hidden.shape[:-1], logits.shape[-1])


def own_table(own: Tensor | None, target: Tensor, name: str) -> Tensor | None:
    """A checkpoint's table where it differs from the target's (in the checkpoint's dtype).

    Logs a warning then, and returns it in the target's dtype; None where they are equal. A head of
    fewer rows, that of a reduced vocabulary, has no equal.
    """
    if own is None:
        return None
    if own.shape != target.shape:
        return own.to(device=target.device, dtype=target.dtype)
    if torch.equal(own.to(target.device), target.to(own.dtype)):
        return None
    logger.warning("The drafter's %s differs from the target's; the drafter keeps its own.", name)
    return own.to(device=target.device, dtype=target.dtype)
