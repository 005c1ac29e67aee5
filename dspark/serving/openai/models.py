"""Routes about the model and the server: no answers.

`/v1/models`, the one model that is served; `/tokenize` and `/detokenize`, with vLLM's bodies;
`/health` and `/ping`, `/ready` and `/version`, for supervisors and clients, without a key.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

import dspark
from dspark.serving.context import Context, Its
from dspark.serving.openai.chat import chat_template_of
from dspark.serving.openai.chat_fields import ChatFields, Message
from dspark.serving.openai.chat_template import encode
from dspark.serving.openai.errors import ApiError, Reply
from dspark.serving.openai.fields import Strict, TokenId
from dspark.serving.openai.tools import Tool, tool_use

router = APIRouter()
_ANSWERS: dict[int | str, dict[str, Any]] = {503: {"description": "no"}}
_NO_MODEL: dict[int | str, dict[str, Any]] = {404: {"description": "there is no such model"}}


@router.get("/v1/models", tags=["models"])
async def list_models(context: Its) -> Reply:
    """The models that can be asked."""
    return Reply({"object": "list", "data": [card(context)]})


@router.get("/v1/models/{name:path}", tags=["models"], responses=_NO_MODEL)
async def get_model(name: str, context: Its) -> Reply:
    """One model."""
    context.check_model(name)
    return Reply(card(context))


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


@router.get("/health", tags=["health"], responses=_ANSWERS)
async def health(context: Its) -> Reply:
    """Whether the engine works; 503 once it has failed, so that a supervisor restarts it."""
    alive = context.service.fault is None
    return Reply({"status": "ok" if alive else "failed"}, 200 if alive else 503)


@router.get("/ping", tags=["health"], responses=_ANSWERS)
@router.post("/ping", tags=["health"], responses=_ANSWERS)
async def ping(context: Its) -> Reply:
    """The same as `/health`, as hosting services ask."""
    return await health(context)


@router.get("/version", tags=["health"])
async def version() -> Reply:
    """The version of this package."""
    return Reply({"version": dspark.__version__})


@router.get("/ready", tags=["health"], responses=_ANSWERS)
async def ready(context: Its) -> Reply:
    """Whether requests are taken now; 503 while the server stops, so that others get them."""
    accepting = context.service.accepting
    return Reply({"status": "ready" if accepting else "unavailable"}, 200 if accepting else 503)


class TokenizeFields(Strict):
    """A text or a chat to encode.

    Attributes:
        prompt: a text.
        messages: a chat, which the chat template writes down; in place of a prompt.
        model: the served model's name, or nothing.
        add_special_tokens: add those that the tokenizer puts around a text; true for texts, false
            for chats.
        return_token_strs: also give the tokens' texts.
        tools, chat_template_kwargs, add_generation_prompt, continue_final_message: as in chats.
    """

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeFields(Strict):
    """Token ids to decode."""

    tokens: list[TokenId]
    model: str | None = None


@router.post("/tokenize", tags=["tokens"])
async def tokenize(fields: TokenizeFields, context: Its) -> Reply:
    """The token ids of a text or a chat."""
    context.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "Give either prompt or messages.", code="invalid_combination")
    text, special = fields.prompt, fields.add_special_tokens is not False
    if fields.messages is not None:
        special = bool(fields.add_special_tokens)
    size = len(repr(text if text is not None else fields.messages))

    def make() -> tuple[int, ...]:
        written = _written(fields, context) if text is None else text
        tokenizer = _tokenizer_of(context)
        return encode(tokenizer, written, special=special) if written else ()

    ids = await context.prepare(make, size)
    strings = [context.tokens(token) for token in ids] if fields.return_token_strs else None
    return Reply(
        {
            "count": len(ids),
            "max_model_len": context.service.engine.max_length,
            "tokens": list(ids),
            "token_strs": strings,
        }
    )


def _written(fields: TokenizeFields, context: Context) -> str:
    template = chat_template_of(context)
    assert fields.messages is not None
    chat = ChatFields(
        messages=fields.messages,
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
    )
    continues = chat.continued() is not None
    return template.write(
        [message.for_template() for message in fields.messages],
        tool_use(fields.tools, None, None).told,
        fields.chat_template_kwargs,
        prompt=not continues and fields.add_generation_prompt is not False,
        continues=continues,
    )


@router.post("/detokenize", tags=["tokens"])
async def detokenize(fields: DetokenizeFields, context: Its) -> Reply:
    """The text of token ids."""
    context.check_model(fields.model)
    tokenizer, size = _tokenizer_of(context), context.service.engine.target.vocab_size
    wrong = next((token for token in fields.tokens if token >= size), None)
    if wrong is not None:
        sentence = f"tokens has {wrong}, but token ids of this model run from 0 to {size - 1}."
        raise ApiError(422, sentence, param="tokens", code="invalid_value")
    text = await context.prepare(
        lambda: str(tokenizer.decode(fields.tokens, clean_up_tokenization_spaces=False)),
        len(fields.tokens),
    )
    return Reply({"prompt": text})


def _tokenizer_of(context: Context) -> Any:
    tokenizer = context.service.engine.target.tokenizer
    if tokenizer is None:
        raise ApiError(400, "This model has no tokenizer.", code="unsupported_value")
    return tokenizer
