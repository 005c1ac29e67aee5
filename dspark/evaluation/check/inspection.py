"""Inspection of a pair: faults visible without decoding.

`list_draft_module` tells what of a drafter a target's own files hold, by their headers: nothing
else is read or loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspark.drafters.checkpoints.checkpoint import examine
from dspark.drafters.checkpoints.files import ATTACHED_FOLDER, CONFIG, read_json, weight_files
from dspark.drafters.checkpoints.registry import has_drafter_inside
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.target_bound import TargetBound
from dspark.engine.model import Model
from dspark.evaluation.check.findings import Finding
from dspark.targets.target import Target


def inspect(model: Model, prompts: Sequence[Sequence[int]]) -> list[Finding]:
    """Inspect configurations, dtypes and vocabularies.

    Args:
        model: a target with a tokenizer, and its drafter.
        prompts: token ids of rendered prompts, which show the tokens that text uses.
    """
    target, drafter = model.target, model.drafter
    findings = [*_vocabulary(target), *_template(target), *_precision(target)]
    if isinstance(drafter, TargetBound):
        findings += [
            *_made_for(drafter, target),
            *_own_tables(drafter),
            *_draft_precision(drafter, target),
        ]
    if isinstance(drafter, DSparkDrafter):
        used = {token for prompt in prompts for token in prompt} | target.eos_token_ids
        findings += [
            *_block(drafter),
            *_mask_token(drafter, target.tokenizer, used),
            *_heads(drafter),
        ]
    return findings


def _vocabulary(target: Target) -> Iterator[Finding]:
    known, rows = len(target.tokenizer), target.vocab_size
    if known > rows:
        yield Finding(
            f"The tokenizer has {known} tokens, but the target's head only {rows} rows.",
            "error",
            "Use the tokenizer that belongs to the target's checkpoint.",
        )
    if known < rows:
        yield Finding(
            f"The target's head is padded: {rows} rows for {known} tokens.",
            "note",
            "Nothing to do here; a drafter must have all rows, as this one has.",
        )


def _template(target: Target) -> Iterator[Finding]:
    if not target.tokenizer.chat_template:
        yield Finding(
            "The target has no chat template, so prompts are taken as raw text.",
            "warning",
            "For a chat model, fetch its tokenizer_config.json or chat_template.jinja; for a base "
            "model, train the drafter on raw text too.",
        )


def _precision(target: Target) -> Iterator[Finding]:
    quantization = getattr(target.config, "quantization_config", None)
    if quantization is not None:
        yield Finding(
            "The target is quantised; the drafter was trained on features of the full model.",
            "warning",
            "Compare its accepted length with that of the full target; if it is lower, train the "
            "drafter on the quantised one.",
        )


def _made_for(drafter: TargetBound[Any], target: Target) -> Iterator[Finding]:
    made_for: int = drafter.config.num_target_layers
    # Layouts without the number of layers (speculators) report the last tap's.
    told = made_for > drafter.taps[-1] + 1
    if made_for > target.num_layers or (told and made_for != target.num_layers):
        yield Finding(
            f"The drafter was made for a target of {made_for} layers, but this one has "
            f"{target.num_layers}.",
            "warning",
            "Use the drafter of this target, or correct num_target_layers in its config.json.",
        )


def _block(drafter: DSparkDrafter) -> Iterator[Finding]:
    if drafter.block_size == 1:
        yield Finding(
            "The drafter's block_size is 1, so a round gains 2 tokens at most.",
            "warning",
            "Train a drafter with a larger block_size (7 is usual).",
        )


def _mask_token(drafter: DSparkDrafter, tokenizer: Any, used: set[int]) -> Iterator[Finding]:
    mask = drafter.config.mask_token_id
    if mask is None or mask >= len(tokenizer):
        return
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    shown = f"The drafter's mask token {mask} ({tokenizer.convert_ids_to_tokens(mask)!r})"
    if mask in used:
        what = f"{shown} occurs in rendered prompts or ends answers."
    elif mask not in special:
        what = f"{shown} is a token of ordinary text."
    else:
        return
    yield Finding(
        what,
        "warning",
        "Check mask_token_id in the drafter's config.json; it should be an id that the tokenizer "
        "does not use in text.",
    )


def _own_tables(drafter: TargetBound[Any]) -> Iterator[Finding]:
    own = {"embed_tokens": drafter.own_embedding_VH, "lm_head": drafter.own_head_VH}
    reduced = drafter.d2t is not None  # its head is always its own
    differing = [
        name
        for name, table in own.items()
        if table is not None and not (reduced and name == "lm_head")
    ]
    if differing:
        yield Finding(
            f"The drafter brings its own {' and '.join(differing)}, different from the target's.",
            "warning",
            "Check that it was made for this very target and not for a base or fine-tuned sibling.",
        )


def _heads(drafter: DSparkDrafter) -> Iterator[Finding]:
    if drafter.markov_head is None:
        yield Finding(
            "The drafter has no sequential head: its drafts do not see each other.",
            "note",
            "Nothing to do for a DFlash drafter; a DSpark drafter should have markov_rank above 0.",
        )
    if drafter.confidence_head is None:
        yield Finding(
            "The drafter has no confidence head; the margin of its logits is used instead.",
            "note",
            "Nothing to do; thresholds mean less until the margin is calibrated.",
        )


def _draft_precision(drafter: TargetBound[Any], target: Target) -> Iterator[Finding]:
    own = next(drafter.parameters()).dtype
    if target.dtype == torch.float16 and own != torch.float16:
        name = str(own).removeprefix("torch.")
        yield Finding(
            f"The drafter's weights are {name}, but it runs in float16, whose range is smaller.",
            "warning",
            "Use --dtype bfloat16 or float32.",
        )


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
