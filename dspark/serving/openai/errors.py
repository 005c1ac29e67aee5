"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from dspark.errors import DSparkError, QueueFullError, RequestError, UnavailableError, UsageError

_logger = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
RETRY_AFTER_S = 1
_MOST_SHOWN = 200


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of the answer.
        message: one sentence.
        param: the parameter that it is about.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


class Reply(JSONResponse):
    """JSON in ASCII, so that no text whatever can fail to be sent."""

    def render(self, content: Any) -> bytes:
        """Encode the content."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The error object of an answer, or of an event in a stream."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_reply(error: ApiError) -> Reply:
    """The answer that an error is."""
    body = error_body(error.status, str(error), error.param, error.code)
    return Reply(body, error.status, headers=error.headers)


def as_api_error(error: DSparkError) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(RETRY_AFTER_S)}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, UnavailableError):
        headers = {"retry-after": str(RETRY_AFTER_S)}
        return ApiError(503, str(error), code="unavailable", headers=headers)
    if isinstance(error, UsageError):
        return ApiError(422, str(error), param=str(error).partition(" ")[0], code="invalid_value")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_request")
    return ApiError(500, str(error), code="engine_error")


def add_handlers(app: FastAPI) -> None:
    """Have every error answered in one shape."""

    async def handle(_request: Request, error: Exception) -> Reply:
        return error_reply(_told(error))

    for kind in (ApiError, DSparkError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def _told(error: Exception) -> ApiError:
    """What a client is told of an error of any kind."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DSparkError):
        return as_api_error(error)
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):
        return _http_error(error)
    _logger.error("A request failed.", exc_info=error)
    return ApiError(500, "The server failed; its log says why.", code="internal")


def _http_error(error: HTTPException) -> ApiError:
    """What the framework refuses: an unknown route or method, a body that cannot be parsed."""
    sentence = {
        400: "The body is not valid JSON in UTF-8.",
        404: "There is no such route.",
        405: "This route does not take this method.",
    }.get(error.status_code, f"{str(error.detail).rstrip('.')}.")
    code = "invalid_json" if error.status_code == 400 else None
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, sentence, code=code, headers=headers)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body: 400 where it is no JSON or has an unknown name."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    kind, param = first["type"], ".".join(path) or None
    if kind == "json_invalid":
        return ApiError(400, "The body is not valid JSON in UTF-8.", code="invalid_json")
    if kind == "extra_forbidden":
        name = path[-1][:_MOST_SHOWN]
        sentence = f"The parameter {name!r} is not supported here; leave it out."
        return ApiError(400, sentence, param=param, code="unknown_parameter")
    if kind == "missing":
        sentence = f"{param or 'The body'} is missing; give it."
        return ApiError(422, sentence, param=param, code="missing")
    reason = str(first["msg"])[:_MOST_SHOWN]
    sentence = f"{param or 'The body'} cannot be used: {reason[:1].lower()}{reason[1:]}."
    return ApiError(422, sentence, param=param, code="invalid_value")
