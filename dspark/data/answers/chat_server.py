"""Chat server: HTTP calls to servers with OpenAI's chat-completions API, with retries."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark.data.answers.replay import Reply
from dspark.data.conversations import check_tool_calls, thinking_of
from dspark.data.templates import split_thinking
from dspark.errors import DataError, UsageError

_FINISHED = {"stop": "stop", "tool_calls": "stop", "function_call": "stop", "length": "length"}
# Retryable statuses; any other 4xx is final.
_LATER = {408, 409, 425, 429}
# Statuses that hold for every request: wrong key, address or model.
_NEVER = {401, 403, 404}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LARGEST_REPLY_BYTES = 1 << 26


class NoReplyError(Exception):
    """One conversation got no answer; `again` if a retry may succeed."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class _Fault(Exception):
    """A failed call: the reason, the status if any, and the server's requested wait."""

    def __init__(self, reason: str, status: int | None = None, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.wait_s = wait_s


@dataclass(frozen=True)
class ChatServer:
    """Servers of one model.

    Attributes:
        urls: their addresses, each ending in the version ("/v1").
        model: the model's name there.
        api_key: sent as a bearer token, if given.
        timeout_s: for one reply, seconds.
        retries: of a call that failed, timed out or returned an invalid reply.
        stop: once set, waiting ends.
    """

    urls: tuple[str, ...]
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0
    retries: int = 4
    stop: threading.Event = field(default_factory=threading.Event)

    def chat(self, body: Mapping[str, Any], first: int) -> Reply:
        """One reply.

        Args:
            body: the request without the model's name.
            first: index of the first server to ask; retries go to the next one.

        Raises:
            NoReplyError: all attempts failed.
            DataError: a server refuses the key, the address or the model.
        """
        draw = random.Random(first)
        for attempt in range(self.retries + 1):
            url = self.urls[(first + attempt) % len(self.urls)]
            try:
                return _reply(self.call(url + "/chat/completions", {**body, "model": self.model}))
            except _Fault as fault:
                if fault.status in _NEVER:
                    raise DataError(
                        f"{url} refuses the request: {fault}; check the address, the model's name "
                        "and the key."
                    ) from None
                final = (
                    fault.status is not None and fault.status < 500 and fault.status not in _LATER
                )
                if final:
                    raise NoReplyError(str(fault), again=False) from None
                if attempt == self.retries or self.stop.is_set():
                    raise NoReplyError(f"{url}: {fault}", again=True) from None
                wait_s = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * (0.5 + draw.random())
                self.stop.wait(min(max(wait_s, fault.wait_s), 2 * _LONGEST_WAIT_S))
        raise AssertionError("the last attempt returns or raises")

    def call(self, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One HTTP call; returns the JSON object of the reply."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=headers)
        deadline = time.monotonic() + self.timeout_s
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                content = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Fault(f"no reply within {self.timeout_s:g} s") from None
            raise _Fault(f"no connection ({reason or type(error).__name__})") from None
        try:
            found = json.loads(content)
        except ValueError:
            raise _Fault(f"the reply is not JSON: {content[:80]!r}") from None
        if not isinstance(found, dict):
            raise _Fault("the reply is not a JSON object")
        return found


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    parts, size = list[bytes](), 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
        if size > _LARGEST_REPLY_BYTES:
            raise _Fault(f"the reply has more than {_LARGEST_REPLY_BYTES} bytes")
    return b"".join(parts)


def _refusal(error: urllib.error.HTTPError) -> _Fault:
    try:
        body = json.loads(error.read(1 << 16))
        message = body["error"]["message"] if "error" in body else body["message"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        message = error.reason
    after = error.headers.get("Retry-After", "")
    return _Fault(
        f"status {error.code}, {message}", error.code, float(after) if after.isdecimal() else 0.0
    )


def _reply(found: Mapping[str, Any]) -> Reply:
    """The reply in a chat completion."""
    try:
        choice = found["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        calls = message.get("tool_calls") or []
        text = message.get("content")
        if text is None and (calls or thinking_of(message)):
            text = ""
        usage = found.get("usage") or {}
        tokens = int(usage.get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise _Fault("the reply holds no chat completion") from None
    if not isinstance(text, str):
        raise _Fault("the reply holds no text")
    if reason not in _FINISHED:
        raise _Fault(f"the reply ended with finish_reason {reason!r}")
    try:
        calls = check_tool_calls(calls, "the reply")
    except DataError as error:
        raise _Fault(str(error)) from None
    thinking = thinking_of(message)
    if not thinking:
        thinking, text = _inline_thinking(text)
    return Reply(text, _FINISHED[reason], tokens, thinking.strip("\n"), tuple(calls))


def _inline_thinking(text: str) -> tuple[str, str]:
    """Thinking left in the text by a server without a reasoning parser."""
    head, _, _ = text.partition("</think>")
    opening = "<think>" if "<think>" in head else ""
    return split_thinking(text, opening, "</think>")


def server_url(text: str) -> str:
    """The address of a server's API, from a URL with or without "/v1".

    Raises:
        UsageError: it is not a URL.
    """
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise UsageError(
            f"--server is {text!r}, but must be an address like http://localhost:8000."
        )
    url = text.rstrip("/")
    return url if url.endswith("/v1") else url + "/v1"


def served_model(server: ChatServer, wanted: str) -> str:
    """The served model's name: the wanted one, or the server's only one.

    Raises:
        DataError: a server does not answer, or has several models but none of this name.
    """
    name = wanted
    for url in server.urls:
        try:
            listed = server.call(url + "/models").get("data")
        except _Fault as fault:
            if fault.status is not None and fault.status not in {401, 403}:
                continue  # it answers, but lists no models
            raise DataError(
                f"{url} does not answer: {fault}; start the server or correct --server or the key."
            ) from None
        models = [m.get("id") for m in listed or () if isinstance(m, dict)]
        if wanted in models or not models:
            continue
        if len(models) > 1:
            raise DataError(
                f"{url} has no model {wanted!r}, but {', '.join(map(str, models))}; name one of "
                "them with --server-model."
            )
        name = str(models[0])
    return name
