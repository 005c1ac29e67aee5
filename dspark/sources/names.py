"""Names of models and drafters that ship, and where what a user names lies on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dspark.errors import CheckpointError
from dspark.sources import gguf, smollm2

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED = ASSETS / "bundled"
SMOLLM2 = ASSETS / "smollm2"
# Further drafters of the bundled model, by the names that `draft` knows them by.
BUNDLED_DRAFTERS = {
    f"bundled-{name}": ASSETS / "drafters" / name for name in ("dflash", "eagle3", "mtp")
}


def origin(source: str | Path, *, offline: bool = False) -> str | Path:
    """What a target's name stands for: a directory, a GGUF file, or a hub id.

    Args:
        source: a directory, a `.gguf` file or a directory that holds one, a hub id, or
            `smollm2` or `bundled` (`./smollm2` is the directory of that name).
        offline: fetch nothing.

    Raises:
        CheckpointError: it is missing or ambiguous.
    """
    if source == "bundled":
        if not BUNDLED.is_dir():
            raise CheckpointError(f"The bundled model is missing from {BUNDLED}; reinstall dspark.")
        return BUNDLED
    if source == smollm2.NAME:
        return smollm2.locate(offline=offline)
    return gguf.gguf_file(source) or source


def public_name(source: str | Path, *, offline: bool = False) -> str:
    """What other engines can find a target by: the hub id of `smollm2`, else where it lies.

    Raises:
        CheckpointError: as `origin`.
    """
    return smollm2.HUB_ID if source == smollm2.NAME else str(origin(source, offline=offline))


def target_source(
    source: str | Path, *, dtype: torch.dtype | None = None, offline: bool = False
) -> str | Path:
    """Where a target's checkpoint lies: a directory of safetensors, or a hub id.

    Args:
        source: as `origin`.
        dtype: of the weights of a GGUF, which is converted here; None takes its own.
        offline: fetch nothing.

    Raises:
        CheckpointError: it is missing, damaged or ambiguous.
        CompatibilityError: a GGUF cannot be loaded here.
    """
    found = origin(source, offline=offline)
    if not gguf.is_gguf(found):
        return found
    sha256 = smollm2.GGUF_SHA256 if source == smollm2.NAME else None
    return gguf.converted(Path(found), dtype, sha256=sha256)


def drafter_source(source: str | Path) -> str | Path:
    """Where a drafter lies: of a shipped name, beside a GGUF file, or anything else as it is.

    Of a target's name this is where its attached drafter is.
    """
    shipped = {"bundled": BUNDLED, smollm2.NAME: SMOLLM2, **BUNDLED_DRAFTERS}
    if isinstance(source, str) and source in shipped:
        return shipped[source]
    return Path(source).parent if gguf.is_gguf(source) else source
