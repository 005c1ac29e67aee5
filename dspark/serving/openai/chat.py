"""`/v1/chat/completions`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from dspark.engine.requests.sequence import Piece
from dspark.request import Output, Request
from dspark.serving.context import Context, Its
from dspark.serving.openai.chat_fields import ChatFields, Message
from dspark.serving.openai.chat_template import CALL, THINK, ChatTemplate, Rendered
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import mask_of, warning, without_bad_words
from dspark.serving.openai.output_parser import (
    AnswerParser,
    Content,
    Part,
    Reasoning,
    TokenTexts,
    ToolCall,
    chat_logprobs,
)
from dspark.serving.openai.streaming import Choice, CompletionFraming, Framing, Job, reply
from dspark.serving.openai.tools import calls_mask_of, tool_use

router = APIRouter(tags=["completions"])


@router.post("/v1/chat/completions")
async def chat_completions(fields: ChatFields, http: HttpRequest, context: Its) -> Response:
    """Answer a chat."""
    framing = CompletionFraming(
        f"chatcmpl-{http.state.request_id}",
        context.settings.model_name,
        "chat.completion",
        "chat.completion.chunk",
        usage=fields.wants_usage(),
    )
    return await reply(await chat_job(fields, framing, http, context), context, http.receive)


async def chat_job(
    fields: ChatFields,
    framing: Framing,
    http: HttpRequest,
    context: Context,
    ignored_too: Sequence[str] = (),
) -> Job:
    """Render a chat, and make what holds its answer to what is wanted.

    Raises:
        ApiError: something that is wanted cannot be had.
        DSparkError: likewise.
    """
    context.check_model(fields.model)
    template = chat_template_of(context)
    continued = fields.continued()
    use = tool_use(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    tools = use.told
    messages = [message.for_template() for message in fields.messages]
    params = fields.params(
        context, logprobs=fields.wanted_logprobs(), max_tokens=fields.new_tokens()
    )
    options, ignored = fields.template_options(template)
    rendered = await _rendered(fields, messages, tools, options, template, context)
    format_mask = await mask_of(fields, context)
    calls_mask = await calls_mask_of(fields, use, rendered, template, context)
    request = Request(
        fields.truncated(rendered.token_ids, params.max_new_tokens, context),
        params,
        without_bad_words(fields, format_mask or calls_mask, context),
        fields.timeout(context),
        reproducible=fields.seed is not None,
        learn=fields.learns(context),
    )
    if context.settings.log_prompts:
        http.state.facts["messages"] = messages
    free = format_mask is None  # a format's answer has no markup
    writers = tuple(
        ChatWriter(
            i,
            AnswerParser(
                reasoning=free and template.mentions(THINK),
                tools=free and tools is not None and template.mentions(CALL, tools),
                reasoning_open=rendered.reasoning_open,
            ),
            context.tokens,
            logprobs=params.logprobs is not None,
            echoed=continued if continued and fields.echo else "",
        )
        for i in range(params.n)
    )
    ignored += fields.ignored(context) + _ignored_names(fields.messages, template)
    return Job(
        requests=(request,),
        writers=writers,
        framing=framing,
        request_id=http.state.request_id,
        stream=bool(fields.stream),
        headers=warning([*ignored, *ignored_too]),
        facts=http.state.facts,
    )


async def _rendered(
    fields: ChatFields,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    options: dict[str, Any],
    template: ChatTemplate,
    context: Context,
) -> Rendered:
    continues = fields.continued() is not None
    opened = not continues and fields.add_generation_prompt is not False

    def render() -> Rendered:
        text = template.write(messages, tools, options, prompt=opened, continues=continues)
        return template.encode(text)

    return await context.prepare(render, len(repr((messages, tools))))


def chat_template_of(context: Context) -> ChatTemplate:
    """The model's chat template.

    Raises:
        ApiError: it has none.
    """
    if context.template is None:
        raise ApiError(400, "This model has no chat template; use /v1/completions.")
    return context.template


def _ignored_names(messages: Sequence[Message], template: ChatTemplate) -> list[str]:
    """Fields of messages for which the template has no place."""
    given = {
        name
        for message in messages
        for name in ("name", "reasoning_content")
        if getattr(message, name) is not None
    }
    return [f"messages.{name}" for name in sorted(given) if not template.mentions(name)]


@dataclass
class ChatWriter:
    """One answer in the format of chat completions.

    Attributes:
        index: its number.
        parser: reads the model's markup.
        texts: of single tokens.
        logprobs: whether log-probabilities are reported.
        echoed: text to put in front of the answer.
    """

    index: int
    parser: AnswerParser
    texts: TokenTexts
    _: KW_ONLY
    logprobs: bool
    echoed: str = ""
    _streamed: int = field(default=0, init=False)
    _calls: int = field(default=0, init=False)
    _begun: bool = field(default=False, init=False)

    def stream_delta(self, pieces: Sequence[Piece]) -> list[Choice]:
        """What new tokens add to a stream."""
        text = "".join(piece.text for piece in pieces)
        self._streamed += len(text)
        choices = self._deltas(self.parser.feed(text))
        found = [piece.logprob for piece in pieces if piece.logprob is not None]
        if self.logprobs and found:
            if not choices:
                choices = [self._choice({"content": ""})]
            choices[0]["logprobs"] = chat_logprobs(found, self.texts)
        return self._with_role(choices)

    def stream_end(self, output: Output) -> list[Choice]:
        """The last text, and why it ended."""
        rest = self.parser.feed(output.text[self._streamed :]) + self.parser.finish()
        end = self._choice({}, self._reason(output, rest))
        return self._with_role([*self._deltas(rest), end])

    def full(self, output: Output) -> Choice:
        """The answer at once."""
        parts = self.parser.feed(output.text) + self.parser.finish()
        calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
        said = [part.text for part in parts if isinstance(part, Content)]
        content = "".join([self.echoed, *said])
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        shown = None
        if self.logprobs and output.logprobs is not None:
            shown = chat_logprobs(output.logprobs, self.texts)
        return {
            "index": self.index,
            "message": message,
            "logprobs": shown,
            "finish_reason": self._reason(output, parts),
        }

    def _reason(self, output: Output, parts: Sequence[Part]) -> str:
        called = self._calls or any(isinstance(part, ToolCall) for part in parts)
        return "tool_calls" if called and output.finish_reason == "stop" else output.finish_reason

    def _deltas(self, parts: Sequence[Part]) -> list[Choice]:
        found = []
        for part in parts:
            if isinstance(part, Content):
                found.append(self._choice({"content": part.text}))
            elif isinstance(part, Reasoning):
                found.append(self._choice({"reasoning_content": part.text}))
            else:
                call = {"index": self._calls, **_call(part)}
                found.append(self._choice({"tool_calls": [call]}))
                self._calls += 1
        return found

    def _with_role(self, choices: list[Choice]) -> list[Choice]:
        if choices and not self._begun:
            self._begun = True
            first = {"role": "assistant", "content": self.echoed}
            choices = [self._choice(first), *choices]
        return choices

    def _choice(self, delta: dict[str, Any], reason: str | None = None) -> Choice:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _call(part: ToolCall) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
