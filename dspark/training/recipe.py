"""Recipes: frozen, validated run configurations read from YAML. Unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from dspark.data.corpus import SourceFormat
from dspark.errors import RecipeError
from dspark.training.settings import (
    BlockSettings,
    ChainLossSettings,
    ChainSettings,
    DFlashLossSettings,
    DrafterRunSettings,
    DSparkLossSettings,
    DSparkSettings,
    Eagle3LossSettings,
    Eagle3Settings,
    EvaluationSettings,
    FeatureSettings,
    OptimiserSettings,
    Settings,
    TargetRunSettings,
    check_confidence,
)

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""The bundled recipes, in a folder per target; what several of them extend lies in `base`."""


class Source(Settings):
    """One file of the corpus."""

    format: SourceFormat = Field("messages", description="how records become conversations")
    path: str | None = Field(None, description="JSON-lines file, relative to `root`")
    repeat: int = Field(1, ge=1, description="times it is seen per epoch")
    unlearn_repeats: int = Field(
        0,
        ge=0,
        description="for a model's own answers: instead of learning them, make tokens unlikely "
        "that repeat a row of so many tokens of the answer; 0 learns them",
    )


class CorpusSettings(Settings):
    """The conversations of a run."""

    root: str = Field(".", description="folder that the sources' paths are relative to")
    sources: tuple[Source, ...] = Field(min_length=1)
    unlearn_weight: float = Field(1.0, gt=0, description="of unlearned tokens in the loss")
    heldout: dict[str, Source] = Field(
        default_factory=dict, description="domain -> source, for held-out bits per byte"
    )


class ArchitectureSettings(Settings):
    """A Qwen3-architecture target, trained from scratch."""

    vocab_size: int = Field(4096, ge=300)
    hidden_size: int = 160
    intermediate_size: int = 416
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0


class TargetRecipe(Settings):
    """Trains a small language model, from scratch or from an earlier one."""

    kind: Literal["target"]
    initial: str | None = Field(
        None,
        description="directory of a model to go on from, its tokenizer included; its architecture "
        "must be the recipe's",
    )
    architecture: ArchitectureSettings = ArchitectureSettings()
    corpus: CorpusSettings
    optimiser: OptimiserSettings = OptimiserSettings()
    run: TargetRunSettings


class SampleSettings(Settings):
    """The conversations that a drafter learns from."""

    root: str = Field(".", description="folder that the paths are relative to")
    paths: tuple[str, ...] = Field(
        description="JSON lines, see data/samples.py; [] takes the samples of the feature cache"
    )
    max_length: int = Field(4096, ge=8, description="tokens per sample; the rest is cut")
    min_supervised: int = Field(14, ge=2, description="samples with fewer answer tokens are left")


class AnchorSampleSettings(SampleSettings):
    """Samples of which blocks are taken."""

    num_anchors: int = Field(512, ge=1, description="blocks per sample at most")


class DrafterRecipe(Settings):
    """Trains a drafter against a frozen target."""

    kind: Literal["drafter"]
    target: str = Field(description="directory or hub id of the target")
    initial: str | None = Field(
        None,
        description="drafter to start from, its weights and its reduced vocabulary: a directory "
        "or hub id",
    )
    layout: Literal["published", "attached"] = Field(
        "published", description="attached writes it into the target's directory"
    )
    features: FeatureSettings = FeatureSettings()
    evaluation: EvaluationSettings | None = Field(
        None, description="how the real accepted length is measured, every run.evaluate_every steps"
    )
    optimiser: OptimiserSettings = OptimiserSettings()
    run: DrafterRunSettings

    @model_validator(mode="after")
    def _evaluated_on_something(self) -> Self:
        if (self.evaluation is None) != (self.run.evaluate_every is None):
            given, missing = ("evaluation", "run.evaluate_every")
            if self.evaluation is None:
                given, missing = missing, given
            raise ValueError(f"{given} has no effect without {missing}; give both or neither")
        return self


class DSparkRecipe(DrafterRecipe):
    """DSpark: a parallel backbone with sequential and confidence heads."""

    algorithm: Literal["dspark"] = "dspark"
    drafter: DSparkSettings = DSparkSettings()
    loss: DSparkLossSettings = DSparkLossSettings()
    samples: AnchorSampleSettings

    @model_validator(mode="after")
    def _the_confidence_head_is_trained(self) -> Self:
        check_confidence(self.drafter, self.loss)
        return self


class DFlashRecipe(DrafterRecipe):
    """DFlash: the same backbone without either head, on cross-entropy alone."""

    algorithm: Literal["dflash"]
    drafter: BlockSettings = BlockSettings()
    loss: DFlashLossSettings = DFlashLossSettings()
    samples: AnchorSampleSettings


