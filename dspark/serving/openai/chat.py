"""`/v1/chat/completions`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from dspark.engine.requests.sequence import Piece
from dspark.request import Output, Request
from dspark.serving.context import Context, context_of
from dspark.serving.openai.chat_template import CALL, THINK, ChatTemplate, call_arguments
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import (
    Count,
    SharedFields,
    Strict,
    check_logprobs,
    mask_of,
    warning,
    without_bad_words,
)
from dspark.serving.openai.logprobs import TokenTexts, chat_logprobs
from dspark.serving.openai.output_parser import AnswerParser, Content, Part, Reasoning, ToolCall
from dspark.serving.openai.streaming import Choice, CompletionFraming, Framing, Job, reply
from dspark.serving.openai.tools import Tool, calls_mask_of, tool_use

router = APIRouter(tags=["completions"])


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call that the model made earlier."""

    name: str
    arguments: str


class EarlierCall(Strict):
    """The same, with its id."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message of a chat; fields that only OpenAI's own replies have may come back empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it; a developer is the system to them."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        found: dict[str, Any] = {"role": role, "content": content or ""}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": call_arguments(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return found


class ChatFields(SharedFields):
    """The body of a chat completion.

    Attributes:
        messages: the chat so far.
        max_completion_tokens: the newer name of `max_tokens`.
        logprobs, top_logprobs: report log-probabilities, and those of so many likely tokens.
        tools: functions that the chat template tells the model of.
        tool_choice: `auto`, `none` to leave the tools out, `required`, or a function by name.
        parallel_tool_calls: whether an answer may have several calls.
        chat_template_kwargs: variables of the template, such as `enable_thinking` (not of OpenAI).
        add_generation_prompt: whether the template opens the answer (not of OpenAI).
        continue_final_message: have the answer go on where the last message, the assistant's, ends
            (not of OpenAI).
        echo: put that message in front of the answer (not of OpenAI).
        reasoning_effort, verbosity: variables of templates that know them, else without effect.
        modalities: text.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None

    def new_tokens(self) -> int | None:
        """New tokens at most, by either name.

        Raises:
            ApiError: the names disagree.
        """
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            sentence = "max_tokens and max_completion_tokens differ; give one of them."
            raise ApiError(400, sentence, param="max_tokens", code="invalid_combination")
        return both.pop() if both else None

    def continued(self) -> str | None:
        """The text of the message that the answer goes on with; None where it begins anew.

        Raises:
            ApiError: there is nothing to go on with, or other parameters contradict.
        """
        last = self.messages[-1]
        text = last.for_template()["content"]
        for name, wrong, sentence in (
            (
                "continue_final_message",
                self.continue_final_message and (last.role != "assistant" or not text),
                "continue_final_message needs a last message of the assistant with text.",
            ),
            (
                "add_generation_prompt",
                self.continue_final_message and self.add_generation_prompt,
                "add_generation_prompt and continue_final_message exclude each other; leave one "
                "out.",
            ),
            (
                "echo",
                self.echo and not self.continue_final_message,
                "echo needs continue_final_message; leave it out.",
            ),
        ):
            if wrong:
                raise ApiError(400, sentence, param=name, code="invalid_combination")
        return str(text) if self.continue_final_message else None

    def template_options(self, template: ChatTemplate) -> tuple[dict[str, Any], list[str]]:
        """Variables for the template, and the names of parameters that it has no place for."""
        options, ignored = dict(self.chat_template_kwargs or {}), list[str]()
        for name in ("reasoning_effort", "verbosity"):
            value = getattr(self, name)
            if value is None:
                continue
            if template.mentions(name):
                options.setdefault(name, value)
            else:
                ignored.append(name)
        return options, ignored

    def wanted_logprobs(self) -> int | None:
        """How many most likely tokens are reported; None for no log-probabilities.

        Raises:
            ApiError: likely tokens without log-probabilities, or too many.
        """
        if self.top_logprobs is not None and not self.logprobs:
            sentence = "top_logprobs needs logprobs to be true."
            raise ApiError(400, sentence, param="top_logprobs", code="invalid_combination")
        return check_logprobs(self.top_logprobs or 0, "top_logprobs") if self.logprobs else None


