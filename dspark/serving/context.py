"""Context of all routes: the server's settings, service, template, metrics and masks."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from dspark.errors import UsageError
from dspark.params import sample_seed
from dspark.serving.live.engines import PageEngines
from dspark.serving.metrics import Metrics
from dspark.serving.openai.chat_template import ChatTemplate
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.grammar import Grammars
from dspark.serving.openai.output_parser import TokenTexts
from dspark.serving.service import EngineService


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    Attributes:
        model_name: what requests call the model.
        api_keys: a request to `/v1` or `/metrics` must bear one of these; none for no check.
        cors_origins: web origins that browsers let read the answers; none switches CORS off.
        max_body_bytes: size of a request's body at most.
        body_timeout_s: seconds in which a body must have come.
        requests_per_minute: of each client (its key, or else its address); None for any number.
        request_timeout_s: seconds after which an answer ends as it is; None for never.
        default_max_tokens: new tokens where a request does not say.
        seed: names the randomness of sampled requests without a seed of their own, by their
            order; None draws it from the system.
        log_prompts: whether logs may hold prompts and answers.
        drain_s: seconds that open answers have to end once the server is to stop.

    Raises:
        UsageError: a value cannot be used.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    requests_per_minute: int | None = None
    request_timeout_s: float | None = None
    default_max_tokens: int = 256
    seed: int | None = None
    log_prompts: bool = False
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise UsageError("An API key is empty; give at least one character.")
        for name in (
            "max_body_bytes",
            "body_timeout_s",
            "requests_per_minute",
            "request_timeout_s",
            "default_max_tokens",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}, but must be above 0.")
        if not self.drain_s >= 0:
            raise UsageError(f"drain_s is {self.drain_s}, but must be at least 0.")


_T = TypeVar("_T")
_SHORT = 4096  # fewer are encoded sooner than a thread would take over


def seeds(base: int | None) -> Iterator[int]:
    """Seeds of requests that have none of their own.

    Args:
        base: names all of them, by their order; None draws each from the system.
    """
    if base is None:
        drawn = random.Random()
        while True:
            yield drawn.getrandbits(63)
    yield from (sample_seed(base, count) for count in itertools.count(1))


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
    seeds: Iterator[int]
    engines: PageEngines
    created_s: int
    prompt_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="dspark-prompts")
    )

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served; None means the one that is.

        Raises:
            ApiError: 404.
        """
        served = self.settings.model_name
        if name is not None and name != served:
            sentence = f"The model {name[:200]!r} is not served here; this server has {served!r}."
            raise ApiError(404, sentence, param="model", code="model_not_found")

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


Its = Annotated[Context, Depends(context_of)]
"""The context, as a parameter of a route."""
