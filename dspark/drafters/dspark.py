"""The DSpark drafter: parallel backbone, sequential head, confidence (METHOD.md 2).

With `markov_rank` 0 and no confidence head it is the authors' DFlash baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.attention.backends import block_attention
from dspark.attention.slots import CacheShape, SlotCache
from dspark.drafters.backbone import AttentionTile, ParallelBackbone
from dspark.drafters.base import BorrowedParts, DraftBatch, Draw, Proposal
from dspark.drafters.borrowed import Borrowed, borrow
from dspark.drafters.config import DSparkConfig
from dspark.drafters.decoding import DecodePlan
from dspark.drafters.heads import ConfidenceHead, MarkovHead, build_markov_head
from dspark.errors import CompatibilityError


class DSparkDrafter(ParallelBackbone):
    """A drafter as a module; its state dict is the published one without embedding and head.

    Embedding and head belong to the target: `bind` refers to them, and they are neither
    parameters nor buffers. Decoding uses fused copies of the weights, made at the first round and
    dropped by `train()`, `eval()` and `load_state_dict`: call one of them after changing
    parameters in any other way.

    Args:
        config: what to build.
    """

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config.backbone)
        self.config = config
        width, vocab, rank = config.backbone.hidden_size, config.vocab_size, config.markov_rank
        self.markov_head: MarkovHead | None = None
        self.confidence_head: ConfidenceHead | None = None
        self.mask_embedding: nn.Embedding | None = None
        if rank > 0:
            self.markov_head = build_markov_head(config.markov_head_type, vocab, rank, width)
        if config.confidence_head:
            read = rank if config.confidence_head_with_markov else 0
            self.confidence_head = ConfidenceHead(width, read)
        if config.mask_token_id is None:
            self.mask_embedding = nn.Embedding(1, width)
        self.own_embedding_VH: Tensor | None = None
        self.own_head_VH: Tensor | None = None
        self._borrowed: Borrowed | None = None
        self._target: Borrowed | None = None
        self._plan: DecodePlan | None = None
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda *_: self._drop_plan()
        )

    @classmethod
    def from_target(
        cls,
        parts: BorrowedParts,
        config: DSparkConfig,
        *,
        generator: torch.Generator,
        init_std: float = 0.02,
        copy_final_norm: bool = True,
    ) -> DSparkDrafter:
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

    @property
    def block_size(self) -> int:
        """K: most tokens of a round; the backbone always runs all K slots."""
        return self.config.block_size

    @property
    def taps(self) -> tuple[int, ...]:
        """Captured target layers."""
        return self.config.target_layer_ids

    @property
    def context_shapes(self) -> tuple[CacheShape, ...]:
        """One cache layer per draft layer."""
        backbone = self.config.backbone
        shape = CacheShape(backbone.num_kv_heads, backbone.head_dim, backbone.head_dim)
        return (shape,) * backbone.num_layers

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
        loan = borrow(
            parts,
            hidden_size=self.config.backbone.hidden_size,
            vocab_size=self.config.vocab_size,
            taps=self.taps,
            num_target_layers=num_target_layers,
            own_embedding_VH=self.own_embedding_VH,
            own_head_VH=self.own_head_VH,
        )
        self._target, self._borrowed = loan.target, loan.used
        self.own_embedding_VH, self.own_head_VH = loan.own_embedding_VH, loan.own_head_VH
        self._drop_plan()

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

    def train(self, mode: bool = True) -> DSparkDrafter:
        """Switch between training and evaluation; either way fused weights are made anew."""
        self._drop_plan()
        super().train(mode)
        return self

    def _drop_plan(self) -> None:
        self._plan = None

    # Training

    def forward(
        self,
        features_BSF: Tensor,
        anchor_tokens_BN: Tensor,
        positions_BNK: Tensor,
        tiles: Sequence[AttentionTile],
    ) -> Tensor:
        """Hidden states of packed blocks, for training (FORMAT_FACTS.md A.5).

        Args:
            features_BSF: the target's captured features.
            anchor_tokens_BN: first input token of each block.
            positions_BNK: position of each slot.
            tiles: what the Q = N K slots may look at (`training.anchors.attention_tiles`).

        Returns:
            Hidden states [B, N, K, H] after the drafter's final norm.
        """
        batch, anchors, block = positions_BNK.shape
        dtype = self.fc.weight.dtype
        embedded = self.borrowed.embed(anchor_tokens_BN).to(dtype).unsqueeze(2)
        masks = self._mask_slots(block - 1).to(dtype).expand(batch, anchors, -1, -1)
        hidden = self.run_blocks(
            features_BSF.to(dtype),
            torch.cat((embedded, masks), dim=2).flatten(1, 2),
            positions_BNK.flatten(1),
            tiles,
        )
        return hidden.view(batch, anchors, block, -1)

    def base_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [.., V] of the borrowed head, soft-capped, before any Markov bias."""
        return self.borrowed.logits(hidden_NH)

    def target_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [.., V] of the target's states after its final norm: the teacher.

        They differ from `base_logits` only where the drafter keeps a head of its own.

        Raises:
            CompatibilityError: the drafter is not bound.
        """
        return (self._target or self.borrowed).logits(hidden_NH)

    def confidence_logits(
        self, hidden_NH: Tensor, previous_N: Tensor, *, detach_inputs: bool = False
    ) -> Tensor | None:
        """Confidence logits [..], at least fp32, or None without such a head.

        Args:
            hidden_NH: hidden states of slots.
            previous_N: the token before each slot's draft.
            detach_inputs: let gradients reach the confidence head only.
        """
        hidden = hidden_NH.detach() if detach_inputs else hidden_NH
        return _confidence(
            self.confidence_head, self.markov_head, hidden, previous_N, detach=detach_inputs
        )

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
        context: SlotCache,
        slots_T: Tensor,
        positions_T: Tensor,
        features_TF: Tensor,
        next_tokens_T: Tensor,  # noqa: ARG002
    ) -> None:
        """Append context keys and values of committed tokens."""
        plan = self._decode_plan(context)
        rows = plan.weights.context(features_TF, plan.rotary_table[positions_T])
        for layer, (key_TGD, value_TGD) in enumerate(rows):
            context.write(layer, slots_T, positions_T, key_TGD, value_TGD)

    @torch.no_grad()
    def propose(self, context: SlotCache, batch: DraftBatch, draw: Draw) -> Proposal:
        """One pass over all K slots, then `num_drafts` draws from left to right."""
        plan = self._decode_plan(context)
        hidden_RKH = self._block_hidden(plan, context, batch)[:, : batch.num_drafts]
        logits_by_step = self.base_logits(hidden_RKH).unbind(1)
        head, previous = plan.markov_head, batch.anchors_R
        tokens = [previous]
        if head is None:
            tokens += [draw(k, logits_RV) for k, logits_RV in enumerate(logits_by_step)]
        else:
            state = head.initial_state(hidden_RKH)
            hidden_by_step = hidden_RKH.unbind(1)
            for k, logits_RV in enumerate(logits_by_step):
                feature_Rr, state = head.step(previous, hidden_by_step[k], state)
                previous = draw(k, logits_RV + head.bias(feature_Rr))
                tokens.append(previous)
        if plan.confidence_head is None:
            return Proposal()
        previous_RK = torch.stack(tokens[:-1], dim=1)
        return Proposal(_confidence(plan.confidence_head, head, hidden_RKH, previous_RK))

    def _block_hidden(self, plan: DecodePlan, context: SlotCache, batch: DraftBatch) -> Tensor:
        anchors_R1H = self.borrowed.embed(batch.anchors_R).unsqueeze(1)
        masks_RKH = plan.mask_1KH.expand(len(batch.slots), -1, -1)
        lengths_R1 = torch.tensor(batch.lengths, device=anchors_R1H.device).unsqueeze(1)
        scale = self.config.backbone.attention_scale

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return block_attention(
                query, key, value, context, layer, batch.slots, batch.lengths, scale=scale
            )

        return plan.weights.block(
            torch.cat((anchors_R1H, masks_RKH), dim=1),
            plan.rotary_table[lengths_R1 + plan.slots_K],
            attend,
        )

    def _decode_plan(self, context: SlotCache) -> DecodePlan:
        positions = context.capacity + self.block_size
        if self._plan is None or self._plan.rotary_table.shape[0] < positions:
            # Even in inference mode these are plain tensors: some are the parameters themselves.
            with torch.inference_mode(False), torch.no_grad():
                self._plan = DecodePlan.build(
                    self,
                    self.markov_head,
                    self.confidence_head,
                    masks=self._mask_slots(self.block_size - 1),
                    positions=positions,
                    like=self.borrowed.embedding_VH,
                )
        return self._plan


def _confidence(
    head: ConfidenceHead | None,
    markov: MarkovHead | None,
    hidden: Tensor,
    previous: Tensor,
    *,
    detach: bool = False,
) -> Tensor | None:
    if head is None:
        return None
    embedded = None
    if head.with_markov and markov is not None:
        table = markov.markov_w1.weight
        embedded = F.embedding(previous, table.detach() if detach else table)
    logits: Tensor = head(hidden, embedded)
    return logits
