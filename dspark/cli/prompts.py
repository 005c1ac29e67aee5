"""Where prompts come from: options, a JSON-lines file, or standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dspark.errors import DataError, UsageError, is_unicode

if TYPE_CHECKING:
    from dspark.data.conversations import Message
    from dspark.engine.model import Model


@dataclass(frozen=True)
class PromptText:
    """A prompt as it was given.

    Attributes:
        text: the text, or the last turn of a dialogue.
        messages: the dialogue, empty for a text.
    """

    text: str
    messages: Sequence[Message] = field(default=())

    def encode(self, model: Model, *, raw: bool) -> tuple[int, ...]:
        """Token ids: by the chat template where there is one, unless `raw`.

        Raises:
            RequestError: nothing to encode, or no template for a dialogue.
            UsageError: `raw` is asked of a dialogue of several messages.
        """
        if raw and len(self.messages) > 1:
            raise UsageError(
                f"--raw takes texts, but a prompt is a dialogue of {len(self.messages)} messages; "
                "leave --raw out."
            )
        if len(self.messages) > 1:
            return model.encode(self.messages)
        return model.encode(self.text, raw=raw)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name prompts."""
    group = parser.add_argument_group("prompts (standard input, as one prompt, if none is named)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeatable")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines with `turns` (the first one is asked), `messages` or `prompt`",
    )
    group.add_argument(
        "--raw", action="store_true", help="take texts as they are, without the chat template"
    )


def read_prompt_texts(options: argparse.Namespace) -> list[PromptText]:
    """The prompts that the options name.

    Raises:
        UsageError: none is named, and standard input is a terminal.
        DataError: the file is missing or malformed, or standard input is not text.
    """
    if options.prompt is not None:
        return [PromptText(text) for text in options.prompt]
    if options.prompts is not None:
        from dspark.data.conversations import read_prompts

        return [PromptText(p.text, p.messages or ()) for p in read_prompts(options.prompts)]
    if sys.stdin.isatty():
        raise UsageError("There is no prompt; give --prompt TEXT, --prompts FILE or a pipe.")
    return [PromptText(_read_stdin())]


def _read_stdin() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"Standard input is not {error.encoding} text; convert it.") from error
    if not is_unicode(text):  # where the locale lets any byte through
        raise DataError(f"Standard input is not {sys.stdin.encoding} text; convert it.")
    return text.removesuffix("\n")
