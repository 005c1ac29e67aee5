"""The DSpark drafter: parallel backbone, sequential head, confidence (docs/method.md, 2).

With `draft_top_k` N the drafts of a slot come from the N likeliest tokens of its base logits: the
sequential head then looks at N tokens in place of the vocabulary, and the distribution that is
reported is the one over these N, so verification stays exact.

With `markov_rank` 0 and no confidence head it is the authors' DFlash baseline.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dspark.attention.blocks import BlockContext
from dspark.attention.packed import BlockLayout
from dspark.attention.paged_cache import CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.backbone import BlockForward, ParallelBackbone
from dspark.drafters.base import DraftBatch, DrafterKind, Draw, Proposal
from dspark.drafters.config import DSparkConfig
from dspark.drafters.heads import (
    ConfidenceHead,
    MarkovHead,
    build_markov_head,
    confidence_of,
    converted,
    with_packed_bias,
)
from dspark.drafters.lattice import Lattice, build_lattice, check_head
from dspark.drafters.target_bound import Borrowed, TargetBound
from dspark.errors import CheckpointError, CompatibilityError

MASK_EMBEDDING = "mask_embedding.weight"


class DSparkDrafter(TargetBound[DSparkConfig], ParallelBackbone):
    """A DSpark drafter; its state dict is the published one without embedding and head.

    Attributes:
        draft_top_k: candidates of each slot; None for every token that the drafter knows.

    Args:
        config: what to build.
    """

    confidence_bias = True

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        width, vocab, rank = config.backbone.hidden_size, config.vocab_size, config.markov_rank
        self.markov_head: MarkovHead | None = None
        self.confidence_head: ConfidenceHead | None = None
        self.mask_embedding: nn.Embedding | None = None
        if rank > 0:
            self.markov_head = build_markov_head(
                config.markov_head_type, vocab, rank, width, config.draft_vocab_size
            )
        if config.confidence_head:
            read = rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(width, read, bias=self.confidence_bias)
        if config.mask_token_id is None:
            self.mask_embedding = nn.Embedding(1, width)
        self.draft_top_k: int | None = None
        self._plan: DecodePlan | None = None

    @property
    def block_size(self) -> int:
        """K, the most drafts of a round."""
        return self.config.num_drafts

    @property
    def context_shapes(self) -> tuple[CacheShape, ...]:
        """One cache layer per draft layer."""
        backbone = self.config.backbone
        shape = CacheShape(backbone.num_kv_heads, backbone.head_dim, backbone.head_dim)
        return (shape,) * backbone.num_layers

    @property
    def reads_next_token(self) -> bool:
        """A context row is made of its own token's features alone."""
        return False

    @property
    def rows_ahead(self) -> int:
        """The rows of a block never reach the cache."""
        return 0

    def _drop_plan(self) -> None:
        self._plan = None

    # Training

    def forward(
        self,
        features_TF: Tensor,
        context_positions_T: Tensor,
        anchor_tokens_M: Tensor,
        positions_MK: Tensor,
        layout: BlockLayout,
    ) -> Tensor:
        """Hidden states of packed blocks, for training (docs/method.md, 2.1).

        Args:
            features_TF: the target's captured features of all sequences, one after the other.
            context_positions_T: their positions.
            anchor_tokens_M: first input token of each block.
            positions_MK: position of the token before each draft: anchor + 0 .. K - 1.
            layout: which context rows each block sees (`AnchorBlocks.layout`).

        Returns:
            Hidden states [M, K, H], after the drafter's final norm, of the slots that predict the
            K drafts; `sample_from_anchor` false has one slot more, whose state is dropped.

        Raises:
            CompatibilityError: the layout is for another number of slots.
        """
        blocks = anchor_tokens_M.shape[0]
        slots, unused = self.config.block_size, self.config.unused_slots
        if layout.slots != slots:
            raise CompatibilityError(
                f"The layout is of blocks of {layout.slots} slots, but the drafter runs {slots}; "
                f"make it with slots={slots}."
            )
        if unused:
            positions_MK = torch.cat((positions_MK, positions_MK[..., -1:] + 1), dim=-1)
        dtype = self.fc.weight.dtype
        embedded = self.borrowed.embed(anchor_tokens_M).to(dtype).unsqueeze(1)
        masks = self._mask_slots(slots - 1).to(dtype).expand(blocks, -1, -1)
        hidden = self.run_blocks(
            features_TF.to(dtype),
            context_positions_T,
            torch.cat((embedded, masks), dim=1).flatten(0, 1),
            positions_MK.flatten(),
            layout,
        )
        return hidden.view(blocks, slots, hidden.shape[-1])[:, unused:]

    def head_states(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., H] as the output head reads them; other heads read them unchanged."""
        return hidden

    def confidence_logits(
        self,
        hidden_NH: Tensor,
        previous_N: Tensor,
        *,
        embedded_Nr: Tensor | None = None,
        detach_inputs: bool = False,
    ) -> Tensor | None:
        """Confidence logits [..], at least fp32, or None without such a head.

        Args:
            hidden_NH: hidden states of slots.
            previous_N: the token before each slot's draft.
            embedded_Nr: their Markov embeddings, where they have been looked up already.
            detach_inputs: let gradients reach the confidence head only.
        """
        heads = self.confidence_head, self.markov_head
        return confidence_of(*heads, hidden_NH, previous_N, embedded_Nr, detach=detach_inputs)

    def _mask_slots(self, count: int) -> Tensor:
        if self.mask_embedding is not None:
            return self.mask_embedding.weight.expand(count, -1)
        device = self.borrowed.embedding_VH.device
        mask = torch.tensor([self.config.mask_token_id], device=device)
        return self.borrowed.embed(mask).expand(count, -1)

    # Decoding

    @torch.no_grad()
    def observe(
        self,
        context: PagedCache,
        batch: RaggedBatch,
        features_TF: Tensor,
        next_tokens_T: Tensor,  # noqa: ARG002
    ) -> None:
        """Append context keys and values of committed tokens."""
        self._decode_plan().backbone.observe(context, batch, features_TF)

    @torch.no_grad()
    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        """One pass over the slots, then `num_drafts` draws from left to right.

        Slots behind `batch.depth` are left out. Earlier slots could attend to them, but acceptance
        hardly falls without them (docs/LOG.md), and drafting costs as much as its rows.
        """
        plan = self._decode_plan()
        hidden_RKH = self._slots_hidden(plan, context, batch)
        hidden_by_step = hidden_RKH.transpose(0, 1).contiguous()
        base_KRC = plan.borrowed.logits_by_rows(self.head_states(hidden_by_step))
        head, previous = plan.markov_head, batch.anchors_R
        tokens = [previous]
        if head is None:
            tokens += [draw(k, x, self.draft_tokens) for k, x in enumerate(base_KRC)]
        else:
            state = head.initial_state(hidden_RKH)
            slots = _Slots.of(base_KRC, self.draft_tokens, self.draft_top_k)
            for k in range(batch.num_drafts):
                feature_Rr, state = head.step(previous, hidden_by_step[k], state)
                previous = draw(k, slots.logits(k, head, feature_Rr), slots.tokens(k))
                tokens.append(previous)
        if plan.confidence_head is None or not batch.confidences:
            return Proposal()
        previous_RK = torch.stack(tokens[:-1], dim=1)
        return Proposal(confidence_of(plan.confidence_head, head, hidden_RKH, previous_RK))

    def check_lattice(self) -> None:
        """Refuse a head whose state is not the last token alone (`drafters.lattice`)."""
        check_head(self.markov_head)

    @torch.no_grad()
    def lattice(
        self, context: PagedCache, batch: DraftBatch, candidates: int, parents: int
    ) -> Lattice:
        """One pass over the slots, and the Markov head over the candidates of neighbouring slots.

        With `draft_top_k` a slot has no more candidates than that.
        """
        plan = self._decode_plan()
        hidden_KRH = self._slots_hidden(plan, context, batch).transpose(0, 1).contiguous()
        confidence = partial(confidence_of, plan.confidence_head, plan.markov_head)
        return build_lattice(
            plan.borrowed.logits_by_rows(self.head_states(hidden_KRH)),
            hidden_KRH,
            batch.anchors_R,
            min(candidates, self.draft_top_k or candidates),
            parents,
            plan.markov_head,
            confidence if batch.confidences else None,
            self.draft_tokens,
        )

    def _slots_hidden(self, plan: DecodePlan, context: PagedCache, batch: DraftBatch) -> Tensor:
        """Hidden states [R, num_drafts, H] of the slots that predict drafts."""
        hidden_RKH = self._block_hidden(plan, context, batch)
        return hidden_RKH.narrow(1, self.config.unused_slots, batch.num_drafts)

    def _block_hidden(self, plan: DecodePlan, context: PagedCache, batch: DraftBatch) -> Tensor:
        anchors_R1H = self.borrowed.embed(batch.anchors_R).unsqueeze(1)
        slots = self.config.unused_slots + (batch.depth or self.config.num_drafts)
        masks_RKH = plan.mask_1KH[:, : slots - 1].expand(len(batch.tables), -1, -1)
        x_RKH = torch.cat((anchors_R1H, masks_RKH), dim=1)
        return plan.backbone.hidden(context, BlockContext(batch.tables, batch.lengths), x_RKH)

    def _decode_plan(self) -> DecodePlan:
        if self._plan is None:
            like, pack = self.borrowed.embedding_VH, self.borrowed.pack
            # Even in inference mode these are plain tensors: some are the parameters themselves.
            with torch.inference_mode(False), torch.no_grad():
                markov_head = converted(self.markov_head, like)
                if pack is not None and markov_head is not None:
                    markov_head = with_packed_bias(markov_head, pack)
                self._plan = DecodePlan(
                    backbone=self.decoding(like, pack),
                    borrowed=self.borrowed.packed(),
                    markov_head=markov_head,
                    confidence_head=converted(self.confidence_head, like),
                    mask_1KH=self._mask_slots(self.config.block_size - 1).to(like).unsqueeze(0),
                )
        return self._plan


@dataclass(frozen=True)
class _Slots:
    """The base logits of a block, with the tokens that their columns stand for.

    Attributes:
        base_KRC: logits of all tokens that the drafter knows, or of each slot's candidates.
        columns_KRC: the columns of the candidates, ascending; None for all tokens.
        known_V: the tokens that the drafter knows, where they are not the whole vocabulary.
    """

    base_KRC: Tensor
    columns_KRC: Tensor | None
    known_V: Tensor | None

    @classmethod
    def of(cls, base_KRV: Tensor, known_V: Tensor | None, top_k: int | None) -> _Slots:
        if top_k is None or top_k >= base_KRV.shape[-1]:
            return cls(base_KRV, None, known_V)
        columns_KRC = base_KRV.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values
        return cls(base_KRV.gather(-1, columns_KRC), columns_KRC, known_V)

    def logits(self, step: int, head: MarkovHead, feature_Rr: Tensor) -> Tensor:
        """Logits [R, C] of a slot's draft, computed in place of its base logits."""
        if self.columns_KRC is None:
            return self.base_KRC[step].add_(head.bias(feature_Rr))
        return self.base_KRC[step].add_(head.bias_of(feature_Rr, self.columns_KRC[step]))

    def tokens(self, step: int) -> Tensor | None:
        """Tokens [C] or [R, C] of a slot's logits; None where they are the vocabulary."""
        if self.columns_KRC is None:
            return self.known_V
        columns_RC = self.columns_KRC[step]
        return columns_RC if self.known_V is None else self.known_V[columns_RC]


