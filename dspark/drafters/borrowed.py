"""The target's embedding and output head, as a drafter uses them: references, never copies."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.base import BorrowedParts
from dspark.drafters.config import BackboneConfig
from dspark.drafters.heads import at_least_fp32
from dspark.drafters.layers import RMSNorm
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

    def reduced(self, ids: Tensor) -> Borrowed:
        """The same for the tokens `ids` [Vd] only, whose head may be here already."""
        head, bias = self.head_VH, self.head_bias_V
        return replace(
            self,
            head_VH=head if head.shape[0] == ids.numel() else head[ids],
            head_bias_V=None if bias is None else bias[ids],
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


class DrafterConfig(Protocol):
    """What any drafter's configuration says of its target."""

    @property
    def backbone(self) -> BackboneConfig: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def target_layer_ids(self) -> tuple[int, ...]: ...


ConfigT = TypeVar("ConfigT", bound=DrafterConfig)


class TargetBound(nn.Module, Generic[ConfigT]):
    """The part of a drafter that refers to its target; a drafter's first base class.

    Embedding and head belong to the target: `bind` refers to them, and they are neither
    parameters nor buffers. Decoding uses fused copies of the weights, made at the first round and
    dropped by `train()`, `eval()` and `load_state_dict`: call one of them after changing
    parameters in any other way.

    Attributes:
        config: what the drafter is.
        own_embedding_VH, own_head_VH: tables that came with a checkpoint and are not the target's.
        norm: the drafter's final norm.

    Args:
        config: what to build; the next base class, a backbone, is built from its `backbone`.
    """

    norm: RMSNorm

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config.backbone)
        self.config = config
        self.own_embedding_VH: Tensor | None = None
        self.own_head_VH: Tensor | None = None
        self._borrowed: Borrowed | None = None
        self._target: Borrowed | None = None
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda *_: self._drop_plan()
        )

    @classmethod
    def from_target(
        cls,
        parts: BorrowedParts,
        config: ConfigT,
        *,
        generator: torch.Generator,
        init_std: float = 0.02,
        copy_final_norm: bool = True,
    ) -> Self:
        """A new drafter in fp32, bound to its target.

        Args:
            parts: the target's parts.
            config: what to build.
            generator: source of the random weights (CPU).
            init_std: standard deviation of every matrix.
            copy_final_norm: start from the target's final norm, so that the borrowed head sees
                states of the scale that it knows (BASELINE.md).

        Raises:
            CompatibilityError: the parts do not fit the configuration.
        """
        drafter = cls(config)
        drafter._start(parts, generator, init_std, copy_final_norm=copy_final_norm)
        return drafter

    def _start(
        self,
        parts: BorrowedParts,
        generator: torch.Generator,
        init_std: float,
        *,
        copy_final_norm: bool,
    ) -> None:
        """Bind and fill with random weights, on the target's device."""
        self.bind(parts)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, init_std, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
            if copy_final_norm and parts.final_norm_H is not None:
                self.norm.weight.copy_(parts.final_norm_H)
        self.to(parts.embedding_VH.device)

    @property
    def taps(self) -> tuple[int, ...]:
        """Captured target layers."""
        return self.config.target_layer_ids

    def bind(self, parts: BorrowedParts, *, num_target_layers: int | None = None) -> None:
        """Borrow the target's embedding and head.

        Copies that came with a checkpoint are dropped where they equal the target's (in the
        checkpoint's dtype). Where they differ the drafter keeps its own, since it was trained with
        them (the output stays the target's either way), and a warning is logged. Parameters are
        not changed; decoding runs in the embedding's dtype and on its device.

        Args:
            parts: the target's parts.
            num_target_layers: the target's decoder layers, to check the taps against.

        Raises:
            CompatibilityError: width, vocabulary or layers are not those of the drafter.
        """
        self._check_fit(parts, num_target_layers)
        target = Borrowed.of(parts)
        embedding = _own_table(self.own_embedding_VH, target.embedding_VH, "embed_tokens.weight")
        head = _own_table(self.own_head_VH, target.head_VH, "lm_head.weight")
        self._target = target
        self._borrowed = replace(
            target,
            embedding_VH=target.embedding_VH if embedding is None else embedding,
            head_VH=target.head_VH if head is None else head,
        )
        self.own_embedding_VH, self.own_head_VH = embedding, head
        self._drop_plan()

    def _check_fit(self, parts: BorrowedParts, num_target_layers: int | None) -> None:
        width, vocab_size = self.config.backbone.hidden_size, self.config.vocab_size
        if parts.hidden_size != width:
            raise CompatibilityError(
                f"The drafter's hidden_size is {width}, but the target's is {parts.hidden_size}; "
                "use a drafter made for this target."
            )
        if parts.vocab_size != vocab_size:
            raise CompatibilityError(
                f"The drafter's vocab_size is {vocab_size}, but the target's is "
                f"{parts.vocab_size}; use a drafter made for this target."
            )
        if num_target_layers is not None and self.taps[-1] >= num_target_layers:
            raise CompatibilityError(
                f"The drafter reads target_layer_ids {list(self.taps)}, but the "
                f"target has {num_target_layers} layers; use a drafter made for this target."
            )

    @property
    def borrowed(self) -> Borrowed:
        """Embedding and head in use.

        Raises:
            CompatibilityError: the drafter is not bound.
        """
        if self._borrowed is None:
            raise CompatibilityError(
                "The drafter has no embedding and head yet; call bind(target.parts()) first."
            )
        return self._borrowed

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; either way fused weights are made anew."""
        self._drop_plan()
        super().train(mode)
        return self

    def base_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [.., V] of the borrowed head, soft-capped, from states after the final norm."""
        return self.borrowed.logits(hidden_NH)

    def target_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [.., V] of the target's states after its final norm: the teacher.

        They differ from `base_logits` only where the drafter keeps a head of its own.

        Raises:
            CompatibilityError: the drafter is not bound.
        """
        return (self._target or self.borrowed).logits(hidden_NH)

    @abstractmethod
    def _drop_plan(self) -> None:
        """Forget the fused weights."""


def _own_table(own: Tensor | None, target: Tensor, name: str) -> Tensor | None:
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