class ChainDrafterRecipe(DrafterRecipe):
    """A drafter that runs once per token."""

    @model_validator(mode="after")
    def _is_not_compiled(self) -> Self:
        if self.run.compile:
            raise ValueError(
                "run.compile is for dspark and dflash, whose blocks are one forward pass; set it "
                "to false"
            )
        return self


class Eagle3Recipe(ChainDrafterRecipe):
    """Eagle3: one layer that runs once per token, trained by the training-time test."""

    algorithm: Literal["eagle3"]
    drafter: Eagle3Settings = Eagle3Settings()
    loss: Eagle3LossSettings = Eagle3LossSettings()
    samples: SampleSettings


class MTPRecipe(ChainDrafterRecipe):
    """MTP-1: Eagle3's layer on the target's last layer, for one extra token."""

    algorithm: Literal["mtp"]
    drafter: ChainSettings = ChainSettings()
    loss: ChainLossSettings = ChainLossSettings()
    samples: SampleSettings


ChainRecipe = Eagle3Recipe | MTPRecipe
BlockRecipe = DSparkRecipe | DFlashRecipe
Recipe = TargetRecipe | BlockRecipe | ChainRecipe

_DRAFTERS: dict[str, type[BlockRecipe | ChainRecipe]] = {
    "dspark": DSparkRecipe,
    "dflash": DFlashRecipe,
    "eagle3": Eagle3Recipe,
    "mtp": MTPRecipe,
}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by the name of a bundled recipe.

    Raises:
        RecipeError: there is no such recipe.
    """
    bundled = _bundled()
    for path in (Path(name), bundled.get(name), RECIPES / f"{name}.yaml"):
        if path is not None and path.is_file():
            return path
    known = ", ".join(sorted(bundled))
    raise RecipeError(f"There is no recipe {name!r}; give a YAML file or one of: {known}.")


def recipe_names() -> list[str]:
    """The names of the bundled recipes, in alphabetical order."""
    return sorted(_bundled())


def _bundled() -> dict[str, Path]:
    """The files of the bundled recipes by name."""
    paths = RECIPES.glob("*/*.yaml")
    return {path.stem: path for path in paths if path.parent.name != "base"}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    A recipe may say `extends: NAME`: it then has that one's keys (a file beside it, or a bundled
    recipe), except for those that it gives itself.

    Args:
        name: a YAML file or the name of a bundled recipe.
        overrides: `key.subkey=value` strings; the value is read as YAML.

    Raises:
        RecipeError: the recipe is missing, an override has no `=`, a key is unknown, or a value
            does not fit.
    """
    path = find_recipe(name)
    data = _read(path)
    for override in overrides:
        _apply_override(data, override)
    model, what = _model(path, data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_sentence(path, what, error)) from error


def _read(path: Path, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a file, laid over that of the recipe that it `extends`."""
    if path in extended:
        raise RecipeError(f"{path} extends itself, by way of {extended[-1]}; remove one `extends`.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it."
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no mapping of keys to values.")
    base = data.pop("extends", None)
    if base is None:
        return data
    beside = path.parent / f"{base}.yaml"
    found = beside if beside.is_file() else find_recipe(str(base))
    return _laid_over(_read(found, (*extended, path)), data)


def _laid_over(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The keys of both, mappings key by key; where both have one, `data` says what it is."""
    merged = dict(base)
    for key, value in data.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _laid_over(old, value)  # noqa: PLW2901
        merged[key] = value
    return merged


def _model(path: Path, data: dict[str, Any]) -> tuple[type[Recipe], str]:
    """What a recipe is read as, and what to call it in errors."""
    kind = data.get("kind")
    if kind == "target":
        return TargetRecipe, "a target recipe"
    if kind != "drafter":
        raise RecipeError(f"{path}: kind is {kind!r}, but what is trained is target or drafter.")
    algorithm = data.get("algorithm", "dspark")
    if not isinstance(algorithm, str) or algorithm not in _DRAFTERS:
        raise RecipeError(
            f"{path}: algorithm is {algorithm!r}, but a drafter's is one of {', '.join(_DRAFTERS)}."
        )
    return _DRAFTERS[algorithm], f"a recipe for {algorithm}"


def _sentence(path: Path, what: str, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{path}: {what} has no key {key!r}; remove it or correct its name."
    if first["type"] == "value_error":  # of our own validators
        reason = first["ctx"]["error"]
        return f"{path}: {key}: {reason}." if key else f"{path}: {reason}."
    return f"{path}: {key} is {first['input']!r}: {first['msg']}."


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"The override {override!r} is not of the form key=value.")
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"The override {override!r} goes below a value, not a mapping.")
    node[last] = yaml.safe_load(value)
