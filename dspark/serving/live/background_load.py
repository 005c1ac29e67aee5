"""Background load of the live page: real requests, so that schedules see a real batch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from dspark.params import SamplingParams, sample_seed
from dspark.request import Request
from dspark.serving.service import EngineService

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
