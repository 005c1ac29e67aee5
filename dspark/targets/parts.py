"""What a target gives: the result of a forward, and the parts that drafters borrow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TargetOutput:
    """Result of one forward over T tokens.

    Attributes:
        hidden_TH: hidden states after the final norm.
        logits_NV: logits of the rows that were asked for, None if none were.
        features_TF: captured layers, concatenated in the order asked for, None if none were.
    """

    hidden_TH: Tensor
    logits_NV: Tensor | None
    features_TF: Tensor | None


@dataclass(frozen=True)
class TargetParts:
    """What a drafter borrows from its target; nothing is copied.

    Attributes:
        embedding_VH: input embedding, without its scale.
        embedding_scale: number that looked-up embeddings are multiplied by.
        head_VH: output head.
        head_bias_V: bias of the head, None where it has none.
        logit_softcap: logits become `cap * tanh(logits / cap)`; None for no cap.
        vocab_size: number of rows of the head.
        hidden_size: width H.
        final_norm_H: what the final norm multiplies by; None where it is not a plain scale.
        head: the head's product with packed weights, bias included, soft cap not; no gradient
            passes it. None where there is none.
        pack: lays weights [outputs, inputs] that read the same input out as the target's are, and
            returns their product; None where the target's are plain.
    """

    embedding_VH: Tensor
    embedding_scale: float
    head_VH: Tensor
    head_bias_V: Tensor | None
    logit_softcap: float | None
    vocab_size: int
    hidden_size: int
    final_norm_H: Tensor | None
    head: Callable[[Tensor], Tensor] | None = None
    pack: Callable[..., Callable[[Tensor], Tensor]] | None = None
