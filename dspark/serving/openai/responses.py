"""`/v1/responses`: OpenAI's newer API for text, reasoning and tool calls, on top of chats.

A response is a chat whose input and output are lists of items. Nothing is stored: whoever goes on
with a conversation sends it whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from dspark.serving.context import Context, context_of
from dspark.serving.openai.chat import (
    CalledFunction,
    ChatFields,
    EarlierCall,
    Message,
    prepare_chat,
)
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import (
    MOST_NUMBER,
    Count,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Number,
    Strict,
    TextFormat,
)
from dspark.serving.openai.streaming import Choice, reply, write_json
from dspark.serving.openai.tools import Function, Tool

router = APIRouter(tags=["completions"])
_LOGPROBS = "message.output_text.logprobs"


class InputText(Strict):
    """A part of a message of the conversation."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None


class InputCall(Strict):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Strict):
    """What the called function gave back."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class ReasoningText(Strict):
    """A part of an earlier reasoning."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """What the model reasoned earlier."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: str | None = None


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning


class ResponseTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseJsonSchema(Strict):
    """A format of JSON by a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    """What the text of a response looks like."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, Field(discriminator="type")]
        | None
    ) = None
    verbosity: str | None = None


class ReasoningOptions(Strict):
    """How the model reasons; summaries are not made."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseFields(Strict):
    """The body of a response.

    Attributes:
        input: a user's text, or the items of the conversation.
        instructions: a system message in front.
        model, temperature, top_p, stream, parallel_tool_calls, tool_choice: as in chats; a named
            function is `{"type": "function", "name": NAME}`.
        seed, top_k, min_p: as in chats (not of OpenAI).
        max_output_tokens: new tokens at most.
        tools: functions.
        text: format and verbosity of the text.
        reasoning: effort, where the template knows it.
        include: `message.output_text.logprobs` reports log-probabilities; others have no effect.
        top_logprobs: those of so many likely tokens.
        truncation: disabled: a conversation that does not fit is refused.
        previous_response_id, conversation, prompt, background: nothing, since nothing is stored.
        store, metadata, user, service_tier, safety_identifier, prompt_cache_key,
            prompt_cache_retention, stream_options, max_tool_calls: without effect.
    """

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_NUMBER)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-MOST_NUMBER - 1, le=MOST_NUMBER)] | None = None
    stream: bool | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    background: Literal[False] | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None

    def ignored(self) -> list[str]:
        """Given parameters without effect that a chat does not have."""
        names = [name for name in ("max_tool_calls", "stream_options") if getattr(self, name)]
        names += ["store"] * (self.store is not None)
        if self.reasoning is not None:
            given = (self.reasoning.summary, self.reasoning.generate_summary)
            names += ["reasoning.summary"] * any(each is not None for each in given)
        names += ["include"] * any(each != _LOGPROBS for each in self.include or ())
        return names

    def as_chat(self) -> ChatFields:
        """The chat that it is.

        Raises:
            ApiError: the conversation has no message.
        """
        messages = _messages(self.input, self.instructions)
        if not messages:
            raise ApiError(422, "input is empty; give a text or a message.", param="input")
        shared = (
            "model", "temperature", "top_p", "top_k", "min_p", "seed", "stream",
            "parallel_tool_calls", "metadata", "user", "service_tier",
            "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "top_logprobs",
        )  # fmt: skip
        logprobs = self.top_logprobs is not None or _LOGPROBS in (self.include or ())
        return ChatFields(
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            tools=[_tool(each) for each in self.tools] if self.tools is not None else None,
            tool_choice=_choice(self.tool_choice),
            response_format=_format(self.text),
            verbosity=self.text.verbosity if self.text else None,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            logprobs=True if logprobs else None,
            **{name: getattr(self, name) for name in shared},
        )


@router.post("/v1/responses")
async def responses(
    fields: ResponseFields, http: HttpRequest, context: Annotated[Context, Depends(context_of)]
) -> Response:
    """Answer a conversation."""
    asked = fields.as_chat()
    chat = await prepare_chat(asked, http, context)
    chat.ignored.extend(fields.ignored())
    framing = ResponseFraming(http.state.request_id, context.settings.model_name, fields)
    return await reply(chat.job(asked, framing, http), context, http.receive)


def _messages(given: str | Sequence[InputItem], instructions: str | None) -> list[Message]:
    """The conversation as messages; neighbouring items of the assistant become one of them."""
    found = [Message(role="system", content=instructions)] if instructions else []
    if isinstance(given, str):
        return [*found, Message(role="user", content=given)]
    turn = _Turn()
    for item in given:
        if isinstance(item, InputReasoning):
            turn.reasoning += "".join(part.text for part in item.content or ())
        elif isinstance(item, InputCall):
            function = CalledFunction(name=item.name, arguments=item.arguments)
            turn.calls.append(EarlierCall(id=item.call_id, function=function))
        elif isinstance(item, InputMessage) and item.role == "assistant":
            turn.text = (turn.text or "") + _text(item.content)
        else:
            found += turn.take()
            if isinstance(item, InputCallOutput):
                content = _text(item.output)
                found.append(Message(role="tool", content=content, tool_call_id=item.call_id))
            else:
                found.append(Message(role=item.role, content=_text(item.content)))
    return [*found, *turn.take()]


class _Turn:
    """Items of one turn of the assistant."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.reasoning = ""
        self.calls: list[EarlierCall] = []

    def take(self) -> list[Message]:
        """The turn as a message; none where there were no items."""
        text, reasoning, calls = self.text, self.reasoning, self.calls
        self.text, self.reasoning, self.calls = None, "", []
        if text is None and not reasoning and not calls:
            return []
        return [
            Message(
                role="assistant",
                content=text,
                reasoning_content=reasoning or None,
                tool_calls=calls or None,
            )
        ]


