"""What recipes say of a new drafter and of its loss, by algorithm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from dspark.drafters.config import evenly_spaced_taps
from dspark.training.losses.blocks import LossWeights
from dspark.training.losses.terms import LawWeights

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
    initial_layers: Literal["random", "target"] = Field(
        "random", description="what they start from; target copies the target's last layers"
    )
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


class LawLossSettings(Settings):
    """Weights of terms that compare laws (training/losses/terms.py)."""

    tv: float = Field(0.0, ge=0, description="sum of |p_d - p_t|, twice the total variation")
    lk: float = Field(0.0, ge=0, description="-log of the chance that a draft is kept")
    lk_hybrid: float = Field(
        0.0, ge=0, description="KL where little is kept, total variation where much is"
    )
    lk_eta: float | None = Field(
        None, gt=0, description="how fast lk_hybrid goes from one to the other; 3 if absent"
    )

    def _terms(self) -> dict[str, float]:
        """Every weight that may train a drafter, by name."""
        return {"tv": self.tv, "lk": self.lk, "lk_hybrid": self.lk_hybrid}

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        terms = self._terms()
        if not any(terms.values()):
            raise ValueError(f"{', '.join(terms)} are all 0, which trains nothing; give one weight")
        if self.lk_eta is not None and not self.lk_hybrid:
            raise ValueError(f"lk_eta ({self.lk_eta}) says nothing where lk_hybrid is 0; remove it")
        return self

    def _law_weights(self) -> dict[str, Any]:
        return self._terms() | {"lk_eta": 3.0 if self.lk_eta is None else self.lk_eta}


class BlockLossSettings(LawLossSettings):
    """Weights of a block drafter's losses."""

    ce: float = Field(0.0, ge=0, description="cross-entropy against the true tokens")
    kl: float = Field(0.0, ge=0, description="KL from the target's laws to the drafter's")
    decay: float = Field(4.0, gt=0, description="slots over which the weight falls by e")

    def _terms(self) -> dict[str, float]:
        return {"ce": self.ce, "kl": self.kl, **super()._terms()}


class DSparkLossSettings(BlockLossSettings):
    """DSpark's (METHOD.md 3); cross-entropy first, if asked for."""

    ce: float = Field(0.1, ge=0, description="cross-entropy against the true tokens")
    tv: float = Field(0.9, ge=0, description="sum of |p_d - p_t|, twice the total variation")
    confidence: float = Field(
        1.0, ge=0, description="the confidence head's cross-entropy; without that head it is none"
    )
    detach_confidence: bool = Field(
        False, description="keep the confidence loss from training all but its head"
    )
    ce_first_steps: int = Field(
        0, ge=0, description="steps with cross-entropy in the place of all other terms on laws"
    )

    @model_validator(mode="after")
    def _everything_acts(self) -> Self:
        if self.detach_confidence and not self.confidence:
            raise ValueError("detach_confidence says nothing where confidence is 0; remove it")
        if self.ce_first_steps and not any(v for k, v in self._terms().items() if k != "ce"):
            raise ValueError(
                f"ce_first_steps ({self.ce_first_steps}) says nothing beside ce alone; remove it"
            )
        return self

    def weights(self, step: int) -> LossWeights:
        """The weights of a step."""
        laws = self._law_weights()
        if step < self.ce_first_steps:
            laws = {"ce": sum(self._terms().values()), "tv": 0.0}
        own = LossWeights(
            confidence=self.confidence,
            decay=self.decay,
            detach_confidence=self.detach_confidence,
        )
        return replace(own, **laws)


class DFlashLossSettings(BlockLossSettings):
    """DFlash's: cross-entropy alone, unless another term is asked for."""

    ce: float = Field(1.0, ge=0, description="cross-entropy against the true tokens")

    def weights(self, step: int) -> LossWeights:  # noqa: ARG002
        """The weights of a step."""
        return replace(LossWeights(confidence=0.0, decay=self.decay), **self._law_weights())


class ChainLossSettings(LawLossSettings):
    """Weights of an autoregressive drafter's losses."""

    soft_ce: float = Field(1.0, ge=0, description="cross-entropy against the target's laws")

    def _terms(self) -> dict[str, float]:
        return {"soft_ce": self.soft_ce, **super()._terms()}

    def weights(self) -> LawWeights:
        """The weights of a pass."""
        return LawWeights(**self._law_weights())


class Eagle3LossSettings(ChainLossSettings):
    """Eagle3's: cross-entropy against the target's laws, pass by pass."""

    step_loss_decay: float = Field(0.8, gt=0, le=1, description="a pass's weight over the last's")


def check_confidence(drafter: DSparkSettings, loss: DSparkLossSettings) -> None:
    """Refuse a confidence head that nothing trains, and a weight for one that is not there.

    Raises:
        ValueError: as said.
    """
    if drafter.confidence_head and not loss.confidence:
        raise ValueError(
            "loss.confidence is 0, which would leave the confidence head untrained; give it a "
            "weight or set drafter.confidence_head to false"
        )
    given = {"confidence", "detach_confidence"} & loss.model_fields_set
    if not drafter.confidence_head and given and loss.confidence:
        raise ValueError(
            f"loss.{min(given)} says nothing where drafter.confidence_head is false; remove it"
        )
