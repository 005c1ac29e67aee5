"""Reads conversations and prompts from JSON-lines files, plain or gzipped.

A conversation is a list of {"role", "content"} messages. A prompt line holds `messages`, `turns`
(user turns only; the first one is the prompt) or `prompt` (raw text without a template).
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.errors import DataError

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """A prompt: chat messages that end with a user turn, or raw text.

    Attributes:
        messages: chat messages, or None for raw text.
        text: the raw text, or the last user turn.
    """

    messages: tuple[Message, ...] | None
    text: str


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a .jsonl or .jsonl.gz file.

    Raises:
        DataError: the file is missing, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"The file {path} does not exist.")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"{path}, line {number} is not a JSON object.")
                yield number, record
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error.msg}.") from error
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read to its end: {error}.") from error


@contextmanager
def write_json_lines(path: str | Path) -> Iterator[Callable[[object], None]]:
    """Open a JSON-lines file (`.gz` compresses) and yield the function that adds a line.

    The file takes its place once it is complete; until then an older one stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(fresh, "wt", encoding="utf-8") as file:
        yield lambda record: print(json.dumps(record), file=file)
    os.replace(fresh, path)


def check_messages(messages: object, where: str) -> tuple[Message, ...]:
    """Return the messages as plain dictionaries.

    Raises:
        DataError: they are not a non-empty list of {"role", "content"} with known roles.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a non-empty list.")
    checked: list[Message] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: every message needs a 'role' and a 'content' string.")
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: the role is {message.get('role')!r}, but must be one of {ROLES}."
            )
        checked.append({"role": message["role"], "content": message["content"]})
    return tuple(checked)


def read_conversations(path: str | Path) -> Iterator[tuple[Message, ...]]:
    """Yield every conversation of a file with a `messages` field a line.

    Raises:
        DataError: the file or a line is malformed.
    """
    for number, record in read_json_lines(path):
        yield check_messages(record.get("messages"), f"{path}, line {number}")


def as_prompt(record: dict[str, Any], where: str) -> Prompt:
    """Turn one JSON object into a prompt.

    Trailing assistant messages of `messages` are dropped: the answer is the model's to give.

    Raises:
        DataError: the record holds none of `messages`, `turns`, `prompt`, or an empty prompt.
    """
    if "messages" in record:
        messages = list(check_messages(record["messages"], where))
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{where}: the messages hold no user turn.")
        return Prompt(tuple(messages), messages[-1]["content"])
    if "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise DataError(f"{where}: 'turns' must be a non-empty list of strings.")
        return Prompt(({"role": "user", "content": turns[0]},), turns[0])
    text = record.get("prompt")
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: needs 'messages', 'turns' or a non-empty 'prompt'.")
    return Prompt(None, text)


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts from a JSON-lines file, at most `limit` of them.

    Raises:
        DataError: the file or a line is malformed, or there is no prompt in it.
    """
    prompts: list[Prompt] = []
    for number, record in read_json_lines(path):
        if limit is not None and len(prompts) >= limit:
            break
        prompts.append(as_prompt(record, f"{path}, line {number}"))
    if not prompts:
        raise DataError(f"{path} holds no prompt.")
    return prompts