def _text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: ResponseTool) -> Tool:
    function = Function(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(type="function", function=function)


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """A choice as chats have it; what is none stays as it is, to be refused there."""
    if isinstance(choice, dict) and set(choice) == {"type", "name"}:
        return {"type": choice["type"], "function": {"name": choice["name"]}}
    return choice


def _format(
    text: TextOptions | None,
) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
    given = text.format if text is not None else None
    if not isinstance(given, ResponseJsonSchema):
        return given
    schema = JsonSchema(
        name=given.name, description=given.description, schema=given.schema_, strict=given.strict
    )
    return JsonSchemaFormat(type="json_schema", json_schema=schema)


class ResponseFraming:
    """A response as one body, or as the events of its items.

    Args:
        request_id: of the HTTP request.
        model: the model's name.
        fields: what was asked, which a response repeats.
    """

    def __init__(self, request_id: str, model: str, fields: ResponseFields) -> None:
        self._id = request_id
        self._fields = fields
        self._model = model
        self._created_s = int(time.time())
        self._sequence = 0
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._reason = "stop"

    def full(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of a whole reply."""
        [choice] = choices
        message, found = choice["message"], list[dict[str, Any]]()
        if message.get("reasoning_content"):
            self._add(found, "reasoning", message["reasoning_content"])
        if message["content"] or not message.get("tool_calls"):
            self._add(found, "message", message["content"] or "", choice["logprobs"])
        for call in message.get("tool_calls", ()):
            found.append(self._call_item(len(found), call, "completed"))
        self._items, self._reason = found, choice["finish_reason"]
        return self._response(usage)

    def begin(self) -> str:
        """The events of a response that has begun."""
        begun = self._response(None)
        return "".join(
            self._event(f"response.{name}", response=begun) for name in ("created", "in_progress")
        )

    def event(self, choice: Choice) -> str:
        """The events of a chat's delta."""
        delta, events = choice["delta"], list[str]()
        if choice["finish_reason"] is not None:
            self._reason = choice["finish_reason"]
        for kind, name in (("reasoning", "reasoning_content"), ("message", "content")):
            if delta.get(name) or (kind == "message" and choice["logprobs"]):
                events.append(self._text_delta(kind, delta.get(name) or "", choice["logprobs"]))
        for call in delta.get("tool_calls", ()):
            events += [self._close(), self._call_events(call)]
        return "".join(events)

    def end(self, usage: dict[str, Any]) -> str:
        """The events that end a response."""
        events = [self._close()]
        if not self._items:  # an empty answer is an item too
            events += [self._text_delta("message", "", None), self._close()]
        response = self._response(usage)
        return "".join([*events, self._event(f"response.{response['status']}", response=response)])

    def error(self, error: ApiError) -> str:
        """The error as an event."""
        return self._event(
            "error", message=str(error), code=error.code or "error", param=error.param
        )

    def _response(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        """The response object; without usage, one that has only begun."""
        fields, why = self._fields, {"length": "max_output_tokens", "timeout": "timeout"}
        status = "in_progress"
        if usage is not None:
            status = "incomplete" if self._reason in why else "completed"
        given = fields.model_dump(
            include={"instructions", "max_output_tokens", "metadata", "user", "temperature"}
        )
        chosen = fields.tool_choice if fields.tool_choice is not None else "auto"
        text = fields.text or TextOptions()
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": why[self._reason]} if status == "incomplete" else None,
            "model": self._model,
            "output": list(self._items) if usage is not None else [],
            **given,
            "metadata": given["metadata"] or {},
            "temperature": fields.temperature or 0.0,
            "top_p": 1.0 if fields.top_p is None else fields.top_p,
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": fields.reasoning.effort if fields.reasoning else None,
                "summary": None,
            },
            "store": False,
            "text": text.model_dump(by_alias=True, exclude_none=True)
            if text.format
            else {"format": {"type": "text"}},
            "tool_choice": chosen,
            "tools": [tool.model_dump() for tool in fields.tools or ()],
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }

    def _item_id(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self._id}_{index}"

    def _text_item(
        self, kind: str, index: int, text: str, logprobs: Sequence[Any], status: str
    ) -> dict[str, Any]:
        """An item of kind `message` or `reasoning`; without parts while it is in progress."""
        done = status != "in_progress"
        if kind == "reasoning":
            return {
                "id": self._item_id("rs", index),
                "type": "reasoning",
                "summary": [],
                "content": [_part(kind, text, ())] if done else [],
                "status": status,
            }
        return {
            "id": self._item_id("msg", index),
            "type": "message",
            "role": "assistant",
            "content": [_part(kind, text, logprobs)] if done else [],
            "status": status,
        }

    def _add(
        self,
        items: list[dict[str, Any]],
        kind: str,
        text: str,
        logprobs: Mapping[str, Any] | None = None,
    ) -> None:
        content = logprobs["content"] if logprobs else []
        items.append(self._text_item(kind, len(items), text, content, "completed"))

    def _call_item(self, index: int, call: Mapping[str, Any], status: str) -> dict[str, Any]:
        return {
            "id": self._item_id("fc", index),
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"] if status == "completed" else "",
            "status": status,
        }

    def _text_delta(self, kind: str, text: str, logprobs: Mapping[str, Any] | None) -> str:
        """The events of further text; those that open its item included."""
        events = list[str]()
        if self._open is None or self._open["kind"] != kind:
            events.append(self._close())
            index = len(self._items)
            item = self._text_item(kind, index, "", (), "in_progress")
            self._open = {"kind": kind, "id": item["id"], "text": "", "logprobs": []}
            events.append(self._event("response.output_item.added", output_index=index, item=item))
            part = _part(kind, "", ())
            events.append(self._part_event("response.content_part.added", part=part))
        found = logprobs["content"] if logprobs else []
        self._open["text"] += text
        self._open["logprobs"] += found
        more = {"logprobs": found} if kind == "message" else {}
        events.append(self._part_event(f"response.{_NAMES[kind]}.delta", delta=text, **more))
        return "".join(events)

    def _close(self) -> str:
        """The events that end the open item, if one is."""
        if self._open is None:
            return ""
        kind, text, found = (self._open[name] for name in ("kind", "text", "logprobs"))
        more = {"logprobs": found} if kind == "message" else {}
        events = [
            self._part_event(f"response.{_NAMES[kind]}.done", text=text, **more),
            self._part_event("response.content_part.done", part=_part(kind, text, found)),
        ]
        index = len(self._items)
        self._items.append(self._text_item(kind, index, text, found, "completed"))
        events.append(
            self._event("response.output_item.done", output_index=index, item=self._items[-1])
        )
        self._open = None
        return "".join(events)

    def _call_events(self, call: Mapping[str, Any]) -> str:
        """The events of a call, which comes whole."""
        index = len(self._items)
        item, place = self._call_item(index, call, "completed"), {"output_index": index}
        begun = self._call_item(index, call, "in_progress")
        self._items.append(item)
        arguments, place_in = item["arguments"], {"item_id": item["id"], **place}
        name = "response.function_call_arguments"
        return "".join(
            (
                self._event("response.output_item.added", item=begun, **place),
                self._event(f"{name}.delta", delta=arguments, **place_in),
                self._event(f"{name}.done", arguments=arguments, name=item["name"], **place_in),
                self._event("response.output_item.done", item=item, **place),
            )
        )

    def _part_event(self, kind: str, **body: Any) -> str:
        assert self._open is not None, "parts belong to the open item"
        place = {"item_id": self._open["id"], "output_index": len(self._items), "content_index": 0}
        return self._event(kind, **place, **body)

    def _event(self, kind: str, **body: Any) -> str:
        self._sequence += 1
        written = write_json({"type": kind, "sequence_number": self._sequence - 1, **body})
        return f"event: {kind}\ndata: {written}\n\n"


_NAMES = {"message": "output_text", "reasoning": "reasoning_text"}


def _part(kind: str, text: str, logprobs: Sequence[Any]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's usage under the names of responses; cached and reasoning tokens are not counted."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "dspark": usage["dspark"],
    }
