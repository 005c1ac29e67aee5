"""Replies to completions, whole or as server-sent events, with their usage and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark.engine.requests.sequence import Piece
from dspark.errors import DSparkError
from dspark.request import Output, Request, Stats, merge_stats
from dspark.serving.context import Context
from dspark.serving.openai.errors import ApiError, Reply, as_api_error, error_body, error_reply
from dspark.serving.streams import OutputStream

_T = TypeVar("_T")
Choice = dict[str, Any]
DONE = "data: [DONE]\n\n"
write_json = json.JSONEncoder(separators=(",", ":")).encode


class ChoiceWriter(Protocol):
    """Writes one answer as choices of its API."""

    def stream_delta(self, pieces: Sequence[Piece]) -> list[Choice]:
        """What new tokens add to a stream."""
        ...

    def stream_end(self, output: Output) -> list[Choice]:
        """How a stream ends."""
        ...

    def full(self, output: Output) -> Choice:
        """The answer at once."""
        ...


class Framing(Protocol):
    """Puts the choices of all answers into the body of a reply, or into server-sent events."""

    def full(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of a whole reply."""
        ...

    def begin(self) -> str:
        """The events before the first choice."""
        ...

    def event(self, choice: Choice) -> str:
        """The events of one choice."""
        ...

    def end(self, usage: dict[str, Any]) -> str:
        """The events after the last choice."""
        ...

    def error(self, error: ApiError) -> str:
        """The events that end a stream which failed."""
        ...


@dataclass(frozen=True)
class Job:
    """A completion that is asked for.

    Attributes:
        requests: for the engine.
        writers: one per answer, in the order of their numbers.
        framing: of the API that was asked.
        request_id: of the HTTP request.
        stream: whether a stream is wanted.
        headers: of the reply.
        facts: what the log is told.
        scores_only: whether only log-probabilities of prompts are wanted: the token that each
            request generates all the same is left out.
    """

    requests: tuple[Request, ...]
    writers: tuple[ChoiceWriter, ...]
    framing: Framing
    request_id: str
    stream: bool
    headers: dict[str, str]
    facts: dict[str, Any]
    scores_only: bool = False


