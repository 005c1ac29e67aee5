"""Settings of recipes: drafter, loss, features, optimiser, run and evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from dspark.data.features.manifest import Coding
from dspark.drafters.config import evenly_spaced_taps
from dspark.training.losses.blocks import LossWeights
from dspark.training.losses.terms import TermWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


LayerFamily = Literal["qwen3", "llama", "gemma4", "deepseek_v4"]


class Settings(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NewDrafterSettings(Settings):
    """What every new drafter has; what is not given is the target's."""

    layers: LayerFamily = Field(
        "qwen3",
        description="Qwen3's layers serve any target; Gemma4 or DeepSeek-V4 may have its own; "
        "Eagle3 may have Llama's, without norms of queries and keys, which every engine runs",
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
                f"num_taps ({self.num_taps}) has no effect beside target_layer_ids; remove it"
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


class ChainSettings(NewDrafterSettings):
    """A drafter that runs once per token."""

    input_projection: bool = Field(
        False,
        description="the layer of models' own MTP modules: a whole one over a projection of token "
        "and state, which reads a single captured layer",
    )


class Eagle3Settings(TapSettings, ChainSettings):
    """An Eagle3 drafter."""

    ttt_length: int = Field(7, ge=1, description="passes of the training-time test: most drafts")


class DistributionLossSettings(Settings):
    """Weights of the terms on distributions (`losses.terms.TermWeights`)."""

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
            raise ValueError(f"lk_eta ({self.lk_eta}) has no effect if lk_hybrid is 0; remove it")
        return self

    def _term_weights(self) -> dict[str, Any]:
        return self._terms() | {"lk_eta": 3.0 if self.lk_eta is None else self.lk_eta}


class BlockLossSettings(DistributionLossSettings):
    """Weights of a block drafter's losses."""

    ce: float = Field(0.0, ge=0, description="cross-entropy against the true tokens")
    kl: float = Field(0.0, ge=0, description="KL from the target's distributions to the drafter's")
    decay: float = Field(4.0, gt=0, description="slots over which the weight falls by e")

    def _terms(self) -> dict[str, float]:
        return {"ce": self.ce, "kl": self.kl, **super()._terms()}


class DSparkLossSettings(BlockLossSettings):
    """DSpark's (eqs. 9-12); optionally cross-entropy alone at first."""

    ce: float = Field(0.1, ge=0, description="cross-entropy against the true tokens")
    tv: float = Field(0.9, ge=0, description="sum of |p_d - p_t|, twice the total variation")
    confidence: float = Field(
        1.0, ge=0, description="the confidence head's cross-entropy; unused without that head"
    )
    detach_confidence: bool = Field(
        False, description="keep the confidence loss from training all but its head"
    )
    ce_first_steps: int = Field(
        0, ge=0, description="steps with cross-entropy in place of all terms on distributions"
    )

    @model_validator(mode="after")
    def _everything_acts(self) -> Self:
        if self.detach_confidence and not self.confidence:
            raise ValueError("detach_confidence has no effect if confidence is 0; remove it")
        if self.ce_first_steps and not any(v for k, v in self._terms().items() if k != "ce"):
            raise ValueError(
                f"ce_first_steps ({self.ce_first_steps}) has no effect beside ce alone; remove it"
            )
        return self

    def weights(self, step: int) -> LossWeights:
        """The weights of a step."""
        terms = self._term_weights()
        if step < self.ce_first_steps:
            terms = {"ce": sum(self._terms().values()), "tv": 0.0}
        own = LossWeights(
            confidence=self.confidence,
            decay=self.decay,
            detach_confidence=self.detach_confidence,
        )
        return replace(own, **terms)


class DFlashLossSettings(BlockLossSettings):
    """DFlash's: cross-entropy alone, unless another term is asked for."""

    ce: float = Field(1.0, ge=0, description="cross-entropy against the true tokens")

    def weights(self, step: int) -> LossWeights:  # noqa: ARG002
        """The weights of a step."""
        return replace(LossWeights(confidence=0.0, decay=self.decay), **self._term_weights())


class ChainLossSettings(DistributionLossSettings):
    """Weights of an autoregressive drafter's losses."""

    soft_ce: float = Field(
        1.0, ge=0, description="cross-entropy against the target's distributions"
    )

    def _terms(self) -> dict[str, float]:
        return {"soft_ce": self.soft_ce, **super()._terms()}

    def weights(self) -> TermWeights:
        """The weights of a pass."""
        return TermWeights(**self._term_weights())


class Eagle3LossSettings(ChainLossSettings):
    """Eagle3's: cross-entropy against the target's distributions, pass by pass."""

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
            f"loss.{min(given)} has no effect if drafter.confidence_head is false; remove it"
        )


