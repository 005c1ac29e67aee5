"""What recipes say of a run: how it optimises, how long, on what, and what is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dspark.training.settings import Settings

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
                f"decay_fraction ({self.decay_fraction}) says nothing beside schedule "
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
