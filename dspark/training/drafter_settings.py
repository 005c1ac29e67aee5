"""What recipes say of a new drafter and of its loss, by algorithm."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dspark.drafters.config import evenly_spaced_taps

LayerFamily = Literal["qwen3", "gemma4"]


class Settings(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NewDrafterSettings(Settings):
    """What every new drafter has; what is not given is the target's."""

    layers: LayerFamily = Field(
        "qwen3", description="Qwen3's layers serve any target; a Gemma4 target may have its own"
    )
    intermediate_size: int | None = Field(None, description="width of the gated MLP")
    copy_final_norm: bool = Field(True, description="start from the target's final norm")
    init_std: float = Field(0.02, gt=0, description="standard deviation of new matrices")
    draft_vocab_size: int | None = Field(
        None, ge=1, description="tokens that it can propose, the answers' commonest; all if absent"
    )


class TapSettings(NewDrafterSettings):
    """Which target layers a drafter reads."""

    num_taps: int | None = Field(None, ge=2, description="captured layers, spread evenly")
    target_layer_ids: tuple[int, ...] | None = Field(
        None, description="captured layers, by id; 5, spread evenly, if neither is given"
    )

    @model_validator(mode="after")
    def _one_way_to_name_layers(self) -> Self:
        if self.num_taps is not None and self.target_layer_ids is not None:
            raise ValueError(
                f"num_taps ({self.num_taps}) says nothing beside target_layer_ids; remove it"
            )
        return self

    def taps(self, num_target_layers: int) -> tuple[int, ...]:
        """The captured layers.

        Raises:
            CompatibilityError: the target has too few layers for that many.
        """
        return self.target_layer_ids or evenly_spaced_taps(num_target_layers, self.num_taps or 5)


class BlockSettings(TapSettings):
    """A drafter that fills a block in one pass."""

    num_layers: int = Field(5, ge=1, description="draft layers")
    block_size: int = Field(7, ge=1, description="slots of a block, the anchor's included")
    sample_from_anchor: bool = Field(
        True,
        description="whether the anchor's slot drafts too; if not (the DFlash authors' layout), a "
        "round has a draft less than slots",
    )
    mask_token_id: int | None = Field(None, description="what fills a block; found if absent")


class DSparkSettings(BlockSettings):
    """A DSpark drafter."""

    markov_rank: int = Field(256, ge=0, description="rank of the sequential head, 0 for none")
    markov_head_type: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence_head: bool = True
    confidence_head_with_markov: bool = True


class Eagle3Settings(TapSettings):
    """An Eagle3 drafter."""

    ttt_length: int = Field(7, ge=1, description="passes of the training-time test: most drafts")


class DSparkLossSettings(Settings):
    """Weights of the losses (METHOD.md 3); cross-entropy first, if asked for."""

    ce: float = Field(0.1, ge=0)
    tv: float = Field(0.9, ge=0)
    confidence: float = Field(1.0, ge=0)
    decay: float = Field(4.0, gt=0, description="slots over which the weight falls by e")
    detach_confidence: bool = False
    ce_first_steps: int = Field(
        0, ge=0, description="steps with cross-entropy in the place of total variation"
    )


class DFlashLossSettings(Settings):
    """Cross-entropy alone."""

    decay: float = Field(4.0, gt=0, description="slots over which the weight falls by e")


class Eagle3LossSettings(Settings):
    """Cross-entropy against the target's laws, pass by pass."""

    step_loss_decay: float = Field(0.8, gt=0, le=1, description="a pass's weight over the last's")
