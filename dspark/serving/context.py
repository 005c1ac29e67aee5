"""Context: the service, settings, template, metrics and masks that all routes share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from dspark.params import sample_seed
from dspark.serving.live.engines import PageEngines
from dspark.serving.openai.chat_template import ChatTemplate
from dspark.serving.openai.grammar import Grammars
from dspark.serving.openai.logprobs import TokenTexts
from dspark.serving.ops.metrics import Metrics
from dspark.serving.service import EngineService
from dspark.serving.settings import Settings

_T = TypeVar("_T")
_SHORT = 4096  # fewer are encoded sooner than a thread would take over


@dataclass
class Seeds:
    """Seeds of requests that have none of their own.

    Args:
        base: names all of them, by their order; None draws each from the system.
    """

    base: int | None
    _count: int = 0
    _random: random.Random = field(default_factory=random.Random)

    def next(self) -> int:
        """A seed that has not been given."""
        if self.base is None:
            return self._random.getrandbits(63)
        self._count += 1
        return sample_seed(self.base, self._count)


@dataclass(frozen=True)
class Context:
    """The service with all that its routes need.

    Attributes:
        service: the engine at work.
        settings: how the server behaves.
        metrics: what it counts.
        template: the model's chat template; None where it has none.
        tokens: texts of single tokens.
        grammars: masks for constrained answers.
        seeds: of requests without one.
        engines: engines of the live page.
        created_s: when the server started, seconds since 1970.
        prompt_thread: encodes long prompts, which must not block the event loop.
    """

    service: EngineService
    settings: Settings
    metrics: Metrics
    template: ChatTemplate | None
    tokens: TokenTexts
    grammars: Grammars
    seeds: Seeds
    engines: PageEngines
    created_s: int
    prompt_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="dspark-prompts")
    )

    async def prepare(self, work: Callable[[], _T], size: int) -> _T:
        """Do something with the tokenizer, beside the loop where that takes long.

        Args:
            work: what.
            size: characters or tokens that it reads.
        """
        if size <= _SHORT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.prompt_thread, work)


async def context_of(request: Request) -> Context:
    """The context of the app that a request came to: a dependency of the routes.

    A coroutine, since others are run in a thread.
    """
    context: Context = request.app.state.context
    return context