@router.post("/v1/chat/completions")
async def chat_completions(
    fields: ChatFields, http: HttpRequest, context: Annotated[Context, Depends(context_of)]
) -> Response:
    """Answer a chat."""
    usage = fields.wants_usage()
    chat = await prepare_chat(fields, http, context)
    framing = CompletionFraming(
        f"chatcmpl-{http.state.request_id}",
        context.settings.model_name,
        "chat.completion",
        "chat.completion.chunk",
        usage=usage,
    )
    return await reply(chat.job(fields, framing, http), context, http.receive)


@dataclass(frozen=True)
class PreparedChat:
    """A chat that is ready for the engine.

    Attributes:
        request: for the engine.
        writers: of its answers.
        ignored: names of parameters that are without effect.
    """

    request: Request
    writers: tuple[ChatWriter, ...]
    ignored: list[str]

    def job(self, fields: ChatFields, framing: Framing, http: HttpRequest) -> Job:
        """The job that it is for an API."""
        return Job(
            requests=(self.request,),
            writers=self.writers,
            framing=framing,
            request_id=http.state.request_id,
            stream=bool(fields.stream),
            headers=warning(self.ignored),
            facts=http.state.facts,
        )


async def prepare_chat(fields: ChatFields, http: HttpRequest, context: Context) -> PreparedChat:
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
    opened = continued is None and fields.add_generation_prompt is not False
    rendered = await context.prepare(
        lambda: template.render(
            messages, tools, options, prompt=opened, continues=continued is not None
        ),
        _size_of(messages, tools),
    )
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
    return PreparedChat(request, writers, ignored)


def chat_template_of(context: Context) -> ChatTemplate:
    """The model's chat template.

    Raises:
        ApiError: it has none.
    """
    if context.template is None:
        raise ApiError(400, "This model has no chat template; use /v1/completions.")
    return context.template


def _size_of(messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> int:
    """Characters of a chat, roughly."""
    return len(repr(messages)) + len(repr(tools or ""))


def _ignored_names(messages: Sequence[Message], template: ChatTemplate) -> list[str]:
    """Fields of messages for which the template has no place."""
    given = {
        name
        for message in messages
        for name in ("name", "reasoning_content")
        if getattr(message, name) is not None
    }
    return [f"messages.{name}" for name in sorted(given) if not template.mentions(name)]


class ChatWriter:
    """One answer in the shapes of chat completions.

    Args:
        index: its number.
        parser: reads the model's markup.
        texts: of single tokens.
        logprobs: whether log-probabilities are reported.
        echoed: text to stand in front of the answer's.
    """

    def __init__(
        self,
        index: int,
        parser: AnswerParser,
        texts: TokenTexts,
        *,
        logprobs: bool,
        echoed: str = "",
    ) -> None:
        self._echoed = echoed
        self._index = index
        self._parser = parser
        self._texts = texts
        self._logprobs = logprobs
        self._streamed = 0
        self._calls = 0
        self._begun = False

    def stream_delta(self, pieces: Sequence[Piece]) -> list[Choice]:
        """What new tokens add to a stream."""
        text = "".join(piece.text for piece in pieces)
        self._streamed += len(text)
        choices = self._deltas(self._parser.feed(text))
        found = [piece.logprob for piece in pieces if piece.logprob is not None]
        if self._logprobs and found:
            if not choices:
                choices = [self._choice({"content": ""})]
            choices[0]["logprobs"] = chat_logprobs(found, self._texts)
        return self._with_role(choices)

    def stream_end(self, output: Output) -> list[Choice]:
        """The last text, and why it ended."""
        rest = self._parser.feed(output.text[self._streamed :]) + self._parser.finish()
        end = self._choice({}, self._reason(output, rest))
        return self._with_role([*self._deltas(rest), end])

    def full(self, output: Output) -> Choice:
        """The answer at once."""
        parts = self._parser.feed(output.text) + self._parser.finish()
        calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
        said = [part.text for part in parts if isinstance(part, Content)]
        content = "".join([self._echoed, *said])
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
        if self._logprobs and output.logprobs is not None:
            shown = chat_logprobs(output.logprobs, self._texts)
        return {
            "index": self._index,
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
            first = {"role": "assistant", "content": self._echoed}
            choices = [self._choice(first), *choices]
        return choices

    def _choice(self, delta: dict[str, Any], reason: str | None = None) -> Choice:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _call(part: ToolCall) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
