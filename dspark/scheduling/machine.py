"""Which machine, model pair and precision a cost table belongs to."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MachineKey:
    """What a cost table belongs to; a table of any other is refused.

    Attributes:
        hardware: name of the processor or accelerator.
        threads: of the CPU.
        dtype: of the target's weights, `float32` and the like, and the mode that it runs in:
            `float32 batch-invariant`, `bfloat16 with CUDA graphs`.
        target: directory or hub id with its revision.
        drafter: the same of the drafter; empty without one.
    """

    hardware: str
    threads: int
    dtype: str
    target: str
    drafter: str

    def path(self) -> Path:
        """Where the user's cache keeps this machine's table ($XDG_CACHE_HOME or ~/.cache)."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.target).name).strip("-")[:40] or "target"
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        return cache / "dspark" / "costs" / f"{name}-{digest}.json"
