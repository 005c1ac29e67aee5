"""Which drafters and layouts there are: the built-in ones, and those of installed packages.

Everything else asks here what differs between them: how a config.json becomes a configuration,
which module is filled with the tensors, and what each layout's config.json says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dspark.drafters import deepseek_v4, dspark, eagle3, ngram
from dspark.drafters.base import CHECKPOINTS, DRAFTERS, Drafter, DrafterKind, Layout, plugins
from dspark.drafters.checkpoints import deepseek_v4 as inside
from dspark.drafters.checkpoints import eagle, published, speculators
from dspark.drafters.checkpoints.dialects import ELSEWHERE
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.errors import CheckpointError, CompatibilityError

AnyDrafter = DSparkDrafter | Eagle3Drafter
"""The built-in drafters with weights; a plug-in's has the same attributes."""
DEEPSPEC, SPECULATORS, ATTACHED = "deepspec", "speculators", "attached"
SGLANG = "sglang"
DEEPSEEK_V4 = "deepseek_v4"
_KINDS = {
    "dspark": dspark.KIND,
    "deepseek_v4": deepseek_v4.KIND,
    "eagle3": eagle3.KIND,
    "ngram": ngram.KIND,
}
_LAYOUTS = {
    DEEPSPEC: published.LAYOUT,
    SPECULATORS: speculators.LAYOUT,
    ATTACHED: published.ATTACHED,
    SGLANG: eagle.SGLANG,
    "eagle": eagle.LAYOUT,
    DEEPSEEK_V4: inside.LAYOUT,
}
_DRAFTER_WORDS = ("DSpark", "DFlash", "Eagle")  # in the name of every drafter's architecture


class Found(NamedTuple):
    """What a config.json says.

    Attributes:
        kind: the kind of drafter.
        config: what its `build` takes.
        renamed: other beginnings of tensors' names, each with the usual one.
        layout: of the file, where a layout reads it.
    """

    kind: DrafterKind
    config: Any
    renamed: Mapping[str, str]
    layout: Layout | None


def kinds() -> dict[str, DrafterKind]:
    """All kinds of drafters by name; a built-in name cannot be taken."""
    return plugins(DRAFTERS, DrafterKind) | _KINDS


def layouts() -> dict[str, Layout]:
    """All layouts of directories by name; a built-in name cannot be taken."""
    return plugins(CHECKPOINTS, Layout) | _LAYOUTS


def _readers(every: Mapping[str, DrafterKind]) -> list[Layout | DrafterKind]:
    """All that read config.json, layouts first."""
    return [*layouts().values(), *every.values()]


def make_drafter(name: str) -> Drafter | None:
    """A new drafter of a kind without weights, as `ngram`; None if the name is none's."""
    kind = _KINDS.get(name) or plugins(DRAFTERS, DrafterKind).get(name)
    return None if kind is None or kind.create is None else kind.create()


def read_config(data: Mapping[str, Any], where: str) -> Found:
    """What a parsed config.json says, whatever its layout.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: it names no architecture, or a field is missing or of the wrong kind.
        CompatibilityError: the architecture or an option of it is not supported.
    """
    name, every = _architecture(data, where), kinds()
    homes = _readers(every)
    for home in homes:
        if name not in home.readers:
            continue
        config = home.readers[name](data, where)
        kind = kind_of(config)
        if kind is not None:
            layout = home if isinstance(home, Layout) else None
            return Found(kind, config, {**kind.renamed, **home.renamed}, layout)
        raise CompatibilityError(
            f"{where} is of architecture {name}, whose {type(config).__name__} no kind of drafter "
            "has; install the package that brings it."
        )
    known = ", ".join(architecture for home in homes for architecture in home.readers)
    if name in ELSEWHERE:
        raise CompatibilityError(
            f"{where} is a drafter of architecture {name}, which is not supported: "
            f"{ELSEWHERE[name]}; use one of {known}."
        )
    if is_drafter(data):
        raise CompatibilityError(
            f"{where} is a drafter of architecture {name}, which is not supported yet; use one of "
            f"{known}."
        )
    raise CompatibilityError(
        f"{where} is of architecture {name}, which is no drafter; give the directory of a drafter "
        f"({known}), or a target directory that holds one in dspark/."
    )


def kind_of(config: Any) -> DrafterKind | None:
    """The kind whose configuration this is; None if it is no kind's."""
    return next((kind for kind in kinds().values() if kind.config is type(config)), None)


def has_drafter_inside(data: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is a target's whose own files hold a drafter (`mtp.*`)."""
    return inside.holds_drafter(data) and not is_drafter(data)


def is_drafter(data: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json names a kind of drafter, supported or not."""
    names = data.get("architectures")
    first = str(names[0]) if isinstance(names, list) and names else ""
    return (
        "speculators_model_type" in data
        or any(word in first for word in _DRAFTER_WORDS)
        or any(first in home.readers for home in _readers(kinds()))
    )


def write_config(drafter: AnyDrafter, layout: str, dtype: str) -> dict[str, Any]:
    """What config.json says of a drafter in a layout.

    Args:
        drafter: any drafter with weights.
        layout: its name.
        dtype: of the stored weights, without `torch.`.

    Raises:
        CompatibilityError: the layout cannot carry this drafter.
    """
    writers = layouts()[layout].writers
    writer = next((w for kind, w in writers.items() if isinstance(drafter, kind)), None)
    if layout == ATTACHED:
        own = (kind.write for kind in kinds().values() if kind.drafter is type(drafter))
        writer = next(own, None) or writer
    if writer is None:
        raise CompatibilityError(
            f"The {layout} layout has no place for this kind of drafter "
            f"({type(drafter).__name__}); choose another."
        )
    return writer(drafter, dtype)


def _architecture(data: Mapping[str, Any], where: str) -> str:
    """Name of an architecture; "speculators NAME" for files of that library."""
    if "speculators_model_type" in data:
        return f"speculators {data['speculators_model_type']}"
    if has_drafter_inside(data):
        return inside.architecture(data)
    names = data.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(
            f"{where} names no architecture; a drafter's config.json has "
            f'"architectures": ["{published.DSPARK}"], or another drafter\'s.'
        )
    return str(names[0])