# What decoding computes once


@dataclass(frozen=True)
class DecodePlan:
    """A drafter made ready for decoding, in the dtype and on the device of the target's embedding.

    Attributes:
        backbone: copies of its weights, fused, and packed where the target's are.
        borrowed: embedding and head; a head of the drafter's own is packed likewise.
        markov_head: the drafter's own module, or a copy: in another dtype, on another device, or
            with its second table packed.
        confidence_head: the drafter's own module, or a copy in another dtype or on another device.
        mask_1KH: input embeddings of the slots after the anchor, [1, block_size - 1, H].
    """

    backbone: BlockForward
    borrowed: Borrowed
    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None
    mask_1KH: Tensor


def _build(config: DSparkConfig, names: Set[str], where: str) -> DSparkDrafter:
    drafter = DSparkDrafter(config)
    if MASK_EMBEDDING in names and drafter.mask_embedding is None:
        drafter.mask_embedding = nn.Embedding(1, config.backbone.hidden_size)
    if MASK_EMBEDDING not in names and drafter.mask_embedding is not None:
        raise CheckpointError(
            f"{where} has no mask_token_id and the weights no {MASK_EMBEDDING}; "
            "one of them must say what fills a block."
        )
    return drafter


KIND = DrafterKind(drafter=DSparkDrafter, config=DSparkConfig, build=_build)
