"""The live page `/`, its runs, and `/v1/dspark/events`.

docs/live_page.md describes the routes and their events.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from dspark.data.corpus import BOXED
from dspark.engine.speculation.schedule import ScheduleName
from dspark.errors import RequestError, UsageError
from dspark.params import SamplingParams
from dspark.request import Request, Verifier
from dspark.serving.context import Context, Its
from dspark.serving.live.engines import Choice
from dspark.serving.live.run import Event, Run
from dspark.serving.openai.chat_template import encode
from dspark.serving.openai.errors import ApiError, Reply
from dspark.serving.openai.fields import Count, Number, Strict
from dspark.serving.openai.models import card
from dspark.serving.openai.streaming import EventStream

router = APIRouter(tags=["live page"], include_in_schema=False)
PAGE = Path(__file__).parent / "page"
STATE_EVERY_S = 0.5
MOST_PROMPT_CHARACTERS = 20_000
_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "maths": (
        "Anna bakes 24 muffins every morning. She sells half of them at the market for $3 each "
        "and gives the rest to her neighbors. How much money does she make in a week?" + BOXED,
        "Tom has 3 boxes with 12 pencils each. He gives 8 pencils to his sister. How many pencils "
        "does he have left?" + BOXED,
        "A train travels 60 miles per hour for 3 hours, then 40 miles per hour for 2 hours. How "
        "many miles does it travel in total?" + BOXED,
        "Maria saves $15 every week. How many weeks does she need to buy a bike that costs $180?"
        + BOXED,
    ),
    "code": (
        "What does the command `tar` do? Show me common usages.",
        "What does the command `grep` do? Show me common usages.",
        "What does the command `git commit` do? Show me common usages.",
        "What does the command `ssh` do? Show me common usages.",
    ),
    "chat": (
        "Hi, I want to book a table for two at an Italian restaurant in San Jose.",
        "I need a hotel in Seattle for three nights, please.",
        "Can you find me a bus from Los Angeles to San Francisco for tomorrow morning?",
        "I would like to listen to some music. Can you find a song for me?",
    ),
}
"""Prompts by domain, which background requests ask too.

