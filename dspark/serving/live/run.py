"""A run of the live page: one prompt with the chosen drafter, then decoded plainly.

One after the other, for beside each other each would take the other's time. Both have the same
prompt, parameters, seed and load, and engines with nothing else to do; what the server's own engine
does meanwhile is counted and told. A side's time is that of the server, from the submission of the
request to its last token, reading the prompt included. Background load is real requests, so that
schedules see a real batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dspark.errors import DSparkError
from dspark.params import SamplingParams, sample_seed
from dspark.request import Output, Request
from dspark.serving.live.engines import Choice, PageEngine, PageEngines
from dspark.serving.openai.errors import as_api_error, error_body
from dspark.serving.service import EngineService
from dspark.serving.streams import Subscription, Update

Event = tuple[str, dict[str, Any]]
"""(name, JSON object)"""
SPECULATIVE, PLAINLY = "speculative", "plain"
_LOAD_TOKENS = 256


@dataclass
class _Side:
    """What is known of one side.

    Attributes:
        started_s: when its request was submitted.
        tokens: tokens so far.
        first_s: seconds to the first of them.
        seconds: seconds to the last so far.
        output: its end.
        other_steps: steps that the server's own engine took meanwhile.
    """

    started_s: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    first_s: float = 0.0
    seconds: float = 0.0
    output: Output | None = None
    other_steps: int = 0

    def note(self, updates: Sequence[Update]) -> list[list[Any]]:
        """Take note of what came; its pieces, [text, token id, whether drafted] each."""
        self.seconds = time.perf_counter() - self.started_s
        pieces = [piece for update in updates for piece in update.pieces]
        if pieces and not self.tokens:
            self.first_s = self.seconds
        self.tokens += len(pieces)
        for update in updates:
            if update.output is not None:
                self.output = update.output.checked()
        return [[piece.text, piece.token_id, piece.drafted] for piece in pieces]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(eq=False, repr=False)
class Run:
    """One run, which ends when nobody reads its events any more.

    Attributes:
        engines: the engines.
        choice: what the visitor wants to see.
        request: the prompt.
        load_prompts: what background requests ask.
        load: how many of these there are.
        run_id: names it, in round events too.
        compare: whether plain decoding follows; never of a run that is plain itself.

    Raises:
        UsageError: the choice is not possible here.
    """

    engines: PageEngines
    choice: Choice
    request: Request
    load_prompts: Sequence[tuple[int, ...]]
    load: int
    run_id: str
    compare: bool
    _changed: bool = False
    _background: BackgroundLoad | None = None

    def __post_init__(self) -> None:
        self.engines.check(self.choice)
        self.compare = self.compare and not self.choice.plain

    def set_load(self, load: int) -> None:
        """Have so many background requests from now on."""
        self._changed |= load != self.load
        self.load = load
        if self._background is not None:
            self._background.set_level(load)

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens, as it happens; the last event is `done` or `error`."""
        params = self.request.params
        yield (
            "start",
            {
                "run_id": self.run_id,
                "choice": asdict(self.choice),
                "prompt_tokens": len(self.request.prompt_ids),
                "max_tokens": params.max_new_tokens,
                "temperature": params.temperature,
                "seed": params.seed,
                "load": self.load,
                "compare": self.compare,
            },
        )
        try:
            if self.engines.in_line:
                yield "phase", {"phase": "waiting", "ahead": self.engines.in_line}
            async with self.engines.turn(), aclosing(self._run()) as found:
                async for event in found:
                    yield event
        except DSparkError as error:
            told = as_api_error(error)
            yield "error", error_body(told.status, str(told), told.param, told.code)

    async def _run(self) -> AsyncGenerator[Event, None]:
        sides = dict[str, _Side]()
        plan = [(PLAINLY if self.choice.plain else SPECULATIVE, self.choice)]
        plan += [(PLAINLY, self.choice.plainly)] if self.compare else []
        for name, choice in plan:
            yield "phase", {"phase": "preparing", "side": name}
            page_engine = await self.engines.open(choice)
            sides[name] = _Side()
            async with aclosing(self._play(name, page_engine, sides[name])) as found:
                async for event in found:
                    yield event
        yield "done", self._verdict(sides)

    async def _play(
        self, name: str, page_engine: PageEngine, side: _Side
    ) -> AsyncGenerator[Event, None]:
        """One side under its load."""
        for note in page_engine.notes:
            yield "note", {"side": name, "message": note}
        params = replace(self.request.params, max_new_tokens=_LOAD_TOKENS, ignore_eos=False)
        load = BackgroundLoad(page_engine.service, self.load_prompts, params)
        async with load:
            self._background = load
            load.set_level(self.load)
            try:
                if load.level:
                    yield "phase", {"phase": "loading", "side": name, "load": load.level}
                    await load.settled()
                yield "phase", {"phase": "decoding", "side": name, "load": load.level}
                counters = self.engines.main.counters
                before = counters.steps
                async with aclosing(self._decode(name, page_engine, side)) as found:
                    async for event in found:
                        yield event
                side.other_steps = counters.steps - before
            finally:
                self._background = None
        yield "end", _summary(name, side)

    async def _decode(
        self, name: str, page_engine: PageEngine, side: _Side
    ) -> AsyncGenerator[Event, None]:
        listener: Subscription | None = None
        if name == SPECULATIVE:
            listener = page_engine.service.subscribe(self.run_id)
        side.started_s = time.perf_counter()
        output_stream = await page_engine.service.submit([self.request], name=self.run_id)
        try:
            async for updates in output_stream:
                pieces = side.note(updates)
                if pieces:
                    figures = {"tokens": side.tokens, "seconds": round(side.seconds, 6)}
                    yield "text", {"side": name, "pieces": pieces, **figures}
                # The service gives a step's tokens and its rounds in one go.
                for event in listener.take() if listener is not None else ():
                    self.engines.publish(event)
                    yield "round", event.to_json()
        finally:
            output_stream.cancel()
            if listener is not None:
                listener.close()

    def _verdict(self, sides: dict[str, _Side]) -> dict[str, Any]:
        """How the sides compare.

        `identical` is None where other draws are to be expected, and `speedup` where the sides
        had different loads, or there is only one.
        """
        ours, plain = sides.get(SPECULATIVE), sides.get(PLAINLY)
        if ours is None or plain is None or ours.output is None or plain.output is None:
            return {"identical": None, "speedup": None, "load_changed": self._changed}
        same_draws = self.request.params.temperature == 0 or self.choice.verifier == "coupled"
        identical = ours.output.token_ids == plain.output.token_ids if same_draws else None
        return {
            "identical": identical,
            "speedup": None if self._changed else ours.tokens_per_s / plain.tokens_per_s,
            "load_changed": self._changed,
        }


