"""Load a target and the drafter that belongs to it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from dspark.drafters.checkpoints.checkpoint import has_attached_drafter, load_drafter
from dspark.drafters.checkpoints.files import resolve
from dspark.drafters.checkpoints.from_target import refuse_other_tokens
from dspark.drafters.checkpoints.registry import make_drafter
from dspark.engine.model import Model
from dspark.errors import DataError, DSparkWarning
from dspark.scheduling.calibration_file import FILE_NAME, Calibration
from dspark.sources import smollm2
from dspark.sources.gguf import is_gguf
from dspark.sources.names import drafter_source
from dspark.targets.fast.graphs import GraphSwitch
from dspark.targets.fast.packing import QuantizeName, WeightsName
from dspark.targets.target import Target

_logger = logging.getLogger(__name__)


def load(
    target: str | Path,
    draft: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    batch_invariant: bool = False,
    cuda_graphs: GraphSwitch = "auto",
    compile: bool = False,
    weights: WeightsName = "auto",
    quantize: QuantizeName | None = None,
    draft_top_k: int | None = None,
) -> Model:
    """Load a target and its drafter.

    Args:
        target: a directory, a `.gguf` file or a directory that holds one, a hub id, "smollm2" or
            "bundled".
        draft: a directory, a `.gguf` file or a hub id; "none" for plain decoding, "ngram" for
            prompt lookup; "smollm2", "bundled", "bundled-dflash", "bundled-eagle3" or
            "bundled-mtp", which ship; None takes the drafter attached to the target's directory
            (beside a `.gguf` file) or among its own tensors, or none where there is none.
        device: auto, cpu, cuda, cuda:i or mps.
        dtype: auto, float32, bfloat16 or float16.
        revision: branch, tag or commit on the hub, for the target.
        offline: use only what is on this machine.
        trust_remote_code: run code that a checkpoint brings along.
        batch_invariant: make what the target computes for a token the same, to the last bit,
            whatever else is in the batch: greedy and coupled outputs are then plain decoding's in
            bfloat16 too. It costs speed (docs/losslessness.md, numerics).
        cuda_graphs: record decoding steps as CUDA graphs; auto does so where it is possible.
        compile: run the target's decoder layers through `torch.compile`: slow first steps, then
            faster ones where a step is made of many small operations.
        weights: auto, plain or packed: on a CPU lay the weights of target and drafter out for its
            kernels once, which makes steps faster; auto does so where it is measured to be.
        quantize: int8: run target and drafter in 8-bit integers on a CPU. Decoding is then
            lossless with respect to the quantised target.
        draft_top_k: as `Model`.

    Raises:
        CheckpointError: a checkpoint is missing, incomplete or damaged.
        CompatibilityError: the architecture is not supported, or not in this mode, or drafter
            and target do not fit.
        UsageError: an option cannot be used here.
    """
    loaded = Target.load(
        target,
        device=device,
        dtype=dtype,
        revision=revision,
        offline=offline,
        trust_remote_code=trust_remote_code,
        batch_invariant=batch_invariant,
        cuda_graphs=cuda_graphs,
        compile=compile,
        weights=weights,
        quantize=quantize,
    )
    return _with_draft(target, draft, loaded, revision, offline, draft_top_k)


def load_draft(
    target: Target, draft: str | Path, *, offline: bool = False, draft_top_k: int | None = None
) -> Model:
    """Pair a target that is in memory with a further drafter.

    Args:
        target: may serve in other pairs at the same time.
        draft: as in `load`, but not None.
        offline: use only what is on this machine.
        draft_top_k: as `Model`.

    Raises:
        CheckpointError, CompatibilityError, UsageError: as `load`.
    """
    return _with_draft(draft, draft, target, None, offline, draft_top_k)


def _with_draft(
    source: str | Path,
    draft: str | Path | None,
    target: Target,
    revision: str | None,
    offline: bool,
    draft_top_k: int | None,
) -> Model:
    if draft == "none":
        return Model(target, draft_top_k=draft_top_k)
    made = None if draft is None else make_drafter(str(draft))
    if made is not None:
        made.bind(target.parts())
        return Model(target, made, name=str(draft), draft_top_k=draft_top_k)
    if draft is None:
        if not has_attached_drafter(source, revision=revision, offline=offline):
            if source == smollm2.NAME:
                _logger.info("This installation has no drafter of smollm2: it decodes plainly.")
            return Model(target, draft_top_k=draft_top_k)
        name, draft = str(source), drafter_source(source)
    else:
        name, revision = str(draft), None
    drafter = load_drafter(draft, revision=revision, offline=offline)
    drafter.to(target.device)
    drafter.bind(target.parts(), num_target_layers=target.num_layers)
    drafter.eval()
    if is_gguf(draft):
        tokenizer = target.tokenizer
        refuse_other_tokens(draft, None if tokenizer is None else tokenizer.get_vocab())
        directory = Path(draft).parent
    else:
        directory = resolve(draft, revision, offline)
    path = directory / FILE_NAME
    calibration = None
    if path.is_file():
        try:
            calibration = Calibration.load(path)
        except DataError as error:
            warnings.warn(DSparkWarning(str(error)), stacklevel=3)
    return Model(
        target,
        drafter,
        name=name,
        directory=directory,
        calibration=calibration,
        draft_top_k=draft_top_k,
    )
