"""Engines of the live page, one per choice of drafter, verifier and schedule.

An engine has one drafter, one verifier and one schedule for all its requests, so a visitor's choice
is an engine of its own. All of them share the target's weights with the server's engine, and take
turns with it step by step; none shares its cache, its places or its queue.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dspark.engine.engine import Engine
from dspark.engine.loading import load_draft
from dspark.engine.model import Model
from dspark.engine.speculation.schedule import SCHEDULES, Schedule, ScheduleName
from dspark.errors import (
    CompatibilityError,
    DataError,
    DSparkWarning,
    QueueFullError,
    UnavailableError,
    UsageError,
)
from dspark.params import SamplingParams
from dspark.request import VERIFIERS, Request, Verifier
from dspark.scheduling.cost_table import CostTable
from dspark.serving.counters import Totals
from dspark.serving.round_events import RoundEvent
from dspark.serving.service import EngineService
from dspark.serving.streams import Subscription

Kind = tuple[str, str, str]
"""(drafter, verifier, schedule)"""
NONE = "none"
MOST_TOKENS = 2048
MOST_WAITING = 8
_WARM_UP_TOKENS = 16
_LABELS = {
    "smollm2": "DSpark",
    "bundled": "DSpark",
    "bundled-dflash": "DFlash",
    "bundled-eagle3": "Eagle3",
    "bundled-mtp": "MTP-1",
    "ngram": "prompt lookup (n-grams)",
}


@dataclass(frozen=True)
class Choice:
    """What a visitor wants to see at work.

    Attributes:
        drafter: its name among the engines' models; `none` decodes plainly.
        verifier: which rule decides whether a draft stays.
        schedule: which drafts are verified.
        threshold: of the schedule `threshold`.

    Raises:
        UsageError: verifier or schedule are unknown, or threshold and schedule do not fit.
    """

    drafter: str
    verifier: Verifier = "block"
    schedule: ScheduleName = "fixed"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.verifier not in VERIFIERS:
            names = ", ".join(VERIFIERS)
            raise UsageError(f"verifier is {self.verifier!r}, but must be one of {names}.")
        Schedule(self.schedule, self.threshold)

    @property
    def plain(self) -> bool:
        """Whether nothing is drafted."""
        return self.drafter == NONE or self.schedule == "off"

    @property
    def kind(self) -> Kind:
        """What its rounds are counted under: thresholds are too many to be told apart."""
        return self.drafter, self.verifier, self.schedule

    @property
    def plainly(self) -> Choice:
        """What it is compared with: nothing drafted, the draws of `coupled` where those are its."""
        return Choice(NONE, "coupled" if self.verifier == "coupled" else "block", "off")


@dataclass(frozen=True)
class PageEngine:
    """An engine at work for the page.

    Attributes:
        choice: what it does.
        service: its engine, started.
        notes: a sentence for each thing that makes its schedule doubtful.
    """

    choice: Choice
    service: EngineService
    notes: tuple[str, ...]


class PageEngines:
    """Opens and closes the page's engines; one run takes place at a time.

    Args:
        main: the server's engine, whose target and sizes they have.
        models: what can draft, by name, the default first; all of one target.

    Attributes:
        main: the server's engine.
        models: what can draft.
        listeners: who hears of the rounds of runs.
        loads: changes the number of background requests of a run that takes place, by its id.
    """

    def __init__(self, main: EngineService, models: Mapping[str, Model]) -> None:
        self.main = main
        self.models = dict(models)
        self.listeners: list[Subscription] = []
        self.loads: dict[str, Callable[[int], None]] = {}
        self._open: dict[Choice, PageEngine] = {}
        self._working: list[PageEngine] = []  # those that are about to stop included
        self._ended: dict[Kind, Totals] = {}
        self._line = asyncio.Lock()
        self.in_line = 0  # runs that take place or wait
        self._closed = False

    @property
    def max_load(self) -> int:
        """Background requests at most: one place stays for the visitor's own."""
        return self.main.engine.max_requests - 1

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together at most."""
        return min(self.main.engine.max_length, MOST_TOKENS)

    @property
    def engines(self) -> int:
        """Engines that hold memory now."""
        return len(self._working)

    def totals(self) -> dict[Kind, Totals]:
        """What all engines so far have done, warming up included."""
        found = {kind: replace(totals) for kind, totals in self._ended.items()}
        for page_engine in self._working:
            found.setdefault(page_engine.choice.kind, Totals()).add(page_engine.service.counters)
        return found

    def publish(self, event: RoundEvent) -> None:
        """Let listeners hear of a round."""
        for listener in self.listeners:
            if listener.request_id in (None, event.request_id):
                listener.put(event)

    def drafters(self) -> list[dict[str, Any]]:
        """What can be chosen, and what cannot, with the reason; a JSON object per drafter."""
        return [self._described(name, model) for name, model in self.models.items()] + [
            {
                "name": NONE,
                "label": "none (plain decoding)",
                "drafts": 0,
                "calibrated": False,
                "schedules": {"off": None},
                "cost": None,
            }
        ]

    def _described(self, name: str, model: Model) -> dict[str, Any]:
        costs = _costs(model)
        reason = None if self._covers(costs) else self._unmeasured(name)
        weighing = ("prefix", "lagged", "lookahead")
        assert model.drafter is not None
        return {
            "name": name,
            "label": _LABELS.get(name, Path(name).name),
            "drafts": model.drafter.block_size,
            "calibrated": model.calibration is not None,
            "schedules": {each: reason if each in weighing else None for each in SCHEDULES},
            "cost": None if costs is None else _curves(costs),
        }

    def _covers(self, costs: CostTable | None) -> bool:
        return costs is not None and costs.covers(self.main.engine.max_requests)

    def _unmeasured(self, name: str) -> str:
        target, most = self.main.engine.target.name, self.main.engine.max_requests
        draft = "" if name == next(iter(self.models)) else f" --draft {name}"
        return (
            f"no cost table for {most} requests; run `dspark profile {target}{draft} "
            f"--max-requests {most}`"
        )

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait in line, then have the engines for oneself.

        Raises:
            QueueFullError: too many wait already.
        """
        if self.in_line > MOST_WAITING:
            raise QueueFullError(
                f"{self.in_line - 1} visitors wait for the live page already; try again later."
            )
        self.in_line += 1
        try:
            async with self._line:
                yield
        finally:
            self.in_line -= 1

    def check(self, choice: Choice) -> None:
        """Refuse what cannot be chosen here.

        Raises:
            UsageError: there is no such drafter, or its schedule needs a cost table.
        """
        if choice.plain:
            return
        model = self.models.get(choice.drafter)
        if model is None:
            names = ", ".join([*self.models, NONE])
            raise UsageError(
                f"drafter is {choice.drafter[:100]!r}, but this server has loaded {names}."
            )
        weighs = Schedule(choice.schedule, choice.threshold).weighs_costs
        if weighs and not self._covers(_costs(model)):
            raise UsageError(
                f"schedule is {choice.schedule!r}, which is unavailable "
                f"({self._unmeasured(choice.drafter)})."
            )

    async def open(self, choice: Choice) -> PageEngine:
        """An engine that does what was chosen; of others, only plain ones stay open.

        Raises:
            UsageError: as `check`.
            UnavailableError: the server is stopping.
        """
        choice = choice.plainly if choice.plain else choice
        self.check(choice)
        for other in [each for each in self._open if not (choice.plain or each.plain)]:
            if other != choice:
                await self._end(other)
        if choice not in self._open:
            page_engine = await asyncio.to_thread(self._build, choice)
            if self._closed:
                raise UnavailableError("The server is stopping; ask again once it is back.")
            page_engine.service.start()
            self._open[choice] = page_engine
            self._working.append(page_engine)
            await self._warm_up(page_engine.service)
        return self._open[choice]

    def _build(self, choice: Choice) -> PageEngine:
        main = self.main.engine
        model = self.models.get(choice.drafter) or Model(main.target)
        trees = model.drafter is main.drafter and choice.schedule != "threshold"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DSparkWarning)
            engine = model.open_engine(
                max_requests=main.max_requests,
                max_length=self.max_length,
                verifier=choice.verifier,
                schedule=None if choice.plain else choice.schedule,
                threshold=choice.threshold,
                tree_nodes=main.tree_nodes if trees and not choice.plain else None,
                step_tokens=main.step_tokens,
                prefix_reuse=False,  # or a prompt's second run would find its first
            )
        notes = [str(w.message) for w in caught if issubclass(w.category, DSparkWarning)]
        return PageEngine(choice, EngineService(engine, self.main.engine_lock), tuple(notes))

    async def _warm_up(self, service: EngineService) -> None:
        """A first step allocates what later ones reuse: no visitor's time may hold that."""
        tokens = min(_WARM_UP_TOKENS, service.engine.max_length - 1)
        request = Request((0,), SamplingParams(tokens, ignore_eos=True))
        async for _ in service.stream(request):
            pass

    async def close(self) -> None:
        """End every engine, and whatever runs on it."""
        self._closed = True
        while self._open:
            await self._end(next(iter(self._open)))

    async def _end(self, choice: Choice) -> None:
        page_engine = self._open.pop(choice)
        await page_engine.service.stop()
        self._working.remove(page_engine)
        self._ended.setdefault(choice.kind, Totals()).add(page_engine.service.counters)


def offered(engine: Engine) -> dict[str, Model]:
    """What any engine can show: its own drafter, and prompt lookup."""
    own = {} if engine.drafter is None else {"own": Model(engine.target, engine.drafter)}
    return own | {"ngram": load_draft(engine.target, "ngram")}


def _costs(model: Model) -> CostTable | None:
    try:
        return model.costs
    except (DataError, CompatibilityError):  # a damaged table is none; `dspark profile` says why
        return None


def _curves(costs: CostTable) -> dict[str, Any]:
    """The measured points, and what the table says of steps of 1, 2, ... requests."""
    most = max(point.requests for point in costs.points)
    curves = []
    for requests in filter(costs.covers, range(1, most + 1)):
        drafts = costs.most_tokens(requests) - requests
        step_ms = [round(float(ms), 4) for ms in costs.step_ms(requests, drafts)]
        curves.append({"requests": requests, "first_tokens": requests, "step_ms": step_ms})
    points = [
        {"tokens": p.tokens, "requests": p.requests, "step_ms": round(p.verify_ms + p.draft_ms, 4)}
        for p in costs.points
    ]
    return {"points": points, "curves": curves}
