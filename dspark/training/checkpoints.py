"""Checkpoints of a run: written whole or not at all, by any number of ranks, read by any other.

    OUTPUT/checkpoints/step_00000200/
        state.json           where the run stood; `Position`
        .metadata, *.distcp  masters, moving average, optimiser (torch.distributed.checkpoint)
    OUTPUT/best/             the drafter of the best measurement, as it is served

A checkpoint is written beside the others under another name and then renamed, so that whatever
happens in between leaves the others as they were. Like a program, it is to be read from people who
are trusted: torch.distributed.checkpoint keeps its index as a pickle.
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

from dspark.data.files.atomic import sync_directory
from dspark.errors import CheckpointError, TrainingError, first_line
from dspark.training.optim import MasterOptimiser
from dspark.training.parallel import barrier, gather

FOLDER, STATE, BEST = "checkpoints", "state.json", "best"
_OLDER = Path("latest") / "state.pt"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: steps done.
        fixed: settings that a run cannot change on its way, by the recipe's names.
        metrics: the last step's.
        best_step, best_accepted_length: of the best measurement so far, if there is one.
    """

    step: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_accepted_length: float | None = None


def path_of(output: Path, step: int) -> Path:
    """The directory of the checkpoint after so many steps."""
    return output / FOLDER / f"step_{step:08d}"


def saved_steps(output: Path) -> list[int]:
    """The steps after which there is a checkpoint, ascending.

    Raises:
        TrainingError: there is one of an older version, which cannot be read.
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
    """Write a checkpoint, all ranks together, then drop all but the `keep_last` newest.

    Raises:
        TrainingError: it cannot be written; those that were there stay.
    """
    final = path_of(output, position.step)
    fresh = final.with_name(f"{final.name}.new")

    def prepare() -> None:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)

    def finish() -> None:
        _write_json(fresh / STATE, asdict(position))
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
    """Keep the newest checkpoints only, and mend what a killed run has left half done."""
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
    """Where the newest checkpoint stands.

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
    """Refuse to go on with settings that would make it another run.

    Raises:
        TrainingError: names the first one.
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
    """Put a complete directory in the place of another, or where there is none."""
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def _on_first_rank(rank: int, action: Callable[[], None]) -> None:
    """Let the first rank do something for all; what it raises is raised by all."""
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
    """What went wrong, in few words; failures of other ranks come wrapped."""
    if isinstance(error, CheckpointException):
        for wrapped, _ in error.failures.values():
            return _cause(wrapped)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint warns where there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        yield
