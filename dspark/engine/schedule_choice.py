"""Which schedule serves a pair, by its calibration and by what steps cost on this machine."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Set
from typing import TYPE_CHECKING

from dspark.engine.schedule import Schedule, ScheduleName
from dspark.engine.scheduler import Scheduler
from dspark.errors import CompatibilityError, DataError, DSparkWarning
from dspark.request import Verifier
from dspark.scheduling.calibration import TemperatureClass

if TYPE_CHECKING:
    from dspark.engine.model import Model


def choose_schedule(
    model: Model,
    kinds: Set[TemperatureClass],
    name: ScheduleName | None,
    threshold: float | None,
    verifier: Verifier,
    block_size: int | None,
    at_once: int,
) -> Schedule | Scheduler:
    """The schedule asked for, with all it needs, or the default one.

    Args:
        model: the pair. Where the schedule weighs costs that are not known, they are measured.
        kinds: temperature classes of the requests to come.
        name: None takes `lagged` where the drafter is calibrated for these requests and this
            machine is profiled, else `fixed`.
        threshold: of the schedule `threshold`.
        verifier: token, block or coupled.
        block_size: drafts per round; None for the drafter's own.
        at_once: requests in a round at most.

    Raises:
        UsageError: name, threshold or block size cannot be used.
    """
    if model.drafter is None:
        return Schedule(name or "fixed", threshold)
    num_drafts = block_size or model.drafter.block_size
    calibration = model.calibration
    lacks = [] if calibration is None else calibration.lacks(num_drafts, verifier, kinds)
    if name is None:
        calibrated = calibration is not None and not lacks
        name = "lagged" if calibrated and _has_usable_costs(model) else "fixed"
    schedule = Schedule(name, threshold)
    for sentence in lacks if schedule.reads_confidences else []:
        warnings.warn(DSparkWarning(sentence), stacklevel=3)
    costs = model.costs if schedule.weighs_costs else None
    if schedule.weighs_costs and (costs is None or not costs.covers(at_once)):
        costs = model.profile(max_requests=at_once, block_size=block_size)
        for sentence in costs.warnings():
            warnings.warn(DSparkWarning(sentence), stacklevel=3)
        with contextlib.suppress(DataError):  # a cache that cannot be written is no obstacle
            costs.save()
    return Scheduler(schedule, verifier, num_drafts, calibration, costs)


def _has_usable_costs(model: Model) -> bool:
    """Whether there is a cost table; one that is damaged is warned of."""
    try:
        return model.costs is not None
    except (DataError, CompatibilityError) as error:
        warnings.warn(DSparkWarning(str(error)), stacklevel=4)
        return False
