"""What the engine asks of a drafter, and what a drafter borrows from its target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch


class BorrowedParts(Protocol):
    """The target's parts that a drafter refers to, never copies (`targets.TargetParts`).

    Attributes:
        embedding_VH: input embedding.
        embedding_scale: factor on an embedding row at lookup.
        head_VH: output head.
        head_bias_V: its bias, if it has one.
        logit_softcap: cap of the logits, `cap * tanh(logits / cap)`, if the target has one.
        vocab_size: number of columns of a row of logits.
        hidden_size: width H.
        final_norm_H: weight of the norm before the head, if it is a plain RMSNorm.
        head: the head's product with packed weights, bias included, if it has been packed.
        pack: packs weights as the target's are, if they are.
    """

    @property
    def embedding_VH(self) -> Tensor: ...
    @property
    def embedding_scale(self) -> float: ...
    @property
    def head_VH(self) -> Tensor: ...
    @property
    def head_bias_V(self) -> Tensor | None: ...
    @property
    def logit_softcap(self) -> float | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def final_norm_H(self) -> Tensor | None: ...
    @property
    def head(self) -> Callable[[Tensor], Tensor] | None: ...
    @property
    def pack(self) -> Callable[..., Callable[[Tensor], Tensor]] | None: ...


class Draw(Protocol):
    """Draws one draft token per request; supplied by the engine.

    It applies each request's processors to the logits, draws from that very distribution, and
    remembers token and distribution for verification.
    """

    def __call__(self, step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return the tokens [R] of draft `step` (0-based), drawn from the processed logits.

        Args:
            step: which draft.
            logits_RC: logits of all tokens, or of those named.
            tokens: int64 [C], or [R, C] for each request its own, in ascending order: the tokens
                that the columns are of, where they are not all; the others have probability 0.
        """
        ...


@dataclass(frozen=True)
class DraftBatch:
    """One round's question to the drafter.

    Attributes:
        tables: block table of each request; it has room for the drafter's `rows_ahead`.
        anchors_R: last committed token of each request, int64.
        lengths: context rows before the anchor, which is the anchor's position.
        tokens: every committed token of each request, prompt included, anchor last.
        num_drafts: how many tokens to draw, at most the drafter's block size.
        confidences: whether anyone reads the proposal's confidences; else they may be left out.
        depth: how many drafts a block is made for, at least `num_drafts`; None for all that the
            drafter knows. What is drafted may hang on it, so it follows from the schedule alone,
            never from who else is in the round.
    """

    tables: tuple[BlockTable, ...]
    anchors_R: Tensor
    lengths: tuple[int, ...]
    tokens: tuple[Sequence[int], ...]
    num_drafts: int
    confidences: bool = True
    depth: int | None = None


@dataclass(frozen=True)
class Proposal:
    """What a drafter says about the tokens it has just drawn.

    Attributes:
        confidence_logits_RK: logits of c_k, at least fp32, before any calibration, known before
            draft k is drawn. None when the drafter has no estimate of its own: the engine then
            takes the margin of its raw logits.
        are_margins: whether the engine did so; a margin orders drafts but is no log-odds.
        lengths: how many of the drawn tokens each request really proposes; None means all
            `num_drafts`. Draws past a request's length are to be ignored, and no draw happens
            past the largest length.
    """

    confidence_logits_RK: Tensor | None = None
    are_margins: bool = False
    lengths: tuple[int, ...] | None = None


class Drafter(Protocol):
    """Who proposes: bound once to a target's parts, it then sees features only.

    Attributes:
        block_size: most tokens it can propose in a round (K).
        taps: target layers whose features it reads; -1 is the embedding output.
        context_shapes: per layer, the cache that the engine keeps for it; empty for none.
        reads_next_token: whether the context row of token i is made with token i + 1. Such a row
            is stored where token i + 1 stands, at position i + 1, and position 0 stays empty: a
            page then depends only on tokens up to its own last one, and is right for every
            request that shares them.
        rows_ahead: how many rows behind the anchor's own position `propose` may write; the
            engine gives every table room for position `anchor + rows_ahead`.
    """

    @property
    def block_size(self) -> int: ...
    @property
    def taps(self) -> tuple[int, ...]: ...
    @property
    def context_shapes(self) -> tuple[CacheShape, ...]: ...
    @property
    def reads_next_token(self) -> bool: ...
    @property
    def rows_ahead(self) -> int: ...

    def bind(self, parts: BorrowedParts) -> None:
        """Borrow the target's embedding and head; refuse a target that does not fit."""
        ...

    def observe(
        self, context: PagedCache, batch: RaggedBatch, features_TF: Tensor, next_tokens_T: Tensor
    ) -> None:
        """Append the context rows of committed tokens.

        Args:
            context: where they go.
            batch: whose they are: tables and positions; its token ids are not read. A drafter
                that reads the next token writes one position further than the batch's last.
            features_TF: captured features of each token.
            next_tokens_T: the committed token after it, int64.
        """
        ...

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        """Draw the round's tokens, left to right, through `draw`."""
        ...
