"""Fields of `/v1/responses`, and the chat that they are: items of a conversation to messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from dspark.serving.openai.chat_fields import CalledFunction, ChatFields, EarlierCall, Message
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import (
    CommonFields,
    Count,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Strict,
    TextFormat,
)
from dspark.serving.openai.tools import Function, Tool

_LOGPROBS = "message.output_text.logprobs"


class InputText(Strict):
    """A part of a message of the conversation."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class _Item(Strict):
    """An item of the conversation; it may come back as a response gave it."""

    id: str | None = None
    status: str | None = None


class InputMessage(_Item):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]


class InputCall(_Item):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(_Item):
    """What the called function gave back."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


class ReasoningText(Strict):
    """A part of an earlier reasoning."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(_Item):
    """What the model reasoned earlier."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: None = None


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning


class ResponseTool(Function):
    """A function that the model may call."""

    type: Literal["function"]


class ResponseJsonSchema(JsonSchema):
    """A format of JSON by a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class TextOptions(Strict):
    """Format and verbosity of a response's text."""

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


class ResponseFields(CommonFields):
    """The body of a response.

    Attributes:
        input: a user's text, or the items of the conversation.
        instructions: a system message in front.
        parallel_tool_calls, tool_choice: as in chats; a named function is
            `{"type": "function", "name": NAME}`.
        max_output_tokens: new tokens at most.
        tools: functions.
        text: format and verbosity of the text.
        reasoning: effort, where the template knows it.
        include: `message.output_text.logprobs` reports log-probabilities; others have no effect.
        top_logprobs: log-probabilities of so many likely tokens.
        truncation: `disabled`; a conversation that does not fit is refused.
        previous_response_id, conversation, prompt, background: refused, since nothing is stored.
        store, stream_options, max_tool_calls: without effect.
    """

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Count | None = None
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
        """The same request as a chat.

        Raises:
            ApiError: the conversation has no message.
        """
        messages = _messages(self.input, self.instructions)
        if not messages:
            raise ApiError(422, "input is empty; give a text or a message.", param="input")
        # Here `store` asks to keep the response for fetching it later, not to learn from it.
        shared = {*CommonFields.model_fields, "parallel_tool_calls", "top_logprobs"} - {"store"}
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
    return Tool(type="function", function=Function(**tool.model_dump(exclude={"type"})))


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
    schema = JsonSchema(**given.model_dump(by_alias=True, exclude={"type"}))
    return JsonSchemaFormat(type="json_schema", json_schema=schema)
