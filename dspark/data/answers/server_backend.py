"""Server backend: answers by the servers of a `ChatServer`, many conversations at once."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark.data.answers.chat_server import ChatServer, NoReplyError
from dspark.data.answers.regenerate import Done
from dspark.data.answers.replay import AnswerFilters, Replay
from dspark.data.answers.sampling import NEUTRAL, Sampling
from dspark.data.conversations import Message
from dspark.errors import DataError
from dspark.params import sample_seed

# Consecutive conversations without a reply, beyond one per thread, after which the run stops.
_PATIENCE = 8
_VENDOR = ("top_k", "min_p", "repetition_penalty")  # not OpenAI's, so not sent if neutral


@dataclass(frozen=True)
class ServerResponder:
    """Answers with the model of one or several servers.

    Implements `regenerate.Responder`.

    Attributes:
        server: the servers.
        sampling: sampling parameters; unspecified ones are left to the server.
        max_new_tokens: per answer.
        seed: line i uses seed + i - 1; None leaves that to the server.
        filters: which answers are kept.
        template_options: chat-template variables.
        concurrency: requests at once, per server.
    """

    server: ChatServer
    sampling: Sampling
    max_new_tokens: int = 256
    seed: int | None = None
    filters: AnswerFilters = field(default_factory=AnswerFilters)
    template_options: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 32

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that determine the answers."""
        return {
            "target": self.server.model,
            **self.sampling.values,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "template": dict(self.template_options),
            "wanted": repr(self.filters),
        }

    def answer(self, replays: Iterator[Replay], done: Done) -> None:
        """Answer every turn of every replay.

        Raises:
            DataError: a server refuses every request, or no server answers any more.
        """
        _WorkerPool(self, replays).run(done)

    def body(self, replay: Replay) -> dict[str, Any]:
        """The request for the next answer, without the model's name."""
        values = dict(self.sampling.values)
        vendor = {name: values.pop(name) for name in _VENDOR if name in values}
        body: dict[str, Any] = {
            "messages": for_server(replay.said),
            "max_tokens": self.max_new_tokens,
            **values,
            **{name: value for name, value in vendor.items() if value != NEUTRAL[name]},
        }
        if self.seed is not None:
            body["seed"] = sample_seed(self.seed + replay.line - 1, replay.answers) % (1 << 31)
        if replay.tools:
            body["tools"] = list(replay.tools)
        if replay.options:
            body["chat_template_kwargs"] = dict(replay.options)
        return body


def for_server(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages in the format of OpenAI's API.

    Thinking is sent only after the last user turn, within a chain of tool calls, where templates
    show it.
    """
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    sent = []
    for index, message in enumerate(messages):
        shown = {key: value for key, value in message.items() if key != "thinking"}
        if "thinking" in message and index > last_user:
            shown["reasoning_content"] = message["thinking"]
        if "tool_calls" in message:
            shown["tool_calls"] = [_call_for_server(call) for call in message["tool_calls"]]
        sent.append(shown)
    return sent


def _call_for_server(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = json.dumps(function.get("arguments", {}))
    return {"type": "function", **call, "function": function}


class _WorkerPool:
    """Threads that take conversations from a shared iterator and return them over a queue."""

    def __init__(self, responder: ServerResponder, replays: Iterator[Replay]) -> None:
        self._responder = responder
        self._scripts = replays
        self._lock = threading.Lock()
        self._ended: queue.Queue[Replay | BaseException | None] = queue.Queue()

    def run(self, done: Done) -> None:
        """Call `done`, in this thread, with every finished conversation."""
        responder = self._responder
        threads = responder.concurrency * len(responder.server.urls)
        for number in range(threads):
            # Daemons, because a request may take minutes when the run ends early.
            threading.Thread(target=self._work, args=(number,), daemon=True).start()
        working, silent = threads, 0
        try:
            while working:
                ended = self._ended.get()
                if ended is None:
                    working -= 1
                    continue
                if isinstance(ended, BaseException):
                    raise ended
                silent = silent + 1 if ended.again else 0
                done(ended)
                if silent >= threads + _PATIENCE:
                    raise DataError(
                        f"No server has answered {silent} conversations in a row ({ended.fault}); "
                        "start it again and run the same command, which resumes here."
                    )
        finally:
            responder.server.stop.set()

    def _work(self, number: int) -> None:
        try:
            while (replay := self._next()) is not None:
                self._answer(replay, number)
                if self._responder.server.stop.is_set():
                    return
                self._ended.put(replay)
        except BaseException as error:
            self._ended.put(error)
        finally:
            self._ended.put(None)

    def _next(self) -> Replay | None:
        with self._lock:
            return next(self._scripts, None)

    def _answer(self, replay: Replay, number: int) -> None:
        responder = self._responder
        if replay.dialogue is None and not replay.fault:
            replay.fail("Raw prompts have no chat; leave --server out to answer them.")
        while replay.next_turn():
            try:
                reply = responder.server.chat(responder.body(replay), number)
            except NoReplyError as error:
                replay.fail(str(error), again=error.again)
            else:
                replay.take(reply, keep=responder.filters.keeps(reply))