Their wording is that of the bundled model's training data: it knows no other.
"""


@router.get("/")
async def page() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}")
async def page_file(name: str) -> Response:
    """What the page is made of."""
    return _file(name)


def _file(name: str) -> Response:
    known = {path.name: path for path in PAGE.iterdir() if path.suffix in _KINDS}
    if name not in known:
        raise ApiError(404, "There is no such file of the live page.", code="not_found")
    path = known[name]
    return Response(path.read_bytes(), headers=_HEADERS, media_type=_KINDS[path.suffix])


@router.get("/v1/dspark/live")
async def options(context: Its) -> Reply:
    """What a run can be asked to do here."""
    engines = context.engines
    engine = context.service.engine
    return Reply(
        {
            "model": card(context),
            "device": str(engine.target.device),
            "dtype": str(engine.target.dtype).removeprefix("torch."),
            "drafters": engines.drafters(),
            "verifiers": ["block", "token", "coupled"],
            "max_load": engines.max_load,
            "max_length": engines.max_length,
            "examples": {domain: list(prompts) for domain, prompts in EXAMPLES.items()},
            "chat": context.template is not None,
        }
    )


class RunFields(Strict):
    """What a run is asked to do.

    Attributes:
        prompt: a user's turn of the chat template, or raw text where the model has none.
        drafter: a name from `GET /v1/dspark/live`.
        verifier: token, block or coupled.
        schedule: off, fixed, threshold, prefix, lagged or lookahead.
        threshold: of the schedule `threshold`, 0 to 1.
        temperature: 0 takes the best token.
        max_tokens: new tokens at most.
        ignore_eos: write on past the model's own end, up to `max_tokens`.
        load: background requests, up to `max_load`.
        seed: names the randomness of both sides.
        compare: decode plainly afterwards.
    """

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_PROMPT_CHARACTERS)]
    drafter: str
    verifier: Verifier = "block"
    schedule: ScheduleName = "fixed"
    threshold: Annotated[Number, Field(ge=0, le=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=10)] = 0.0
    max_tokens: Count = 128
    ignore_eos: bool = False
    load: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    compare: bool = True


class LoadFields(Strict):
    """A new load of a run."""

    load: Annotated[int, Field(ge=0)]


@router.post("/v1/dspark/live")
async def start(fields: RunFields, context: Its) -> Response:
    """Run a prompt, then decode it plainly; a stream of server-sent events tells what happens."""
    engines = context.engines
    _check_load(fields.load, context)
    choice = Choice(fields.drafter, fields.verifier, fields.schedule, fields.threshold)
    prompt, load_prompts = await context.prepare(
        lambda: _prompts(fields.prompt, context), len(fields.prompt)
    )
    if len(prompt) >= engines.max_length:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens, but the live page takes "
            f"{engines.max_length - 1} at most; shorten it."
        )
    params = SamplingParams(
        min(fields.max_tokens, engines.max_length - len(prompt)),
        temperature=fields.temperature,
        seed=fields.seed,
        ignore_eos=fields.ignore_eos,
    )
    run = Run(
        engines,
        choice,
        Request(prompt, params),
        load_prompts,
        load=fields.load,
        run_id=f"live-{secrets.token_hex(6)}",
        compare=fields.compare,
    )
    engines.loads[run.run_id] = run.set_load

    def end() -> None:
        del engines.loads[run.run_id]

    return EventStream(_encoded(run.events()), end=end)


@router.put("/v1/dspark/live/{run_id}/load")
async def set_load(run_id: str, fields: LoadFields, context: Its) -> Reply:
    """Change the number of background requests of a run that takes place."""
    _check_load(fields.load, context)
    change = context.engines.loads.get(run_id)
    if change is None:
        raise ApiError(404, "There is no such run; it may have ended.", code="run_not_found")
    change(fields.load)
    return Reply({"load": fields.load})


def _check_load(load: int, context: Context) -> None:
    most = context.engines.max_load
    if load > most:
        raise UsageError(f"load is {load}, but this server has room for {most} beside the visitor.")


def _prompts(text: str, context: Context) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Token ids of the visitor's prompt, and of the background's, cut to what fits."""
    most = max(context.engines.max_length // 2, 1)
    mixed = [prompt for row in zip(*EXAMPLES.values(), strict=True) for prompt in row]
    return _ids(text, context), [_ids(prompt, context)[:most] for prompt in mixed]


def _ids(text: str, context: Context) -> tuple[int, ...]:
    if (template := context.template) is not None:
        return template.encode(template.write([{"role": "user", "content": text}])).token_ids
    tokenizer = context.service.engine.target.tokenizer
    if tokenizer is None:
        raise RequestError("This model has no tokenizer, so the live page cannot ask it.")
    return encode(tokenizer, text)


@router.get("/v1/dspark/events")
async def events(
    context: Its,
    request_id: Annotated[str | None, Query(max_length=100)] = None,
    rounds: bool = True,
) -> Response:
    """What the engine does, as server-sent events, for as long as someone listens.

    Args:
        context: of the server.
        request_id: tell only rounds of this request or run.
        rounds: tell rounds; without, only how the engine stands, which costs it nothing.
    """
    return EventStream(_encoded(_feed(context, request_id, rounds)))


async def _feed(
    context: Context, request_id: str | None, rounds: bool
) -> AsyncGenerator[Event, None]:
    service, engines = context.service, context.engines
    listener = None
    if rounds:
        listener = service.subscribe(request_id)
        engines.listeners.append(listener)
    try:
        yield "hello", card(context)
        due_s = time.monotonic()
        while service.accepting:
            if time.monotonic() >= due_s:
                due_s = time.monotonic() + STATE_EVERY_S
                yield "state", _state(context)
            if listener is None:
                await asyncio.sleep(STATE_EVERY_S)
                continue
            for event in await listener.wait(due_s - time.monotonic()):
                yield "round", event.to_json()
        yield "bye", {}
    finally:
        if listener is not None:
            engines.listeners.remove(listener)
            listener.close()


def _state(context: Context) -> dict[str, Any]:
    found = asdict(context.service.snapshot())
    del found["cost_points"]
    return found | {"time_s": time.time(), "live_runs": context.engines.in_line}


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for name, body in events:
            yield _encode(name, body)
    finally:
        await events.aclose()


def _encode(name: str, body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, allow_nan=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode("ascii")
