"""Before the first request: the cost table of this machine, and which schedule serves."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import Progress

from dspark.cli.common import Screen
from dspark.request import Request

if TYPE_CHECKING:
    from dspark.engine.engine import Engine
    from dspark.engine.model import Model
    from dspark.scheduling.calibration import TemperatureClass

# A visit of all points that has begun is finished, so measuring may take somewhat longer.
LIMIT_S = 5.0


def kinds_of(requests: Sequence[Request] | None) -> set[TemperatureClass]:
    """Temperature classes of requests; both where they are yet to come."""
    from dspark.scheduling.calibration import temperature_class

    if requests is None:
        return {"greedy", "sampled"}
    return {temperature_class(request.params.temperature) for request in requests}


def measure_costs(
    options: argparse.Namespace,
    model: Model,
    requests: Sequence[Request] | None,
    at_once: int,
    screen: Screen,
) -> None:
    """Measure the cost table where a better schedule could serve with it; it is kept.

    Args:
        options: with `schedule`, `verifier`, `block_size` and `no_profile`.
        model: the pair.
        requests: to be decoded; None where they are yet to come.
        at_once: requests in a round at most.
        screen: for progress.
    """
    from dspark.engine.schedule_choice import cover_costs, wants_costs

    kinds = kinds_of(requests)
    wanted = wants_costs(
        model, kinds, options.schedule, options.verifier, options.block_size, at_once
    )
    if options.no_profile or not wanted:
        return
    started = time.perf_counter()
    with Progress(console=screen.log, transient=True) as bar:
        task = bar.add_task("measuring what steps cost", total=None)
        cover_costs(
            model,
            at_once,
            block_size=options.block_size,
            limit_s=LIMIT_S,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    what = "1 request costs" if at_once == 1 else f"up to {at_once} requests cost"
    screen.log.print(
        f"Measured what steps of {what} on this machine, in {time.perf_counter() - started:.0f} s; "
        "kept in the user's cache (--no-profile skips it).",
        soft_wrap=True,
    )


def tell_schedule(
    model: Model, engine: Engine, requests: Sequence[Request] | None, screen: Screen
) -> None:
    """Print which schedule serves, and why."""
    from dspark.engine.schedule_choice import reason

    if model.drafter is not None:
        sentence = reason(model, engine, kinds_of(requests))
        screen.log.print(sentence, style="dim", soft_wrap=True, markup=False, highlight=False)