@dataclass
class _Progress:
    """Times and outputs of a completion, for usage, metrics and log."""

    context: Context
    job: Job
    started_s: float = field(default_factory=time.monotonic)
    first_s: dict[int, float] = field(default_factory=dict)
    outputs: dict[int, Output] = field(default_factory=dict)

    def note(self, answer: int, pieces: Sequence[Piece], output: Output | None) -> None:
        """Take note of what came."""
        now_s = time.monotonic()
        if pieces and answer not in self.first_s:
            self.first_s[answer] = now_s
            self.context.metrics.note_first_token(now_s - self.started_s)
        if output is None:
            return
        if self.job.scores_only:
            output = replace(output, token_ids=(), text="", logprobs=())
        self.outputs[answer] = output
        first_s = self.first_s.get(answer)
        self.context.metrics.note_end(
            output,
            len(self._prompt_of(answer)),
            now_s - self.started_s,
            None if first_s is None else now_s - first_s,
        )

    def _prompt_of(self, answer: int) -> tuple[int, ...]:
        for request in self.job.requests:
            if answer < request.params.n:
                return request.prompt_ids
            answer -= request.params.n
        raise AssertionError("answers are numbered as they were asked for")

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts, and what speculation did."""
        outputs = list(self.outputs.values())
        prompt = sum(len(request.prompt_ids) for request in self.job.requests)
        completion = sum(len(output.token_ids) for output in outputs)
        stats: Stats = merge_stats(outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "dspark": stats.counts,
        }

    def close(self) -> None:
        """Tell the log; answers that have not ended were left by their client, or broken off."""
        for _ in range(len(self.job.writers) - len(self.outputs)):
            self.context.metrics.note_reason("abort")
        usage = self.usage()
        reasons = [output.finish_reason for _, output in sorted(self.outputs.items())]
        self.job.facts.update(
            {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
            | usage["dspark"]
            | {"finish_reasons": reasons}
        )
        if self.first_s:
            first_s = min(self.first_s.values()) - self.started_s
            self.job.facts["first_token_ms"] = round(first_s * 1e3, 1)
        if self.context.settings.log_prompts:
            self.job.facts["answers"] = [output.text for output in self.outputs.values()]


async def reply(job: Job, context: Context, receive: Receive) -> Response:
    """Have a completion made.

    Args:
        job: what is asked for.
        context: who makes it.
        receive: of the HTTP request, whose body has been read: it tells when the client has gone.

    Raises:
        DSparkError: it cannot be made; or what ended it, where nothing has been sent yet.
    """
    account = _Progress(context, job)
    output_stream = await context.service.submit(job.requests, name=job.request_id, live=job.stream)

    def end() -> None:
        output_stream.cancel()
        account.close()

    if job.stream:
        return EventStream(_events(output_stream, account), job.headers, end)
    try:
        await until_disconnect(_collect(output_stream, account), receive)
    except ClientDisconnected:
        return error_reply(ApiError(400, "The client left before its answer was complete."))
    finally:
        end()
    choices = [writer.full(account.outputs[i]) for i, writer in enumerate(job.writers)]
    return Reply(job.framing.full(choices, account.usage()), headers=job.headers)


async def _collect(output_stream: OutputStream, account: _Progress) -> None:
    async for updates in output_stream:
        for update in updates:
            account.note(update.answer, update.pieces, update.output)
            if update.output is not None:
                update.output.checked()


async def _events(output_stream: OutputStream, account: _Progress) -> AsyncGenerator[bytes, None]:
    """The stream, which always ends: with its last answer, or with an error."""
    job = account.job
    rest = list(filter(None, [job.framing.begin()]))
    try:
        async for updates in output_stream:
            fault = None
            for update in updates:
                account.note(update.answer, update.pieces, update.output)
                writer = job.writers[update.answer]
                choices = writer.stream_delta(update.pieces) if update.pieces else []
                if update.output is not None and update.output.fault is not None:
                    fault = update.output.fault
                elif update.output is not None:
                    choices += writer.stream_end(update.output)
                rest += map(job.framing.event, choices)
            if fault is not None:
                raise fault
            if rest and not output_stream.is_over:  # what comes last goes out with the end
                yield "".join(rest).encode("ascii")
                rest.clear()
        rest.append(job.framing.end(account.usage()))
    except DSparkError as error:
        rest.append(job.framing.error(as_api_error(error)))
    yield "".join(rest).encode("ascii")


class CompletionFraming:
    """The bodies and events of chat and text completions; events differ in their choices alone.

    Args:
        name: the completion's id.
        model: the model's name.
        kind: the `object` of a whole reply.
        chunk_kind: that of a stream's events.
        usage: whether the last event holds the usage; all others then say that they do not.
    """

    def __init__(self, name: str, model: str, kind: str, chunk_kind: str, *, usage: bool) -> None:
        common = {"created": int(time.time()), "model": model}
        self._body = {"id": name, "object": kind, **common}
        chunk = {"id": name, "object": chunk_kind, **common}
        self._head = "data: " + write_json(chunk)[:-1] + ',"choices":['
        self._tail = '],"usage":null}\n\n' if usage else "]}\n\n"
        self._usage = usage

    def full(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of a whole reply."""
        return {**self._body, "choices": choices, "usage": usage}

    def begin(self) -> str:
        """Nothing: the first event is that of the first choice."""
        return ""

    def event(self, choice: Choice) -> str:
        """The event of one choice."""
        return self._head + write_json(choice) + self._tail

    def end(self, usage: dict[str, Any]) -> str:
        """The event with the usage, where it is wanted."""
        last = self._head + '],"usage":' + write_json(usage) + "}\n\n" if self._usage else ""
        return last + DONE

    def error(self, error: ApiError) -> str:
        """The error as an event."""
        body = error_body(error.status, str(error), error.param, error.code)
        return "data: " + write_json(body) + "\n\n" + DONE


class ClientDisconnected(Exception):
    """Nobody is there any more to read the reply."""


async def until_disconnect(work: Awaitable[_T], receive: Receive) -> _T:
    """Do something until it is done, or the client has gone.

    Args:
        work: is cancelled if the client goes.
        receive: of the HTTP request, whose body has been read.

    Raises:
        ClientDisconnected: the client has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; what makes them is closed as soon as the client has gone.

    Args:
        events: each as it goes over the wire.
        headers: of the reply.
        end: called once nothing more is sent, whatever the reason.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers={**own, **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        del scope
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with contextlib.suppress(ClientDisconnected):
                await until_disconnect(self._send_all(send), receive)
        finally:
            self._end()

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