class FeatureSettings(Settings):
    """Where a step's features come from."""

    source: Literal["online", "cache", "hybrid"] = Field(
        "online",
        description="online runs the target in the step; cache reads everything from `path` and "
        "loads the target's embedding and head only; hybrid reads what the cache holds and "
        "computes the rest",
    )
    path: str | None = Field(None, description="directory of the cache")
    add: bool = Field(True, description="hybrid: what was computed is added to the cache")
    codec: Literal["coded", "bfloat16"] = Field(
        "coded", description="of a new cache: few bits a number, or bf16 as it is"
    )
    feature_error: float = Field(
        0.1, gt=0, le=0.5, description="coded: relative error of features in a new cache"
    )
    teacher_error: float = Field(
        0.02, gt=0, le=0.5, description="coded: relative error of the teacher's states"
    )
    max_bytes: int | None = Field(
        None, ge=1, description="what the cache may measure; what fits is kept"
    )
    tokens_per_forward: int = Field(
        8192, ge=1, description="that the target runs over at once when a cache is built"
    )

    @model_validator(mode="after")
    def _every_key_acts(self) -> Self:
        given = self.model_fields_set - {"source"}
        if self.source == "online" and given:
            raise ValueError(f"{sorted(given)[0]} has no effect when source is online; remove it")
        if self.source != "online" and self.path is None:
            raise ValueError(f"source is {self.source}, so path must name the cache's directory")
        if self.source == "cache" and "add" in given:
            raise ValueError("add has no effect when source is cache; remove it, or use hybrid")
        errors = given & {"feature_error", "teacher_error"}
        if self.codec == "bfloat16" and errors:
            raise ValueError(f"{sorted(errors)[0]} has no effect with codec bfloat16; remove it")
        return self

    @property
    def coding(self) -> Coding:
        """How a new cache codes its rows."""
        if self.codec == "bfloat16":
            return Coding("bfloat16", 0.0, 0.0)
        return Coding("coded", self.feature_error, self.teacher_error)


Schedule = Literal["cosine", "linear", "constant", "wsd"]
WSD_DECAY = 0.1


class OptimiserSettings(Settings):
    """AdamW, or Muon for the layers' matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(6e-4, gt=0, description="AdamW's peak rate")
    matrix_learning_rate: float = Field(2e-3, gt=0, description="Muon's peak rate")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.04, ge=0, lt=1, description="share of the steps")
    schedule: Schedule = Field("cosine", description="of the rate after the warm-up")
    decay_fraction: float | None = Field(
        None, gt=0, le=1, description=f"wsd alone: share of the steps that decay, else {WSD_DECAY}"
    )
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is then what is evaluated "
        "and exported",
    )

    @model_validator(mode="after")
    def _only_wsd_decays_late(self) -> Self:
        if self.decay_fraction is not None and self.schedule != "wsd":
            raise ValueError(
                f"decay_fraction ({self.decay_fraction}) has no effect beside schedule "
                f"{self.schedule}; remove it or set schedule to wsd"
            )
        return self


class RunSettings(Settings):
    """How long, on what, and what is kept."""

    output_dir: str
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0, description="passes over the data, in place of steps")
    rows: int = Field(8, ge=1, description="sequences per step, over all ranks")
    accumulate: int = Field(
        1, ge=1, description="parts of a rank's rows that are computed one after the other"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="what several processes share: ddp the data, fsdp also masters, gradients and "
        "optimiser; auto takes fsdp on CUDA devices",
    )
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = Field(False, description="torch.compile the forward pass")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints that are kept")
    tensorboard: bool = Field(False, description="write the log for TensorBoard too")

    @model_validator(mode="after")
    def _one_way_to_say_how_long(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            said = "neither is given" if self.steps is None else "both are given"
            raise ValueError(f"a run has either steps or epochs, but {said}")
        return self


class TargetRunSettings(RunSettings):
    """A run over a token stream, whose rows are all of one length."""

    row_tokens: int = Field(512, ge=8, description="tokens per sequence")


class DrafterRunSettings(RunSettings):
    """A run that may measure the drafter while it trains."""

    evaluate_every: int | None = Field(
        None, ge=1, description="steps between measurements of the real accepted length"
    )


class EvaluationSettings(Settings):
    """What the real accepted length is measured on while a drafter trains."""

    prompts: str | None = Field(None, description="JSON lines with `prompt`, `turns` or `messages`")
    heldout: int | None = Field(
        None,
        ge=1,
        description="in place of prompts: so many samples, the last of the files, whose prompts "
        "are asked and which are not trained on",
    )
    limit: int = Field(16, ge=1, description="prompts at most, all of them decoded at once")
    temperatures: tuple[float, ...] = Field(
        (0.0, 1.0), min_length=1, description="the best checkpoint has the highest mean over them"
    )
    max_new_tokens: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompts is None) == (self.heldout is None):
            said = "neither is given" if self.prompts is None else "both are given"
            raise ValueError(f"an evaluation asks either prompts or heldout samples, but {said}")
        return self
