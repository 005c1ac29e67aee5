"""A prompt as the target reads it: text or chat messages in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from dspark.errors import RequestError, is_unicode
from dspark.targets.target import Target

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN_ROLES = f"{', '.join(ROLES)} and those that the chat template names"


def encode_prompt(
    target: Target, prompt: str | Messages, *, raw: bool, thinking: bool | None
) -> tuple[int, ...]:
    """Token ids of a prompt; see `Model.encode`."""
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise RequestError(f"{target.name} has no tokenizer; give token ids.")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RequestError("The prompt is empty; give at least one word.")
        check_text(prompt)
        if raw or not tokenizer.chat_template:
            return tuple(tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    _check_messages(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise RequestError(f"{target.name} has no chat template; give a plain prompt.")
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in prompt],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )
    except TemplateError as error:
        raise RequestError(f"The chat template refuses the messages: {error}.") from error
    return tuple(encoded["input_ids"])


def check_text(text: str) -> None:
    """Refuse a text that no tokenizer takes.

    Raises:
        RequestError: it is no valid Unicode.
    """
    if not is_unicode(text):
        raise RequestError(
            "The text has bytes or half of a surrogate pair that are no character; give valid "
            "Unicode."
        )


def one_prompt(prompt: str | None, messages: Messages | None) -> str | Messages:
    """Whichever of the two is given.

    Raises:
        RequestError: both are, or neither.
    """
    if prompt is not None and messages is None:
        return prompt
    if messages is not None and prompt is None:
        return messages
    raise RequestError("Give either a prompt or messages.")


def _check_messages(tokenizer: Any, messages: object) -> None:
    """Refuse what is no list of messages with roles that the chat template can know."""
    if isinstance(messages, bytes) or not isinstance(messages, Sequence):
        raise RequestError(f"The prompt is {messages!r}, but must be a text or a list of messages.")
    if not messages:
        raise RequestError("The list of messages is empty; give at least one user message.")
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            shown = dict(message) if isinstance(message, Mapping) else message
            raise RequestError(
                f"A message is {shown!r}, but must have a 'role' and a 'content', both text."
            )
        for key in ("role", "content"):
            check_text(message[key])
        role = message["role"]
        if role not in ROLES and role not in template:
            raise RequestError(f"A message has the role {role!r}, but roles are {_KNOWN_ROLES}.")
