"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from dspark.serving.context import Context, context_of
from dspark.serving.openai.errors import ApiError, Reply

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(context: Annotated[Context, Depends(context_of)]) -> Reply:
    """The models that can be asked."""
    return Reply({"object": "list", "data": [card(context)]})


@router.get("/{name:path}", responses={404: {"description": "there is no such model"}})
async def get_model(name: str, context: Annotated[Context, Depends(context_of)]) -> Reply:
    """One model."""
    check_model(name, context)
    return Reply(card(context))


def check_model(name: str | None, context: Context) -> None:
    """Refuse a model that is not served; None means the one that is.

    Raises:
        ApiError: 404.
    """
    served = context.settings.model_name
    if name is not None and name != served:
        sentence = f"The model {name[:200]!r} is not served here; this server has {served!r}."
        raise ApiError(404, sentence, param="model", code="model_not_found")


def card(context: Context) -> dict[str, Any]:
    """What there is to know of the model that is served."""
    engine = context.service.engine
    return {
        "id": context.settings.model_name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "dspark",
        "max_model_len": engine.max_length,
        "dspark": {
            "drafts_per_round": engine.num_drafts,
            "verifier": engine.verifier,
            "schedule": engine.schedule.name if engine.drafter is not None else "off",
            "max_requests": engine.max_requests,
        },
    }
