"""Logs as JSON lines, without any text of prompts or answers unless asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

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
