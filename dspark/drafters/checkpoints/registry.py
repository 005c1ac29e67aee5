"""Which drafters a checkpoint can hold: a row per family, a reader per architecture.

`checkpoint` looks here, and nowhere else, for what differs between families: how a config.json
becomes a configuration, which module is filled with the tensors, and what each layout's
config.json says. A new family is a new row of `FAMILIES` and a new member of `AnyDrafter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from dspark.drafters.config import DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.drafters.published import (
    ARCHITECTURE,
    GEMMA4_ARCHITECTURE,
    config_from_json,
    config_to_json,
    dflash_from_json,
    refuse_beyond_published,
)
from dspark.drafters.published_eagle3 import ARCHITECTURE as EAGLE3_ARCHITECTURE
from dspark.drafters.published_eagle3 import GEMMA4_ARCHITECTURE as GEMMA4_EAGLE3
from dspark.drafters.published_eagle3 import LEGACY_ARCHITECTURE as LEGACY_EAGLE3
from dspark.drafters.published_eagle3 import (
    eagle3_from_json,
    eagle3_to_json,
    legacy_eagle3_from_json,
)
from dspark.drafters.published_eagle3 import (
    refuse_beyond_published as refuse_eagle3_beyond_published,
)
from dspark.drafters.speculators import speculators_from_json, speculators_to_json
from dspark.drafters.speculators_eagle3 import (
    speculators_eagle3_from_json,
    speculators_eagle3_to_json,
)
from dspark.errors import CheckpointError, CompatibilityError

DEEPSPEC, SPECULATORS, ATTACHED = "deepspec", "speculators", "attached"
LAYOUTS = (DEEPSPEC, SPECULATORS, ATTACHED)
_DRAFTER_WORDS = ("DSpark", "DFlash", "Eagle")  # in the name of every drafter's architecture
MASK_EMBEDDING = "mask_embedding.weight"

AnyDrafter = DSparkDrafter | Eagle3Drafter
"""Every drafter that has weights: the union of the families' modules."""

ConfigT = TypeVar("ConfigT")
DrafterT = TypeVar("DrafterT", bound=nn.Module)


@dataclass(frozen=True)
class Family(Generic[ConfigT, DrafterT]):
    """One kind of drafter, as checkpoints know it.

    Attributes:
        drafter: its module's type.
        readers: by architecture, (parsed config.json, what to call it in errors) -> configuration.
        build: (configuration, names of the file's tensors, what to call it in errors) -> an empty
            module.
        writers: by layout, (drafter, dtype of the stored weights) -> config.json; a writer refuses
            what its layout cannot carry.
        renamed: other beginnings of tensors' names that are read, each with the usual one.
    """

    drafter: type[DrafterT]
    readers: Mapping[str, Callable[[Mapping[str, Any], str], ConfigT]]
    build: Callable[[ConfigT, Set[str], str], DrafterT]
    writers: Mapping[str, Callable[[DrafterT, str], dict[str, Any]]]
    renamed: Mapping[str, str] = field(default_factory=dict)


def _build_dspark(config: DSparkConfig, names: Set[str], where: str) -> DSparkDrafter:
    drafter = DSparkDrafter(config)
    if MASK_EMBEDDING in names and drafter.mask_embedding is None:
        drafter.mask_embedding = nn.Embedding(1, config.backbone.hidden_size)
    if MASK_EMBEDDING not in names and drafter.mask_embedding is not None:
        raise CheckpointError(
            f"{where} has no mask_token_id and the weights no {MASK_EMBEDDING}; "
            "one of them must say what fills a block."
        )
    return drafter


def _write_attached(drafter: DSparkDrafter, dtype: str) -> dict[str, Any]:
    return config_to_json(drafter.config, dtype)


def _write_deepspec(drafter: DSparkDrafter, dtype: str) -> dict[str, Any]:
    _refuse_learned_mask(drafter, "published")
    refuse_beyond_published(drafter.config)
    return config_to_json(drafter.config, dtype)


def _write_speculators(drafter: DSparkDrafter, dtype: str) -> dict[str, Any]:
    _refuse_learned_mask(drafter, "speculators")
    return speculators_to_json(drafter.config, dtype)


def _refuse_learned_mask(drafter: DSparkDrafter, layout: str) -> None:
    if drafter.mask_embedding is not None:
        raise CompatibilityError(
            f"The drafter has a learned {MASK_EMBEDDING}, for which the {layout} layout has no "
            "place; save it attached to its target."
        )


