"""What a drafter is, as data: its layers, and the DSpark drafter around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from dspark.errors import CompatibilityError

Activation = Literal["silu", "gelu_tanh"]

GEMMA4_PARTS: Mapping[str, Any] = {
    "softmax_scale": 1.0,
    "value_norm": True,
    "sandwich_norms": True,
    "layer_scalar": True,
    "activation": "gelu_tanh",
}


@dataclass(frozen=True)
class BackboneConfig:
    """The declared parts of a backbone; the defaults are Qwen3's layer.

    A family whose layer differs declares the difference as a field here, and the one forward acts
    on it: `GEMMA4_PARTS` are Gemma4's (docs/method.md, 2.1).

    Attributes:
        hidden_size: width H, the target's.
        intermediate_size: width of the gated MLP.
        num_layers: draft layers L.
        num_heads: query heads A.
        num_kv_heads: key and value heads G.
        head_dim: D, even.
        num_taps: captured target layers; features have width num_taps * H.
        rms_norm_eps: epsilon of every norm.
        rope_theta: base of the rotary embedding.
        attention_bias: whether q, k, v and o projections have a bias.
        query_key_norms: queries and keys are normed per head; Llama's are not, which only an Eagle3
            drafter may have.
        norm_before_residual: the residual of an Eagle3 layer is the hidden state after its norm,
            not before.
        input_projection: an Eagle3 layer is that of models' own MTP modules: see
            `drafters.eagle3`.
        softmax_scale: factor on query-key products; None for D ** -0.5.
        value_from_key: values are the key projection, before the key's norm and rotary embedding.
        value_norm: values are normed per head, without a weight.
        sandwich_norms: attention and MLP are normed after as well as before.
        layer_scalar: a stored number multiplies each layer's output.
        activation: of the MLP's gate.
        rotary_fraction: share of the head's pairs that turn with the position; the others stay
            ("proportional" rotary embedding).
        sliding_layers: draft layers that see only the last `sliding_window` context rows; every
            slot of a block sees the same ones, and its whole block.
        sliding_window: see there; in tokens.
        causal_windows: whether a slot of a sliding layer sees no later slot of its own block.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_taps: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    attention_bias: bool = False
    query_key_norms: bool = True
    norm_before_residual: bool = False
    input_projection: bool = False
    softmax_scale: float | None = None
    value_from_key: bool = False
    value_norm: bool = False
    sandwich_norms: bool = False
    layer_scalar: bool = False
    activation: Activation = "silu"
    rotary_fraction: float = 1.0
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    causal_windows: bool = False

    def __post_init__(self) -> None:
        """Refuse heads and windows that no layer can have.

        Raises:
            CompatibilityError: naming the field and its value.
        """
        if self.num_heads % self.num_kv_heads:
            raise CompatibilityError(
                f"num_attention_heads is {self.num_heads}, but must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})."
            )
        layers, window = self.sliding_layers, self.sliding_window
        if any(not 0 <= layer < self.num_layers for layer in layers):
            raise CompatibilityError(
                f"sliding_layers is {list(layers)}, but the draft layers are 0 to "
                f"{self.num_layers - 1}."
            )
        if layers and (window is None or window < 1):
            raise CompatibilityError(f"sliding_window is {window}, but must be at least 1.")
        if not layers and (window is not None or self.causal_windows):
            raise CompatibilityError(
                f"sliding_layers is empty, so sliding_window ({window}) and causal_windows must "
                "not be given."
            )

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products before the softmax."""
        return float(self.head_dim**-0.5) if self.softmax_scale is None else self.softmax_scale

    def window(self, layer: int) -> int | None:
        """Context rows that a layer sees; None for all."""
        return self.sliding_window if layer in self.sliding_layers else None


@dataclass(frozen=True)
class DSparkConfig:
    """What a DSpark drafter is.

    Attributes:
        backbone: the parallel backbone; its `num_taps` is the number of `target_layer_ids`.
        vocab_size: V, the target's.
        block_size: slots of a block, the anchor's included.
        mask_token_id: token whose embedding fills the slots after the anchor; None when the
            drafter has a learned `mask_embedding` of its own.
        target_layer_ids: captured layers, strictly increasing; -1 is the embedding output.
        num_target_layers: decoder layers of the target it was made for.
        markov_rank: r; 0 for no sequential head.
        markov_head_type: vanilla, gated or rnn.
        confidence_head: whether it predicts survival.
        confidence_head_with_markov: whether that head reads the previous token's Markov embedding.
        max_position_embeddings: longest context, in tokens; the target's.
        num_anchors: anchors per sequence in training, recorded in the published config.
        extra: fields of a published config that change nothing here (token ids, dropout, ...),
            written back unchanged.
        sample_from_anchor: whether slot 0, the anchor's, predicts the token after it, as in the
            published layout. If not (the DFlash authors' layout of 1 + n slots), slot 0 is thrown
            away, and slot j predicts the token at its own position, anchor + j.
        draft_vocab_size: tokens that it can propose, at most V - 1; None for all. A drafter with
            such a reduced vocabulary has a head of its own.
    """

    backbone: BackboneConfig
    vocab_size: int
    block_size: int
    mask_token_id: int | None
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    confidence_head: bool = True
    confidence_head_with_markov: bool = True
    max_position_embeddings: int = 40960
    num_anchors: int = 512
    extra: Mapping[str, Any] = field(default_factory=dict)
    sample_from_anchor: bool = True
    draft_vocab_size: int | None = None

    @property
    def num_drafts(self) -> int:
        """K, drafts per round: the slots that predict."""
        return self.block_size - self.unused_slots

    @property
    def unused_slots(self) -> int:
        """Slots at the start of a block that predict nothing."""
        return 0 if self.sample_from_anchor else 1

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other.

        Raises:
            CompatibilityError: naming the field, its value and what it must be.
        """
        check_taps(self.target_layer_ids, self.num_target_layers, self.backbone)
        check_draft_vocabulary(self.draft_vocab_size, self.vocab_size)
        layer = self.backbone
        if not layer.query_key_norms or layer.norm_before_residual or layer.input_projection:
            raise CompatibilityError(
                "The DSpark drafter has query_key_norms false, or norm_before_residual or "
                "input_projection true, which are for Eagle3; use Qwen3's or Gemma4's layers."
            )
        mask = self.mask_token_id
        if mask is not None and not 0 <= mask < self.vocab_size:
            raise CompatibilityError(
                f"mask_token_id is {mask}, but must be a token of the vocabulary (0 to "
                f"{self.vocab_size - 1})."
            )
        if self.confidence_head and self.confidence_head_with_markov and self.markov_rank == 0:
            raise CompatibilityError(
                "confidence_head_with_markov is true but markov_rank is 0, so there is no Markov "
                "embedding to read; set confidence_head_with_markov to false."
            )
        if self.num_drafts < 1 or self.backbone.head_dim % 2:
            raise CompatibilityError(
                f"block_size is {self.block_size} and head_dim {self.backbone.head_dim}, but they "
                f"must be at least {1 + self.unused_slots} and even."
            )


def check_taps(ids: Sequence[int], num_target_layers: int, backbone: BackboneConfig) -> None:
    """Refuse captured layers that a target cannot have, or another number of them.

    Raises:
        CompatibilityError: naming the field, its value and what it must be.
    """
    last, increasing = num_target_layers - 1, all(a < b for a, b in pairwise(ids))
    if not ids or not increasing or ids[0] < -1 or ids[-1] > last:
        raise CompatibilityError(
            f"target_layer_ids is {list(ids)}, but must be strictly increasing layer numbers "
            f"from -1 (the embedding output) to {last} (num_target_layers - 1)."
        )
    if len(ids) != backbone.num_taps:
        raise CompatibilityError(
            f"num_taps is {backbone.num_taps}, but target_layer_ids has {len(ids)}."
        )


def check_draft_vocabulary(draft_vocab_size: int | None, vocab_size: int) -> None:
    """Refuse a reduced vocabulary that is none.

    Raises:
        CompatibilityError: naming the field and its value.
    """
    if draft_vocab_size is not None and not 0 < draft_vocab_size < vocab_size:
        raise CompatibilityError(
            f"draft_vocab_size is {draft_vocab_size}, but must be less than vocab_size "
            f"({vocab_size}), or None."
        )


def evenly_spaced_taps(num_target_layers: int, count: int) -> tuple[int, ...]:
    """Layer ids evenly from the second to the third last layer (docs/method.md, 2.1).

    Raises:
        CompatibilityError: the target has too few layers for that many.
    """
    if count < 2 or num_target_layers - 3 < count:
        raise CompatibilityError(
            f"{count} taps cannot be spread over {num_target_layers} layers; use 2 to "
            f"{max(num_target_layers - 3, 2)}, or name target_layer_ids."
        )
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (count - 1)) for i in range(count))
