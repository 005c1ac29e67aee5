"""Checkpoints of a run: atomic, written by any number of ranks, readable by any other number.

    OUTPUT/checkpoints/step_00000200/
        state.json           progress of the run; `Position`
        .metadata, *.distcp  masters, moving average, optimiser (torch.distributed.checkpoint)
    OUTPUT/best/             the drafter of the best measurement, in the served layout

A checkpoint is written under a temporary name and then renamed, so that an interruption leaves the
others intact. Load only checkpoints from trusted sources: torch.distributed.checkpoint keeps its
index as a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from dspark.data.files.atomic import replace_file, sync_directory
from dspark.errors import CheckpointError, TrainingError, first_line
from dspark.training.optim import MasterOptimiser
from dspark.training.parallel import barrier, gather

FOLDER, STATE, BEST = "checkpoints", "state.json", "best"
_OLDER = Path("latest") / "state.pt"


@dataclass(frozen=True)
class Position:
    """Progress of a run.

    Attributes:
        step: steps done.
        fixed: settings that a resumed run cannot change, by the recipe's names.
        metrics: of the last step.
        best_step, best_accepted_length: of the best measurement so far, if any.
    """

    step: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_accepted_length: float | None = None


def path_of(output: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` steps."""
    return output / FOLDER / f"step_{step:08d}"


def saved_steps(output: Path) -> list[int]:
    """The steps of the existing checkpoints, ascending.

    Raises:
        TrainingError: one is of an older, unreadable version.
    """
    if (output / _OLDER).is_file():
        raise TrainingError(
            f"{output / _OLDER} is a checkpoint of an older version, which cannot be read; go on "
            "with that version, or give another output_dir."
        )
    if not (output / FOLDER).is_dir():
        return []
    names = (re.fullmatch(r"step_(\d{8,})", p.name) for p in (output / FOLDER).iterdir())
    return sorted(int(name[1]) for name in names if name)


def save(
    output: Path, optimiser: MasterOptimiser, position: Position, *, keep_last: int, rank: int
) -> None:
    """Write a checkpoint, all ranks together, then delete all but the `keep_last` newest.

    Raises:
        TrainingError: it cannot be written; existing ones stay.
    """
    final = path_of(output, position.step)
    fresh = final.with_name(f"{final.name}.new")

    def prepare() -> None:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)

    def finish() -> None:
        replace_file(fresh / STATE, json.dumps(asdict(position), indent=2))
        put_in_place(fresh, final)
        tidy(output, keep_last)

    try:
        _on_first_rank(rank, prepare)
        with _single_process_is_fine():
            save_shards(optimiser.state_dict(), checkpoint_id=fresh)
        _on_first_rank(rank, finish)
    except (CheckpointException, OSError) as error:
        if rank == 0:
            shutil.rmtree(fresh, ignore_errors=True)
        raise TrainingError(_not_written(output, position.step, error)) from error


def tidy(output: Path, keep_last: int) -> None:
    """Keep only the newest checkpoints, and clean up after a killed run."""
    for old in [output / f"{BEST}.old", *(output / FOLDER).glob("step_*.old")]:
        if not old.exists():
            continue
        whole = old.with_suffix("")
        if whole.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, whole)
    for fresh in [output / f"{BEST}.new", *(output / FOLDER).glob("step_*.new")]:
        shutil.rmtree(fresh, ignore_errors=True)
    for step in saved_steps(output)[:-keep_last]:
        shutil.rmtree(path_of(output, step))


def read_position(output: Path) -> Position:
    """The position of the newest checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    path = path_of(output, saved_steps(output)[-1])
    try:
        return Position(**json.loads((path / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def load(output: Path, optimiser: MasterOptimiser) -> None:
    """Restore the newest checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    path = path_of(output, saved_steps(output)[-1])
    try:
        names = list(FileSystemReader(path).read_metadata().state_dict_metadata)
        state: dict[str, Tensor] = optimiser.blank_state(names)
        with _single_process_is_fine():
            load_shards(state, checkpoint_id=path)
        optimiser.load_state_dict(state)
    except (CheckpointException, OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        raise _damaged(path, error) from error


def check_same_run(output: Path, position: Position, fixed: Mapping[str, Any]) -> None:
    """Refuse to resume with settings that change the run.

    Raises:
        TrainingError: names the first such setting.
    """
    for name, wanted in fixed.items():
        had = position.fixed.get(name)
        if had != wanted:
            raise TrainingError(
                f"The run in {output} was started with {name} {had}, not {wanted}, on which all "
                "its steps depend; resume it with the same."
            )


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} cannot be read ({_cause(error)}); remove it to go on from the one "
        "before it, or give another output_dir."
    )


def put_in_place(fresh: Path, final: Path) -> None:
    """Atomically replace a directory, if it exists, by a complete one."""
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _on_first_rank(rank: int, action: Callable[[], None]) -> None:
    """Run an action on the first rank; all ranks raise its error."""
    error: OSError | None = None
    if rank == 0:
        try:
            action()
        except OSError as found:
            error = found
    [failure, *_] = gather(error)
    if failure is not None:
        raise failure
    barrier()


def _not_written(output: Path, step: int, error: BaseException) -> str:
    others = saved_steps(output)
    kept = f"the one before it, {path_of(output, others[-1])}, is whole" if others else "none is"
    return (
        f"The checkpoint after step {step} could not be written ({_cause(error)}); {kept}: make "
        "room on the disk and go on with --resume."
    )


def _cause(error: BaseException) -> str:
    """The cause of an error in a few words; failures of other ranks are wrapped."""
    if isinstance(error, CheckpointException):
        for wrapped, _ in error.failures.values():
            return _cause(wrapped)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Suppress torch.distributed.checkpoint's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        yield
