"""What the engine asks of a drafter, what one borrows from its target, and how kinds are declared.

A kind of drafter and a checkpoint layout declare themselves; an installed package adds one by an
entry point, whose value is a `DrafterKind` (group `dspark.drafters`) or a `Layout` (group
`dspark.checkpoints`); docs/adding_a_family.md shows both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import DSparkWarning, first_line


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


@runtime_checkable
class Preparing(Protocol):
    """A drafter whose weights are laid out once for decoding: best before anybody waits."""

    def prepare(self) -> None:
        """Lay the weights out, unless they are."""
        ...


Level = Sequence[Sequence[tuple[int, int]]]
"""Per request the nodes of a level of its tree: (row of the parent in the level before, token)."""


class Expand(Protocol):
    """Chooses the nodes of draft trees that are drafted behind; supplied by the engine."""

    def __call__(self, logits_NC: Tensor, tokens: Tensor | None = None) -> Level:
        """The next level's nodes, which may be none.

        Args:
            logits_NC: what may follow each node of this level, request by request and in the order
                in which it was given; in the first level each request has one row, its anchor's.
            tokens: as in `Draw`.
        """
        ...


@runtime_checkable
class LevelDrafter(Protocol):
    """A drafter of trees that runs once per level, over the nodes that the engine chooses."""

    def check_levels(self) -> None:
        """Refuse a drafter that makes all its rows in one pass."""
        ...

    def levels(self, context: PagedCache, batch: DraftBatch, expand: Expand) -> None:
        """Draft trees level by level through `expand`, until it names no nodes.

        The nodes' rows are written behind the anchor's, all levels one after the other.
        """
        ...


Reader = Callable[[Mapping[str, Any], str], Any]
"""(parsed config.json, what to call it in errors) -> the configuration of a kind of drafter"""
Writer = Callable[[Any, str], dict[str, Any]]
"""(drafter, dtype of its stored weights) -> config.json; refuses what the layout cannot carry"""
T = TypeVar("T")
DRAFTERS, CHECKPOINTS = "dspark.drafters", "dspark.checkpoints"


@dataclass(frozen=True)
class DrafterKind:
    """A kind of drafter. One without weights has `create`, one with weights all the others.

    Attributes:
        create: makes one for `--draft NAME`, NAME being that of the entry point.
        drafter: the type of its module, a `target_bound.TargetBound`.
        config: the type of its configuration, by which a file is known to hold one.
        build: (configuration, names of the file's tensors, what to call it in errors) -> an empty
            module.
        readers: by architecture, those that no layout reads.
        write: its config.json in full, for the attached layout.
        renamed: other beginnings of tensors' names that are read, each with the usual one.
    """

    create: Callable[[], Drafter] | None = None
    drafter: type[nn.Module] | None = None
    config: type | None = None
    build: Callable[[Any, Set[str], str], Any] | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict)
    write: Writer | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A layout of checkpoint directories: config.json and safetensors.

    Attributes:
        readers: by the architecture that config.json names.
        writers: by the drafter's type.
        renamed: other beginnings of tensors' names that are read, each with the usual one.
        holds_tables: embedding and head are written too.
        prefix: begins the names of the drafter's tensors in files that hold others beside them.
        unpack: (parsed config.json, the file's tensors, what to call it in errors) -> the module's
            tensors, where more than beginnings of names differ.
        pack: (config.json, the module's tensors) -> those of the file.
    """

    readers: Mapping[str, Reader] = field(default_factory=dict)
    writers: Mapping[type[nn.Module], Writer] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    holds_tables: bool = True
    prefix: str = ""
    unpack: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], dict[str, Tensor]] | None = (
        None
    )
    pack: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def plugins(group: str, kind: type[T]) -> dict[str, T]:
    """What installed packages register in a group, by name.

    One that cannot be loaded is left out with a warning.
    """
    found: dict[str, T] = {}
    for entry in entry_points(group=group):
        try:
            value, reason = entry.load(), ""
        except Exception as error:  # whatever another package raises
            value, reason = None, f" ({first_line(error)})"
        if isinstance(value, kind):
            found[entry.name] = value
        else:
            warnings.warn(
                DSparkWarning(
                    f"The plug-in {entry.name} of {group} is left out: {entry.value} is no "
                    f"{kind.__name__}{reason}; update or remove its package."
                ),
                stacklevel=2,
            )
    return found
