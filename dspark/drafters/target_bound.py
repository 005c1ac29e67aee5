"""What every drafter with weights borrows from its target: embedding, head, vocabulary."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from dspark.drafters.base import BorrowedParts
from dspark.drafters.config import BackboneConfig
from dspark.drafters.heads import at_least_fp32
from dspark.drafters.layers import Pack, Product, RMSNorm, packed
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


class DrafterConfig(Protocol):
    """What any drafter's configuration says of its target."""

    @property
    def backbone(self) -> BackboneConfig: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def draft_vocab_size(self) -> int | None: ...
    @property
    def target_layer_ids(self) -> tuple[int, ...]: ...
    @property
    def num_target_layers(self) -> int: ...


ConfigT = TypeVar("ConfigT", bound=DrafterConfig)


class TargetBound(nn.Module, Generic[ConfigT]):
    """The part of a drafter that refers to its target; a drafter's first base class.

    Embedding and head belong to the target: `bind` refers to them, and they are neither
    parameters nor buffers. With a reduced vocabulary (`draft_vocab_size`) the head is a copy of
    some of the target's rows, and `d2t` [Vd] (token id minus draft id) and `t2d` [V] (which tokens
    are known) are buffers. Decoding uses fused copies of the weights, made by `prepare` or at the
    first round and dropped by `train()`, `eval()` and `load_state_dict`: call one of them after
    changing parameters in any other way.

    Attributes:
        config: what the drafter is.
        own_embedding_VH, own_head_VH: tables that came with a checkpoint and are not the target's.
        norm: the drafter's final norm.

    Args:
        config: what to build; the next base class, a backbone, is built from its `backbone`.
    """

    norm: RMSNorm
    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config.backbone)
        self.config = config
        self.own_embedding_VH: Tensor | None = None
        self.own_head_VH: Tensor | None = None
        self._borrowed: Borrowed | None = None
        self._target: Borrowed | None = None
        self._taught: Borrowed | None = None
        known, vocab = config.draft_vocab_size, config.vocab_size
        self.register_buffer("d2t", None if known is None else torch.zeros(known, dtype=torch.long))
        self.register_buffer("t2d", None if known is None else torch.zeros(vocab, dtype=torch.bool))
        self._draft_tokens: Tensor | None = None
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
        draft_tokens: Tensor | None = None,
    ) -> Self:
        """A new drafter in fp32, bound to its target.

        Args:
            parts: the target's parts.
            config: what to build.
            generator: source of the random weights (CPU).
            init_std: standard deviation of every matrix.
            copy_final_norm: start from the target's final norm, so that the borrowed head sees
                states of the scale that it knows.
            draft_tokens: the token ids [Vd] of a reduced vocabulary, ascending.

        Raises:
            CompatibilityError: the parts do not fit the configuration.
        """
        drafter = cls(config)
        drafter._know(draft_tokens)
        drafter.bind(parts)
        with torch.no_grad():
            for name, parameter in drafter.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, init_std, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
            if copy_final_norm and parts.final_norm_H is not None:
                drafter.norm.weight.copy_(parts.final_norm_H)
        return drafter.to(parts.embedding_VH.device)

    def _know(self, draft_tokens: Tensor | None) -> None:
        """Fill the two buffers of a reduced vocabulary."""
        if self.d2t is None or self.t2d is None:
            return
        if draft_tokens is None or draft_tokens.shape != self.d2t.shape:
            raise CompatibilityError(
                f"draft_vocab_size is {self.config.draft_vocab_size}, so draft_tokens must name as "
                "many token ids."
            )
        self.d2t.copy_(draft_tokens - torch.arange(draft_tokens.numel()))
        self.t2d[draft_tokens] = True

    def keeps_fp32(self, name: str) -> bool:  # noqa: ARG002
        """Whether a tensor of the state dict stays in fp32 whatever the dtype of the others."""
        return False

    @property
    def taps(self) -> tuple[int, ...]:
        """Captured target layers."""
        return self.config.target_layer_ids

    def bind(self, parts: BorrowedParts, *, num_target_layers: int | None = None) -> None:
        """Borrow the target's embedding and head.

        Copies that came with a checkpoint are dropped where they equal the target's (in the
        checkpoint's dtype). Where they differ the drafter keeps its own, since it was trained with
        them (the output stays the target's either way), and a warning is logged. Parameters are
        not changed; decoding runs in the embedding's dtype and on its device. Of the target's head
        only the rows of a reduced vocabulary are kept.

        Args:
            parts: the target's parts.
            num_target_layers: the target's decoder layers, to check the taps against.

        Raises:
            CompatibilityError: width, vocabulary or layers are not those of the drafter.
        """
        self._check_fit(parts, num_target_layers)
        target = Borrowed.of(parts)
        embedding = own_table(self.own_embedding_VH, target.embedding_VH, "embed_tokens.weight")
        head = own_table(self.own_head_VH, target.head_VH, "lm_head.weight")
        self._target, self._taught = target, None
        self._borrowed = replace(
            target,
            embedding_VH=target.embedding_VH if embedding is None else embedding,
            head_VH=target.head_VH if head is None else head,
            head=target.head if head is None else None,
        )
        self.own_embedding_VH, self.own_head_VH = embedding, head
        if self.d2t is not None:
            offsets = self.d2t.to(self._borrowed.head_VH.device)
            self._draft_tokens = offsets + torch.arange(offsets.numel(), device=offsets.device)
            self._borrowed = self._borrowed.reduced(self._draft_tokens)
            self.own_head_VH = self._borrowed.head_VH
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
        """Logits of the head, soft-capped, from states after the final norm.

        [.., V], or [.., Vd] with a reduced vocabulary: see `draft_tokens`.
        """
        return self.borrowed.logits_by_rows(hidden_NH)

    @property
    def draft_tokens(self) -> Tensor | None:
        """The tokens [Vd] that it knows, in ascending order; None for all."""
        return self._draft_tokens

    def over_drafts(self, logits: Tensor) -> Tensor:
        """Of logits [.., V] of all tokens those that it knows, [.., Vd]."""
        return logits if self._draft_tokens is None else logits[..., self._draft_tokens]

    def target_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [.., V] of the target's states after its final norm: the teacher.

        They differ from `base_logits` only where the drafter keeps a head of its own.

        Raises:
            CompatibilityError: the drafter is not bound.
        """
        return (self._target or self.borrowed).logits_by_rows(hidden_NH)

    def target_draft_logits(self, hidden_NH: Tensor) -> Tensor:
        """Of `target_logits` those of the tokens that it knows, [.., Vd].

        Raises:
            CompatibilityError: the drafter is not bound.
        """
        if self._draft_tokens is None:
            return self.target_logits(hidden_NH)
        if self._taught is None:  # at the first call, since training alone asks
            self._taught = (self._target or self.borrowed).reduced(self._draft_tokens)
        return self._taught.logits_by_rows(hidden_NH)

    def target_log_totals(self, hidden_NH: Tensor) -> Tensor:
        """What turns `target_draft_logits` into logarithms of probabilities, [..].

        The logarithm of each row's sum over all tokens, by the same plain head.

        Raises:
            CompatibilityError: the drafter is not bound.
        """
        plain = replace(self._target or self.borrowed, head=None)
        return plain.logits_by_rows(hidden_NH).logsumexp(-1)

    def prepare(self) -> None:
        """Fuse, and pack, the weights for decoding, unless they are."""
        self._decode_plan()

    @abstractmethod
    def _decode_plan(self) -> object:
        """The fused weights, made at the first call."""

    @abstractmethod
    def _drop_plan(self) -> None:
        """Forget the fused weights."""
