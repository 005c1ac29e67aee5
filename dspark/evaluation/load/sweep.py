"""Load sweeps: schedules side by side, the same requests at every concurrency, in turn."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.engine import schedule_choice
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.profile import Progress
from dspark.engine.speculation.schedule import Schedule, ScheduleName
from dspark.errors import CompatibilityError, DataError, DSparkWarning, UsageError
from dspark.evaluation.load.closed_loop import LoadRun, closed_loops, out_of_step, warm_up
from dspark.request import Request, Verifier

ContenderName = Literal["off", "fixed", "mtp1", "prefix", "lagged", "lookahead"]
CONTENDERS: tuple[ContenderName, ...] = get_args(ContenderName)
LIMIT_S = 30.0
Runs = dict[tuple[int, str], list[LoadRun]]
"""(users, contender) -> a run per repeat."""


@dataclass(frozen=True)
class Contender:
    """One way of decoding.

    Attributes:
        name: in the results.
        model: a target with or without a drafter.
        schedule: None for plain decoding.
        block_size: drafts per round; None for the drafter's own.
        tree_nodes: nodes of draft trees at most; None for chains.
    """

    name: ContenderName
    model: Model
    schedule: ScheduleName | None
    block_size: int | None = None
    tree_nodes: int | None = None

    @property
    def weighs_costs(self) -> bool:
        """Whether its schedule needs a cost table."""
        return self.schedule is not None and Schedule(self.schedule).weighs_costs

    def engine(self, requests: Sequence[Request], users: int, verifier: Verifier) -> Engine:
        """A new engine with room for these requests, `users` of them at once."""
        return self.model.engine(
            requests,
            batch_size=users,
            verifier=verifier,
            schedule=self.schedule,
            block_size=self.block_size,
            tree_nodes=self.tree_nodes,
        )


def contenders(
    model: Model,
    names: Sequence[ContenderName],
    mtp: Model | None = None,
    tree_nodes: int | None = None,
) -> list[Contender]:
    """The contenders of the given names.

    Args:
        model: a target with its drafter, if any.
        names: of the contenders.
        mtp: the same target with an MTP drafter, for `mtp1`.
        tree_nodes: nodes of the model's draft trees at most; None for chains.

    Raises:
        UsageError: a name needs a drafter that is missing.
    """
    found = []
    for name in names:
        if name == "off":
            found.append(Contender("off", Model(model.target), None))
        elif name == "mtp1":
            if mtp is None:
                raise UsageError("The schedule 'mtp1' needs an MTP drafter; give one with --mtp.")
            found.append(Contender("mtp1", mtp, "fixed", block_size=1))
        elif model.drafter is None:
            raise UsageError(
                f"The schedule {name!r} needs a drafter, and there is none; give one with --draft, "
                "or ask for --schedule off."
            )
        else:
            found.append(Contender(name, model, name, tree_nodes=tree_nodes))
    return found


def is_mtp(model: Model) -> bool:
    """Whether a model's own drafter is MTP-1: Eagle3's layer with a single pass."""
    return isinstance(model.drafter, Eagle3Drafter) and model.drafter.block_size == 1


def cover_costs(
    model: Model, most: int, *, save: bool = True, progress: Progress | None = None
) -> bool:
    """Measure the model's cost table unless it covers `most` requests; whether it was measured.

    Args:
        model: a target with its drafter.
        most: requests at once.
        save: keep a measured table in the user's cache.
        progress: of the measurement.
    """
    if has_costs(model, most):
        return False
    schedule_choice.cover_costs(model, most, limit_s=LIMIT_S, save=save, progress=progress)
    return True


def has_costs(model: Model, most: int) -> bool:
    """Whether a valid cost table covers `most` requests."""
    with contextlib.suppress(DataError, CompatibilityError):
        return model.costs is not None and model.costs.covers(most)
    return False


@dataclass(frozen=True)
class Workload:
    """The requests of every run.

    Attributes:
        pool: requests taken in turn; a run that sends more repeats them with other seeds. Repeated
            prompts may hit an engine's prefix cache, for every contender alike, so provide more
            prompts than are answered.
        count: least number of counted answers per run; at least twice the users count, so that a
            run is longer than its start.
    """

    pool: tuple[Request, ...]
    count: int = 16

    def request(self, index: int) -> Request:
        """Request number `index`; negative numbers are for warming up."""
        request = self.pool[index % len(self.pool)]
        turn = index // len(self.pool) % (1 << 16)
        return replace(request, params=request.params.with_seed(request.params.seed + (turn << 32)))

    def answers(self, users: int) -> int:
        """Number of counted answers at a concurrency."""
        return max(self.count, 2 * users)


def run_in_turn(
    ways: Sequence[Contender], workload: Workload, users: int, verifier: Verifier
) -> list[LoadRun]:
    """A run of each, step by step in turn, on new engines that other requests have warmed up."""
    room = [workload.request(i) for i in range(max(users, len(workload.pool)))]
    engines = [way.engine(room, users, verifier) for way in ways]
    for engine in engines:
        warm_up(engine, [workload.request(-1 - i) for i in range(users)])
    supply = out_of_step(workload.request, users)
    shortened = users if users > 1 else 0  # they come before the answers that count
    count = workload.answers(users) + shortened
    runs = closed_loops(engines, supply, users=users, count=count)
    return [replace(run, answers=run.answers[shortened:]) for run in runs]


def sweep(
    ways: Sequence[Contender],
    workload: Workload,
    concurrency: Sequence[int],
    *,
    repeats: int,
    verifier: Verifier = "block",
    progress: Callable[[int, int, str, LoadRun], None] | None = None,
) -> Runs:
    """Run every contender at every concurrency, `repeats` times.

    At each concurrency the contenders step in turn (`closed_loops`), each time another one first,
    so that a slow moment of the machine affects all of them.

    Args:
        ways: the contenders.
        workload: the requests.
        concurrency: numbers of users.
        repeats: of everything.
        verifier: token, block or coupled.
        progress: called with (repeat, users, contender, run) after every run.

    Raises:
        RequestError: a request does not fit, or failed.
    """
    runs: Runs = {(users, way.name): [] for users in concurrency for way in ways}
    for repeat in range(repeats):
        for place, users in enumerate(concurrency):
            turn = rotated(ways, repeat + place)
            with warnings.catch_warnings():
                if repeat + place > 0:  # warnings appear in the first turn only
                    warnings.simplefilter("ignore", DSparkWarning)
                found = run_in_turn(turn, workload, users, verifier)
            for way, run in zip(turn, found, strict=True):
                runs[users, way.name].append(run)
                if progress is not None:
                    progress(repeat, users, way.name, run)
    return runs


def rotated(ways: Sequence[Contender], turn: int) -> list[Contender]:
    """The contenders, rotated by the number of the turn."""
    start = turn % len(ways)
    return [*ways[start:], *ways[:start]]


def same_answers(runs: Mapping[tuple[int, str], Sequence[LoadRun]], users: int, name: str) -> float:
    """Share of a contender's counted answers that equal those of `off`, token for token."""
    ours, plain = (runs[users, way][0].answers for way in (name, "off"))
    same = [a.output.token_ids == b.output.token_ids for a, b in zip(ours, plain, strict=True)]
    return sum(same) / len(same)
