"""Which schedule serves a pair, by its calibration and by what steps cost on this machine."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Set
from typing import TYPE_CHECKING, Any, Protocol

from dspark.drafters.base import Drafter
from dspark.engine.profile import Progress
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule, ScheduleName
from dspark.errors import CompatibilityError, DataError, DSparkWarning
from dspark.request import Verifier
from dspark.scheduling.calibration import TemperatureClass
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost_table import CostTable

if TYPE_CHECKING:
    from dspark.engine.engine import Engine


class Pair(Protocol):
    """What is asked of a target with its drafter (`engine.model.Model`)."""

    @property
    def drafter(self) -> Drafter | None: ...
    @property
    def calibration(self) -> Calibration | None: ...
    @property
    def costs(self) -> CostTable | None: ...
    def profile(
        self,
        *,
        max_requests: int,
        block_size: int | None,
        limit_s: float | None,
        progress: Progress | None,
    ) -> CostTable:
        """Measure what rounds cost on this machine."""
        ...

    def profile_trees(self, most: int, nodes: int, block_size: int | None) -> CostTable:
        """Measure what rounds of so many requests cost that draft trees of so many nodes."""
        ...


def choose_schedule(
    model: Pair,
    kinds: Set[TemperatureClass],
    name: ScheduleName | None,
    threshold: float | None,
    verifier: Verifier,
    block_size: int | None,
    at_once: int,
) -> Schedule | Scheduler:
    """The schedule asked for, with all it needs, or the default one.

    Args:
        model: the pair. Where an asked-for schedule weighs costs that are not known, they are
            measured.
        kinds: temperature classes of the requests to come.
        name: None or `auto` takes `lagged` where the drafter is calibrated for these requests and
            a cost table covers them, else `auto` itself.
        threshold: of the schedule `threshold`.
        verifier: token, block or coupled.
        block_size: drafts per round; None for the drafter's own.
        at_once: requests in a round at most.

    Raises:
        UsageError: name, threshold or block size cannot be used.
    """
    if model.drafter is None:
        return Schedule(name or "auto", threshold)
    num_drafts = block_size or model.drafter.block_size
    calibration = model.calibration
    lacks = _lacks(model, kinds, verifier, block_size)
    if name in (None, "auto") and threshold is None:
        lagged = not lacks and _covering_costs(model, at_once) is not None
        name = "lagged" if lagged else "auto"
    schedule = Schedule(name or "auto", threshold)
    if schedule.reads_confidences and calibration is not None:
        for sentence in lacks:
            warnings.warn(DSparkWarning(sentence), stacklevel=3)
    costs = _covering_costs(model, at_once) if schedule.protects else None
    if schedule.weighs_costs and costs is None:
        costs = cover_costs(model, at_once, block_size=block_size)
    return Scheduler(schedule, verifier, num_drafts, calibration, costs)


def choose_trees(
    model: Pair, chains: Schedule | Scheduler, nodes: int | None, at_once: int
) -> dict[str, Any]:
    """The engine's options about trees.

    Args:
        model: the pair. Where the schedule weighs costs and trees are larger than a chain, whose
            costs do not reach so far, those of trees are measured.
        chains: the schedule, as `choose_schedule` has found it.
        nodes: of a tree at most; None for chains alone.
        at_once: requests in a round at most.
    """
    if model.drafter is None or not isinstance(chains, Scheduler) or nodes is None:
        return {}
    costs = None
    if chains.schedule.weighs_costs and nodes > chains.num_drafts:
        costs = model.profile_trees(at_once, nodes, chains.num_drafts)
    return {"tree_nodes": nodes, "tree_costs": costs}


def cover_costs(
    model: Pair,
    at_once: int,
    *,
    block_size: int | None = None,
    limit_s: float | None = None,
    save: bool = True,
    progress: Progress | None = None,
) -> CostTable:
    """Measure what steps of so many requests cost, and keep it in the user's cache.

    Doubts about the table are warned of; a cache that cannot be written is no obstacle.

    Args:
        model: a target with its drafter.
        at_once: requests in a round at most.
        block_size: drafts per round; None for the drafter's own.
        limit_s: no further visit of the points begins after so many seconds.
        save: whether to keep it.
        progress: of the measurement.

    Raises:
        UsageError: there is no drafter, or a size is not possible.
    """
    costs = model.profile(
        max_requests=at_once, block_size=block_size, limit_s=limit_s, progress=progress
    )
    for sentence in costs.warnings():
        warnings.warn(DSparkWarning(sentence), stacklevel=2)
    if save:
        with contextlib.suppress(DataError):
            costs.save()
    return costs


def wants_costs(
    model: Pair,
    kinds: Set[TemperatureClass],
    name: ScheduleName | None,
    verifier: Verifier,
    block_size: int | None,
    at_once: int,
) -> bool:
    """Whether a cost table that is not there would let a better schedule serve by default."""
    if model.drafter is None or name not in (None, "auto"):
        return False
    lacks = _lacks(model, kinds, verifier, block_size)
    return not lacks and _covering_costs(model, at_once, quietly=True) is None


def reason(model: Pair, engine: Engine, kinds: Set[TemperatureClass]) -> str:
    """One sentence: which schedule serves, and why."""
    scheduler = engine.scheduler
    if scheduler is None or model.drafter is None:
        return "Schedule: off (nothing is drafted)."
    name = scheduler.schedule.name
    if scheduler.schedule.weighs_costs:
        lacks = _lacks(model, kinds, engine.verifier, engine.num_drafts)
        how = lacks[0].rstrip(".") if lacks else "calibrated drafter, cost table of this machine"
        return f"Schedule: {name} ({how}){_of_trees(engine)}."
    if name != "auto":
        return f"Schedule: {name} (as asked){_of_trees(engine)}."
    auto = "Schedule: auto, whole blocks while they are faster than plain decoding"
    if getattr(model.drafter, "confidence_head", None) is None:
        return f"{auto} (the drafter has no confidences to schedule by){_of_trees(engine)}."
    lacks = _lacks(model, kinds, engine.verifier, engine.num_drafts)
    missing = "the drafter is not calibrated for this (dspark calibrate)"
    if not lacks:
        most = engine.max_requests
        missing = f"no cost table for {most} requests (dspark profile --max-requests {most})"
    return f"{auto} ({missing}; with both, lagged would serve){_of_trees(engine)}."


def _of_trees(engine: Engine) -> str:
    nodes = engine.tree_nodes
    if nodes is None:
        return ""
    where = ", in rounds where they are faster than chains" if engine.schedule.protects else ""
    return f"; trees of up to {nodes} nodes{where}"


def _lacks(
    model: Pair, kinds: Set[TemperatureClass], verifier: Verifier, block_size: int | None
) -> list[str]:
    """A sentence for every calibration that is missing."""
    assert model.drafter is not None
    if model.calibration is None:
        return ["The drafter has no calibration."]
    return model.calibration.lacks(block_size or model.drafter.block_size, verifier, kinds)


def _covering_costs(model: Pair, at_once: int, *, quietly: bool = False) -> CostTable | None:
    """A cost table for so many requests, if there is one; one that is damaged is warned of."""
    try:
        costs = model.costs
    except (DataError, CompatibilityError) as error:
        if not quietly:
            warnings.warn(DSparkWarning(str(error)), stacklevel=4)
        return None
    return costs if costs is not None and costs.covers(at_once) else None