DSPARK = Family(
    drafter=DSparkDrafter,
    readers={
        ARCHITECTURE: config_from_json,
        GEMMA4_ARCHITECTURE: config_from_json,
        "DSparkDraftModel": config_from_json,  # what some writers call the first
        "DFlashDraftModel": dflash_from_json,
        "speculators dspark": speculators_from_json,
        "speculators dflash": speculators_from_json,
    },
    build=_build_dspark,
    writers={
        DEEPSPEC: _write_deepspec,
        SPECULATORS: _write_speculators,
        ATTACHED: _write_attached,
    },
)


def _build_eagle3(config: Eagle3Config, names: Set[str], where: str) -> Eagle3Drafter:  # noqa: ARG001
    return Eagle3Drafter(config)


def _write_published_eagle3(drafter: Eagle3Drafter, dtype: str) -> dict[str, Any]:
    refuse_eagle3_beyond_published(drafter.config)
    return eagle3_to_json(drafter.config, dtype)


def _write_eagle3(drafter: Eagle3Drafter, dtype: str) -> dict[str, Any]:
    return eagle3_to_json(drafter.config, dtype)


def _write_speculators_eagle3(drafter: Eagle3Drafter, dtype: str) -> dict[str, Any]:
    return speculators_eagle3_to_json(drafter.config, dtype)


EAGLE3 = Family(
    drafter=Eagle3Drafter,
    readers={
        EAGLE3_ARCHITECTURE: eagle3_from_json,
        GEMMA4_EAGLE3: eagle3_from_json,
        LEGACY_EAGLE3: legacy_eagle3_from_json,
        "Eagle3DraftModel": eagle3_from_json,  # what the published evaluation calls it
        "speculators eagle3": speculators_eagle3_from_json,
    },
    build=_build_eagle3,
    writers={
        DEEPSPEC: _write_published_eagle3,
        SPECULATORS: _write_speculators_eagle3,
        ATTACHED: _write_eagle3,
    },
    renamed={"midlayer.": "layers.0."},
)

FAMILIES: tuple[Family[Any, Any], ...] = (DSPARK, EAGLE3)


def read_config(data: Mapping[str, Any], where: str) -> tuple[Family[Any, Any], Any]:
    """The family of a parsed config.json, and the configuration that its `build` takes.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: it names no architecture, or a field is missing or of the wrong kind.
        CompatibilityError: the architecture or an option of it is not supported.
    """
    name = _architecture(data, where)
    for family in FAMILIES:
        if name in family.readers:
            return family, family.readers[name](data, where)
    if "dspark_block_size" in data:
        raise CompatibilityError(
            f"{where} is a target of architecture {name} with DSpark layers among its own (mtp.*), "
            "whose compressed attention and hyper-connections are not supported; serve it with "
            "vLLM or SGLang."
        )
    known = ", ".join(name for family in FAMILIES for name in family.readers)
    if is_drafter(data):
        raise CompatibilityError(
            f"{where} is a drafter of architecture {name}, which is not supported yet; use one of "
            f"{known}."
        )
    raise CompatibilityError(
        f"{where} is of architecture {name}, which is no drafter; give the directory of a drafter "
        f"({known}), or a target directory that holds one in dspark/."
    )


def is_drafter(data: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json names a kind of drafter, supported or not."""
    names = data.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return "speculators_model_type" in data or any(word in str(first) for word in _DRAFTER_WORDS)


def write_config(drafter: AnyDrafter, layout: str, dtype: str) -> dict[str, Any]:
    """What config.json says of a drafter in a layout.

    Args:
        drafter: any drafter with weights.
        layout: one of `LAYOUTS`.
        dtype: of the stored weights, without `torch.`.

    Raises:
        CompatibilityError: the layout cannot carry this drafter.
    """
    for family in FAMILIES:
        if isinstance(drafter, family.drafter) and layout in family.writers:
            written: dict[str, Any] = family.writers[layout](drafter, dtype)
            return written
    raise CompatibilityError(
        f"The {layout} layout has no place for this kind of drafter ({type(drafter).__name__}); "
        "choose another."
    )


def _architecture(data: Mapping[str, Any], where: str) -> str:
    """Name of an architecture; "speculators NAME" for files of that library."""
    if "speculators_model_type" in data:
        return f"speculators {data['speculators_model_type']}"
    names = data.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(
            f"{where} names no architecture; a drafter's config.json has "
            f'"architectures": ["{ARCHITECTURE}"], or another drafter\'s.'
        )
    return str(names[0])
