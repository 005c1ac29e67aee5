"""SGLang: the files and server arguments that it runs a DSpark drafter with.

It reads the published layout (`architectures: ["Qwen3DSparkModel"]`, gated and RNN heads too) and
one temperature per position from a JSON file; a file of the speculators library and a drafter
without a Markov head it refuses by itself. Facts of its repository, release 0.5.23; not run here.
"""

from __future__ import annotations

import json
from pathlib import Path

from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.errors import CompatibilityError
from dspark.scheduling.calibration_file import CalibrationEntry

STS_FILE = "sts_temperatures.json"


def beyond(drafter: AnyDrafter) -> list[str]:
    """What of a drafter SGLang has no place for; empty where it runs."""
    if not isinstance(drafter, DSparkDrafter):
        return [
            "Eagle3's layer, whose files for SGLang (the EAGLE authors' layout) are not written"
        ]
    config = drafter.config
    wrong = {
        "markov_rank 0 (its DSPARK wants a Markov head)": config.markov_rank == 0,
        "a learned mask embedding": config.mask_token_id is None,
        "sample_from_anchor false": not config.sample_from_anchor,
        "a reduced vocabulary": config.draft_vocab_size is not None,
        "sliding windows": bool(config.backbone.sliding_layers),
    }
    return [name for name, there in wrong.items() if there]


def refuse(drafter: AnyDrafter) -> None:
    """Refuse what SGLang does not run.

    Raises:
        CompatibilityError: naming it.
    """
    if found := beyond(drafter):
        raise CompatibilityError(
            f"The drafter has {' and '.join(found)}, which SGLang does not run; serve it with "
            "dspark."
        )


def server_arguments(drafter: AnyDrafter, directory: str, sts: str | None = None) -> str:
    """The arguments of `python -m sglang.launch_server --model-path TARGET`.

    Args:
        drafter: that `beyond` finds nothing in.
        directory: where its published layout lies.
        sts: the file of its temperatures, if any.
    """
    said = (
        f"--speculative-algorithm DSPARK --speculative-draft-model-path {directory} "
        f"--speculative-dspark-block-size {drafter.block_size}"
    )
    return said + (f" --speculative-dspark-confidence-sts-path {sts}" if sts else "")


def write_temperatures(entry: CalibrationEntry, directory: Path) -> Path:
    """Write a calibration as SGLang reads it: one temperature per position.

    Raises:
        CompatibilityError: it has shifts, for which that file has no place.
    """
    if any(entry.scaling.shifts):
        raise CompatibilityError(
            f"The calibration of block size {entry.block_size} has shifts, for which SGLang has no "
            "place; calibrate with --temperatures-only."
        )
    record = {
        "temperatures": list(entry.scaling.temperatures),
        "num_samples": entry.rounds,
        "ece_before": [r.ece for r in entry.before],
        "ece_after": [r.ece for r in entry.after],
    }
    path = directory / STS_FILE
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
