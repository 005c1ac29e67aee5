"""SGLang: the server arguments and temperatures that it runs a drafter with.

The drafter's files are the layout `sglang`; one temperature per position comes from a JSON file.
"""

from __future__ import annotations

import json
from pathlib import Path

from dspark.drafters.checkpoints.eagle import sglang_options
from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.errors import CompatibilityError
from dspark.scheduling.calibration_file import CalibrationEntry

STS_FILE = "sts_temperatures.json"


def server_arguments(drafter: AnyDrafter, directory: str, sts: str | None = None) -> str:
    """The arguments of `python -m sglang.launch_server --model-path TARGET`.

    Args:
        drafter: one that SGLang runs.
        directory: where its files in the layout `sglang` lie.
        sts: the file of its temperatures, if any.
    """
    said = f"{sglang_options(drafter)} --speculative-draft-model-path {directory}"
    return said + (f" --speculative-dspark-confidence-sts-path {sts}" if sts else "")


def takes_temperatures(drafter: AnyDrafter) -> bool:
    """Whether SGLang reads confidences of a drafter: only its DSPARK does, of a head for them."""
    return (
        isinstance(drafter, DSparkDrafter)
        and drafter.config.markov_rank > 0
        and drafter.config.confidence_head
    )


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
