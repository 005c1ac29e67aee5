"""Middleware: request ids, API keys, rate and body limits, and one log line per request.

Pure ASGI, so that a stream costs nothing more for having passed here. Logs are JSON lines, without
any text of prompts or answers unless asked for.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import random
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.serving.context import Settings
from dspark.serving.openai.errors import ApiError, error_reply

_CLOSED_PATHS = ("/v1/", "/metrics", "/tokenize", "/detokenize")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_CLIENTS = 10_000
_ids = random.Random()  # seeded by the system; an id is no secret


class Middleware:
    """Lets a request through to the routes, or answers it.

    Args:
        app: the routes.
        settings: keys and limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]
        rate = settings.requests_per_minute
        self._rates = None if rate is None else RateLimit(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        headers = Headers(scope=scope)
        name = _request_id(headers)
        scope["state"] = {**scope.get("state", {}), "request_id": name, "facts": {}}

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            try:
                body = await self._admit(scope, headers, receive)
            except ApiError as error:
                await error_reply(error)(scope, receive, send_named)
                return
            await self._app(scope, _replay(body, receive), send_named)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "") if route is not None else ""
            seconds = time.perf_counter() - started
            _count(scope, path, status)
            log_request(name, scope["method"], path or "-", status, seconds, scope["state"])

    async def _admit(self, scope: Scope, headers: Headers, receive: Receive) -> bytes | None:
        """The body of a request that may pass; None where it has none.

        Raises:
            ApiError: it may not.
        """
        closed = scope["path"].startswith(_CLOSED_PATHS)
        key = _bearer(headers)
        if self._keys and closed and scope["method"] != "OPTIONS":
            self._check_key(key)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        if self._rates is not None and closed:
            address = scope["client"][0] if scope.get("client") else ""
            self._rates.check(key or address.encode())
        return await self._read(headers, receive)

    def _check_key(self, key: bytes) -> None:
        # Every key is compared, each in constant time.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        most = self._settings.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most)
        try:
            return await asyncio.wait_for(_body(receive, most), self._settings.body_timeout_s)
        except asyncio.TimeoutError as error:
            raise ApiError(
                408,
                f"The body did not come within {self._settings.body_timeout_s:g} seconds.",
                code="timeout",
                headers={"connection": "close"},
            ) from error


async def _body(receive: Receive, most: int) -> bytes:
    parts, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client left before its body had come.")
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {most} bytes; send less.",
        code="body_too_large",
        headers={"connection": "close"},
    )


def _replay(body: bytes | None, receive: Receive) -> Receive:
    """Give a body that has been read once more, then whatever comes."""
    if body is None:
        return receive
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _request_id(headers: Headers) -> str:
    asked = headers.get("x-request-id", "")
    return asked if _REQUEST_ID.fullmatch(asked) else f"{_ids.getrandbits(96):024x}"


def _bearer(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode() if scheme.lower() == "bearer" else b""


def _count(scope: Scope, path: str, status: int) -> None:
    app = scope.get("app")
    if app is not None:
        app.state.context.metrics.note_reply(path, status)


class RateLimit:
    """A bucket of tokens for each client, filled steadily; of many clients the latest are known.

    Args:
        per_minute: requests, also at once.
        most_clients: clients that are remembered.
    """

    def __init__(self, per_minute: int, most_clients: int = _MOST_CLIENTS) -> None:
        self._size = float(per_minute)
        self._per_s = per_minute / 60
        self._most = most_clients
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def check(self, client: bytes, now_s: float | None = None) -> None:
        """Count a request.

        Args:
            client: who sends it.
            now_s: the time; the system's monotonic clock by default.

        Raises:
            ApiError: 429, with the seconds after which the next one will pass.
        """
        now_s = time.monotonic() if now_s is None else now_s
        held, filled_s = self._buckets.pop(client, (self._size, now_s))
        held = min(held + (now_s - filled_s) * self._per_s, self._size)
        self._buckets[client] = held - 1 if held >= 1 else held, now_s
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        if held < 1:
            wait_s = int((1 - held) / self._per_s) + 1
            raise ApiError(
                429,
                f"More than {self._size:g} requests a minute came; ask again in {wait_s} seconds.",
                code="rate_limit_exceeded",
                headers={"retry-after": str(wait_s)},
            )


_logger = logging.getLogger("dspark.serving.requests")


def log_request(
    name: str, method: str, path: str, status: int, seconds: float, state: Mapping[str, Any]
) -> None:
    """Say that a request was answered.

    Args:
        name: its id.
        method: of HTTP.
        path: of its route, not what was asked: that may hold anything.
        status: of the answer.
        seconds: until its last byte was given out.
        state: of its scope; `facts` are what its route noted.
    """
    if _logger.isEnabledFor(logging.INFO):
        facts = {"request_id": name, "method": method, "path": path, "status": status}
        _logger.info(
            "request",
            extra={"facts": facts | {"ms": round(seconds * 1e3, 1)} | state.get("facts", {})},
        )


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then what the record has to tell."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(level: str = "info") -> None:
    """Write everything from `level` on to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("dspark", "uvicorn.error"):
        logging.getLogger(name).setLevel(level.upper())
