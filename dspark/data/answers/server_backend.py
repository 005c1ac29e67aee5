"""Answers by servers with OpenAI's API, in threads: many conversations in flight at once."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark.data.answers.regenerate import Done
from dspark.data.answers.replay import Script
from dspark.data.answers.sampling import Sampling
from dspark.data.conversations import Message
from dspark.data.server import ChatServer, NoReplyError
from dspark.data.wanted import Wanted
from dspark.errors import DataError
from dspark.params import sample_seed

# So many conversations in a row without a reply, beyond one for each thread: nobody is there.
_PATIENCE = 8
_VENDOR = ("top_k", "min_p", "repetition_penalty")
_NEUTRAL = {"top_k": 0, "min_p": 0, "repetition_penalty": 1}


@dataclass(frozen=True)
class ServerResponder:
    """Answers with the model of one or several servers.

    Implements `regenerate.Responder`.

    Attributes:
        server: whom to ask.
        sampling: how to draw; what is not said is left to the server.
        max_new_tokens: per answer.
        seed: line i draws with seed + i - 1; None leaves that to the server.
        wanted: which answers are kept.
        template_options: variables of the chat template.
        concurrency: requests at once, per server.
    """

    server: ChatServer
    sampling: Sampling
    max_new_tokens: int = 256
    seed: int | None = None
    wanted: Wanted = field(default_factory=Wanted)
    template_options: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 32

    @property
    def settings(self) -> Mapping[str, Any]:
        """What answers hang on."""
        return {
            "target": self.server.model,
            **self.sampling.values,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "template": dict(self.template_options),
            "wanted": repr(self.wanted),
        }

    def answer(self, scripts: Iterator[Script], done: Done) -> None:
        """Answer every turn of every script.

        Raises:
            DataError: a server refuses every request, or none has answered for a long time.
        """
        _Crew(self, scripts).run(done)

    def body(self, script: Script) -> dict[str, Any]:
        """The request for the next answer, but for the model's name."""
        values = dict(self.sampling.values)
        vendor = {name: values.pop(name) for name in _VENDOR if name in values}
        body: dict[str, Any] = {
            "messages": for_server(script.said),
            "max_tokens": self.max_new_tokens,
            **values,
            **{name: value for name, value in vendor.items() if value != _NEUTRAL[name]},
        }
        if self.seed is not None:
            body["seed"] = sample_seed(self.seed + script.line - 1, script.answers) % (1 << 31)
        if script.tools:
            body["tools"] = list(script.tools)
        if script.options:
            body["chat_template_kwargs"] = dict(script.options)
        return body


def for_server(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI's API has them.

    What was thought is sent along only behind the last user turn, within a chain of tool calls:
    templates show it there and nowhere else.
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


class _Crew:
    """Threads that take conversations from a common row; their results come back over a queue."""

    def __init__(self, responder: ServerResponder, scripts: Iterator[Script]) -> None:
        self._responder = responder
        self._scripts = scripts
        self._lock = threading.Lock()
        self._ended: queue.Queue[Script | BaseException | None] = queue.Queue()

    def run(self, done: Done) -> None:
        """Tell `done`, in this thread, of every conversation that has ended."""
        responder = self._responder
        threads = responder.concurrency * len(responder.server.urls)
        for number in range(threads):
            # Not waited for where the run ends early: a request may take minutes.
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
                        "start it again and run the same command: it goes on from here."
                    )
        finally:
            responder.server.stop.set()

    def _work(self, number: int) -> None:
        try:
            while (script := self._next()) is not None:
                self._answer(script, number)
                if self._responder.server.stop.is_set():
                    return
                self._ended.put(script)
        except BaseException as error:
            self._ended.put(error)
        finally:
            self._ended.put(None)

    def _next(self) -> Script | None:
        with self._lock:
            return next(self._scripts, None)

    def _answer(self, script: Script, number: int) -> None:
        responder = self._responder
        if script.dialogue is None and not script.fault:
            script.fail("Raw prompts have no chat; leave --server out to answer them.")
        while script.next_turn():
            try:
                reply = responder.server.chat(responder.body(script), number)
            except NoReplyError as error:
                script.fail(str(error), again=error.again)
            else:
                script.take(reply, keep=responder.wanted.keeps(reply))
