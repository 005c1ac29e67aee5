"""Chat template: messages and tools to token ids, and the marks of reasoning and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from dspark.engine.requests.prompt import check_text
from dspark.errors import RequestError

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Rendered:
    """A chat as the model reads it.

    Attributes:
        token_ids: the prompt.
        reasoning_open: whether the template has opened a passage of reasoning, so that the answer
            begins within it.
    """

    token_ids: tuple[int, ...]
    reasoning_open: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: a transformers tokenizer that has one.
        model: the model's name, for errors.
    """

    tokenizer: Any
    model: str

    @classmethod
    def of(cls, tokenizer: Any, model: str) -> ChatTemplate | None:
        """The template of a tokenizer; None where there is none."""
        if tokenizer is None or not tokenizer.chat_template:
            return None
        return cls(tokenizer, model)

    def mentions(self, word: str, tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Whether the template has a word, so that something named so is not lost in it."""
        source = self.tokenizer.get_chat_template(tools=tools)
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source) is not None

    def encode(self, text: str) -> Rendered:
        """Encode what `write` gave.

        Raises:
            RequestError: it is no valid Unicode, or empty.
        """
        ids = encode(self.tokenizer, text, special=False)
        return Rendered(ids, text.rstrip().endswith(THINK))

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        prompt: bool = True,
        continues: bool = False,
    ) -> str:
        """The messages as text.

        Args:
            messages: with roles, texts, and calls of tools as mappings.
            tools: JSON schemas of functions.
            options: further variables of the template, such as `enable_thinking`.
            prompt: whether the template opens the answer.
            continues: whether the answer goes on where the last message ends.

        Raises:
            RequestError: the template has no place for the tools or an option, or refuses the
                messages.
        """
        if tools and not self.mentions("tools", tools):
            raise RequestError(
                f"The chat template of {self.model} has no place for tools; leave tools out."
            )
        for name in options or ():
            if not self.mentions(name, tools):
                raise RequestError(
                    f"The chat template of {self.model} knows no {name[:200]!r}; leave it out of "
                    "chat_template_kwargs."
                )
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=continues,
                **(options or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"The chat template refuses the messages: {reason}.") from error
        return text


def encode(tokenizer: Any, text: str, *, special: bool = True) -> tuple[int, ...]:
    """Token ids of a text.

    Args:
        tokenizer: a transformers tokenizer.
        text: what to encode.
        special: add the tokens that the tokenizer puts around a text.

    Raises:
        RequestError: the text is no valid Unicode, or empty.
    """
    check_text(text)
    ids = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
    if not ids:
        raise RequestError("The prompt is empty; give at least one word.")
    return ids


def call_arguments(arguments: str) -> Any:
    """Arguments of an earlier call as templates want them: as a mapping where they are one."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