def _summary(name: str, side: _Side) -> dict[str, Any]:
    output = side.output
    assert output is not None, "a output_stream ends with its output, or raises"
    stats = output.stats
    return {
        "side": name,
        "finish_reason": output.finish_reason,
        "text": output.text,
        "tokens": side.tokens,
        "seconds": round(side.seconds, 6),
        "first_token_ms": round(side.first_s * 1e3, 3),
        "tokens_per_s": side.tokens_per_s,
        **stats.counts,
        "accepted_length": stats.accepted_length,
        "other_steps": side.other_steps,
    }


_SETTLE_S = 20.0


class BackgroundLoad:
    """Keeps so many requests running: where one ends, the next begins.

    An async context manager: at its end all of them are cancelled.

    Args:
        service: who decodes them.
        prompts: are asked in turn, as token ids; at least one.
        params: how they are drawn; each has a seed of its own.
    """

    def __init__(
        self, service: EngineService, prompts: Sequence[tuple[int, ...]], params: SamplingParams
    ) -> None:
        self._service = service
        self._requests = _requests(prompts, params)
        self._workers: list[asyncio.Task[None]] = []

    @property
    def level(self) -> int:
        """How many requests it keeps running."""
        return len(self._workers)

    def set_level(self, level: int) -> None:
        """Keep so many running from now on."""
        while len(self._workers) < level:
            self._workers.append(asyncio.ensure_future(self._work()))
        for worker in self._workers[level:]:
            worker.cancel()
        del self._workers[level:]

    async def settled(self) -> None:
        """Wait until all of them run, or one of them has failed."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_run(), _SETTLE_S)

    async def _all_run(self) -> None:
        while self._service.snapshot().running < self.level:
            for worker in self._workers:
                if worker.done():
                    worker.result()
            await asyncio.sleep(0.01)

    async def _work(self) -> None:
        while True:
            output_stream = await self._service.submit([next(self._requests)], live=False)
            try:
                async for updates in output_stream:
                    for update in updates:
                        if update.output is not None:
                            update.output.checked()
            finally:
                output_stream.cancel()

    async def __aenter__(self) -> BackgroundLoad:
        return self

    async def __aexit__(self, *_: Any) -> None:
        workers = list(self._workers)
        self.set_level(0)
        await asyncio.gather(*workers, return_exceptions=True)


def _requests(prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> Iterator[Request]:
    for number, prompt in enumerate(itertools.cycle(prompts), start=1):
        yield Request(prompt, params.with_seed(sample_seed(params.seed, number)))
