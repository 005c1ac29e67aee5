"""Fields of `/v1/chat/completions`: messages, tools, and what they ask of the chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dspark.serving.openai.chat_template import ChatTemplate, call_arguments
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import Count, SharedFields, Strict, check_logprobs
from dspark.serving.openai.tools import Tool


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
