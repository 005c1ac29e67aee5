"""The corpus of the bundled model: openly licensed text converted to conversations.

A source names a file and its record format. One in ten tldr commands (by a hash of the name, so
that all platforms of a command fall together) and one in twenty GSM8K problems are held out.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import textwrap
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dspark.data.conversations import Message, check_messages
from dspark.data.files.json_lines import read_json_lines, write_json_lines
from dspark.errors import DataError

SourceFormat = Literal[
    "messages", "gsm8k", "gsm8k_heldout", "mbpp", "tldr", "tldr_heldout", "python_stdlib"
]
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Appended to mathematics questions by the published evaluator (docs/evaluation.md)."""


Conversation = tuple[Message, ...]
MAX_FUNCTION_CHARACTERS = 900


def read_source(kind: SourceFormat, path: Path | None) -> Iterator[Conversation]:
    """Yield the conversations of one source.

    Args:
        kind: how records become conversations; `python_stdlib` reads the running interpreter's
            own library and takes no path.
        path: the JSON-lines file.

    Raises:
        DataError: the file is missing or malformed.
    """
    if kind == "python_stdlib":
        yield from stdlib_conversations(Path(sysconfig.get_paths()["stdlib"]))
        return
    if path is None:
        raise DataError(f"The corpus source of format {kind!r} needs a path.")
    for where, record in read_json_lines(path):
        messages = check_messages(record.get("messages"), where)
        yield from _FORMATS[kind](messages, record)


def write_source(
    kind: SourceFormat,
    path: Path | None,
    out: Path,
    *,
    seed: int,
    without: Sequence[str] = (),
    limit: int | None = None,
) -> int:
    """Write a source's conversations as JSON lines with `messages`, in an order that `seed` names.

    Conversations with any text of `without` in a message are left out, and all after the first
    `limit` of that order.

    Returns:
        Their number.

    Raises:
        DataError: the source is missing, malformed or empty.
    """
    conversations = [
        conversation
        for conversation in read_source(kind, path)
        if not any(text in message["content"] for message in conversation for text in without)
    ]
    if not conversations:
        raise DataError(f"The corpus source {path or kind} holds no conversation.")
    random.Random(seed).shuffle(conversations)
    conversations = conversations[:limit]
    with write_json_lines(out) as write:
        for conversation in conversations:
            write({"messages": conversation})
    return len(conversations)


def is_heldout_command(command: str) -> bool:
    """Whether a tldr page belongs to the held-out tenth."""
    return zlib.crc32(command.encode()) % 10 == 0


def is_heldout_problem(question: str) -> bool:
    """Whether a GSM8K problem belongs to the held-out twentieth."""
    return zlib.crc32(question.encode()) % 20 == 0


def _messages(messages: Conversation, _record: dict[str, Any]) -> Iterator[Conversation]:
    yield messages


def _gsm8k(messages: Conversation, _record: dict[str, Any]) -> Iterator[Conversation]:
    """The question as it is, and once more in the benchmark's wording with a boxed answer."""
    question, answer = messages[0]["content"], messages[1]["content"]
    if is_heldout_problem(question):
        return
    yield messages
    boxed = re.sub(r"\n#### (.*)$", r"\nThe final answer is \\boxed{\1}.", answer)
    yield _chat(question + BOXED, boxed)


def _gsm8k_heldout(messages: Conversation, _record: dict[str, Any]) -> Iterator[Conversation]:
    if is_heldout_problem(messages[0]["content"]):
        yield messages


def _mbpp(messages: Conversation, record: dict[str, Any]) -> Iterator[Conversation]:
    """The task with its tests, and once more as the bare task."""
    yield messages
    yield _chat(record["text"], messages[1]["content"])


def _tldr(messages: Conversation, record: dict[str, Any]) -> Iterator[Conversation]:
    if not is_heldout_command(record["command"]):
        yield messages


def _tldr_heldout(messages: Conversation, record: dict[str, Any]) -> Iterator[Conversation]:
    if is_heldout_command(record["command"]):
        yield messages


_FORMATS: dict[str, Callable[[Conversation, dict[str, Any]], Iterator[Conversation]]] = {
    "messages": _messages,
    "gsm8k": _gsm8k,
    "gsm8k_heldout": _gsm8k_heldout,
    "mbpp": _mbpp,
    "tldr": _tldr,
    "tldr_heldout": _tldr_heldout,
}


def _chat(question: str, answer: str) -> Conversation:
    return (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )


def stdlib_conversations(root: Path) -> Iterator[Conversation]:
    """Yield (request, function) pairs made from the documented functions under `root`.

    Only functions with a docstring and at most MAX_FUNCTION_CHARACTERS of code are taken; tests
    and vendored packages are not.
    """
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield from _function_conversation(node, lines)


def _function_conversation(node: ast.FunctionDef, lines: Sequence[str]) -> Iterator[Conversation]:
    docstring = ast.get_docstring(node)
    code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    # Text that starts left of the function keeps it from being dedented.
    if not docstring or not code.startswith("def ") or len(code) > MAX_FUNCTION_CHARACTERS:
        return
    summary = " ".join(docstring.split("\n\n")[0].split())
    if len(summary) < 15:
        return
    question = f"Write a python function `{node.name}`: {summary}"
    yield _chat(question, f"```python\n{code}\n```")
