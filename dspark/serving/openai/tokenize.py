"""`/tokenize` and `/detokenize`, with vLLM's bodies."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field

from dspark.serving.context import Context, context_of
from dspark.serving.openai.chat import ChatFields, Message, chat_template_of
from dspark.serving.openai.chat_template import encode
from dspark.serving.openai.errors import ApiError, Reply
from dspark.serving.openai.fields import Strict, TokenId
from dspark.serving.openai.models import check_model
from dspark.serving.openai.tools import Tool, tool_use

router = APIRouter(tags=["tokens"])


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


@router.post("/tokenize")
async def tokenize(
    fields: TokenizeFields, context: Annotated[Context, Depends(context_of)]
) -> Reply:
    """The token ids of a text or a chat."""
    check_model(fields.model, context)
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


@router.post("/detokenize")
async def detokenize(
    fields: DetokenizeFields, context: Annotated[Context, Depends(context_of)]
) -> Reply:
    """The text of token ids."""
    check_model(fields.model, context)
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
