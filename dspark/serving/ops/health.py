"""`/health` and `/ping`, `/ready`, `/version`: for supervisors and clients, without a key."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

import dspark
from dspark.serving.context import Context, context_of
from dspark.serving.openai.errors import Reply

router = APIRouter(tags=["health"])
_ANSWERS: dict[int | str, dict[str, Any]] = {503: {"description": "no"}}


@router.get("/health", responses=_ANSWERS)
async def health(context: Annotated[Context, Depends(context_of)]) -> Reply:
    """Whether the engine works; 503 once it has failed, so that a supervisor restarts it."""
    alive = context.service.fault is None
    return Reply({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@router.get("/ping", responses=_ANSWERS)
@router.post("/ping", responses=_ANSWERS)
async def ping(context: Annotated[Context, Depends(context_of)]) -> Reply:
    """The same as `/health`, as hosting services ask."""
    return await health(context)


@router.get("/version")
async def version() -> Reply:
    """The version of this package."""
    return Reply({"version": dspark.__version__})


@router.get("/ready", responses=_ANSWERS)
async def ready(context: Annotated[Context, Depends(context_of)]) -> Reply:
    """Whether requests are taken now; 503 while the server stops, so that others get them."""
    accepting = context.service.accepting
    return Reply({"status": "ready" if accepting else "unavailable"}, 200 if accepting else 503)
