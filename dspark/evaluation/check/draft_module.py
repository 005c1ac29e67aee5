"""What of a drafter a target's own files hold, by their headers: nothing else is read or loaded."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dspark.drafters.checkpoints.checkpoint import examine
from dspark.drafters.checkpoints.files import ATTACHED_FOLDER, CONFIG, read_json, weight_files
from dspark.drafters.checkpoints.registry import has_drafter_inside
from dspark.evaluation.check.findings import Finding


@dataclass(frozen=True)
class DraftModule:
    """A draft module among a target's tensors.

    Attributes:
        architecture: of the drafter.
        stages: draft layers.
        block_size: drafts a round, K.
        target_layer_ids: captured layers, by their outputs.
        num_target_layers: of how many.
        sliding_window: context rows that a block sees.
        markov_rank: of the Markov head.
        confidence_head: whether there is one.
        mask_token_id: what fills a block.
        tensors: the file's, scales included.
        kinds: number of tensors by dtype.
        bytes: of them in the file.
        loaded_bytes: of the drafter as it is loaded.
        shards: files that hold them.
        all_shards: of how many.
    """

    architecture: str
    stages: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    sliding_window: int | None
    markov_rank: int
    confidence_head: bool
    mask_token_id: int | None
    tensors: int
    kinds: dict[str, int]
    bytes: int
    loaded_bytes: int
    shards: tuple[str, ...]
    all_shards: int

    def findings(self, target: str) -> tuple[Finding, ...]:
        """As notes.

        Args:
            target: the directory, as commands shall name it.
        """
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        heads = (
            f"a Markov head of rank {self.markov_rank}" if self.markov_rank else "no Markov head"
        )
        confidence = "a" if self.confidence_head else "no"
        parts = (
            (
                f"{self.architecture}: {self.stages} stages, {self.block_size} drafts a round from "
                f"outputs of the layers {list(self.target_layer_ids)} of {self.num_target_layers}, "
                f"window {self.sliding_window}, mask token {self.mask_token_id}, {heads}, "
                f"{confidence} confidence head.",
                f"To run it beside its target: dspark check {target} --draft {target}",
            ),
            (
                f"{self.tensors} tensors ({kinds}), {self.bytes / 1e9:.2f} GB, in "
                f"{len(self.shards)} of {self.all_shards} files: {', '.join(self.shards)}.",
                f"Only these are read. Loaded it takes {self.loaded_bytes / 1e9:.2f} GB; as a "
                f"drafter by itself: dspark convert {target} DST --to deepspec --target {target}",
            ),
        )
        return tuple(Finding(what, "note", remedy) for what, remedy in parts)


def has_draft_module(directory: Path) -> bool:
    """Whether a directory is a target's whose own files hold a drafter, and none is attached."""
    path = directory / CONFIG
    attached = (directory / ATTACHED_FOLDER / CONFIG).is_file()
    return path.is_file() and not attached and has_drafter_inside(read_json(path))


def list_draft_module(directory: Path) -> DraftModule:
    """List it, after checking names, shapes and dtypes.

    Raises:
        CheckpointError, CompatibilityError: as `checkpoint.load_drafter`.
    """
    drafter, files = examine(directory)
    config, shards = drafter.config, weight_files(directory)
    kinds = Counter(re.sub(r"^torch\.", "", str(tensor.dtype)) for tensor in files.values())
    return DraftModule(
        architecture=type(drafter).__name__,
        stages=config.backbone.num_layers,
        block_size=drafter.block_size,
        target_layer_ids=drafter.taps,
        num_target_layers=config.num_target_layers,
        sliding_window=config.backbone.sliding_window,
        markov_rank=getattr(config, "markov_rank", 0),
        confidence_head=getattr(config, "confidence_head", False),
        mask_token_id=getattr(config, "mask_token_id", None),
        tensors=len(files),
        kinds=dict(kinds.most_common()),
        bytes=sum(x.numel() * x.element_size() for x in files.values()),
        loaded_bytes=sum(x.numel() * x.element_size() for x in drafter.state_dict().values()),
        shards=tuple(path.name for path, names in shards.items() if files.keys() & set(names)),
        all_shards=len(shards),
    )
