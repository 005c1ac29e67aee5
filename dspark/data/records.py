"""Records of data sets as they are found, turned into conversations with the roles we know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.data.conversations import Dialogue, Message, check_turns
from dspark.errors import DataError

ROLE_NAMES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
}
"""What data sets call the roles of a conversation; turns of other roles are dropped."""
RECORD_KEYS = ("messages", "conversations", "turns", "prompt", "instruction")
"""Where a record may hold its turns, in the order in which they are looked for."""


@dataclass(frozen=True)
class Found:
    """A record that could be read.

    Attributes:
        dialogue: its turns; None for raw text.
        raw: text without a template, where it holds no turns.
        dropped: how many turns of roles that we do not know, by role, and how many answers before
            the first question (as "assistant").
    """

    dialogue: Dialogue | None
    raw: str = ""
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def asked(self) -> list[str]:
        """What is given to the model, all but the answers: what makes two prompts the same."""
        if self.dialogue is None:
            return [self.raw]
        return [m["content"] for m in self.dialogue.messages if m["role"] != "assistant"]

    @property
    def user_turns(self) -> list[str]:
        """What the user says, or the raw text."""
        if self.dialogue is None:
            return [self.raw]
        return [m["content"] for m in self.dialogue.messages if m["role"] == "user"]


def read_record(record: Mapping[str, Any], where: str) -> Found:
    """Read a record: `messages`, `conversations`, `turns`, `prompt`, or `instruction`.

    Turns may be {"role", "content"} or {"from", "value"}, roles as in `ROLE_NAMES`. An
    `instruction` may have an `input`.

    Raises:
        DataError: it holds none of them, or no user turn with any text.
    """
    turns = record.get("messages") or record.get("conversations")
    if turns is not None:
        found = _conversation(record, turns, where)
    elif "turns" in record:
        said = [
            m for turn in check_turns(record["turns"], where) for m in _asked_and_answered(turn)
        ]
        found = Found(Dialogue.of({"messages": said}, where))
    elif isinstance(record.get("prompt"), str):
        found = Found(None, record["prompt"])
    elif isinstance(record.get("instruction"), str):
        text = with_input(record["instruction"], record.get("input"))
        found = Found(Dialogue.of({"messages": list(_asked_and_answered(text))}, where))
    else:
        *others, last = map(repr, RECORD_KEYS)
        raise DataError(f"{where}: needs {', '.join(others)} or {last}.")
    if not any(text.strip() for text in found.user_turns):
        raise DataError(f"{where}: there is no user turn with any text.")
    return found


def with_input(instruction: str, given: object) -> str:
    """What Alpaca's records ask: an instruction, and the text that it is about, if there is any."""
    if not isinstance(given, str) or not given.strip():
        return instruction
    return f"{instruction}\n\nInput:\n{given}"


def _asked_and_answered(text: str) -> tuple[Message, Message]:
    return {"role": "user", "content": text}, {"role": "assistant", "content": ""}


def _conversation(record: Mapping[str, Any], turns: object, where: str) -> Found:
    if not isinstance(turns, Sequence) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: the turns of a conversation must be a list of objects.")
    dropped: Counter[str] = Counter()
    messages: list[dict[str, Any]] = []
    for turn in turns:
        name = str(turn.get("role", turn.get("from")))
        role = ROLE_NAMES.get(name.lower())
        if role is None:
            dropped[name] += 1
        elif role == "assistant" and not any(m["role"] == "user" for m in messages):
            dropped[role] += 1  # there is nothing yet that it answers
        else:
            content = turn.get("content", turn.get("value"))
            messages.append({**turn, "role": role, "content": content})
    if not any(m["role"] == "user" for m in messages):
        raise DataError(f"{where}: there is no user turn with any text.")
    whole = {"messages": messages, "tools": _tools(record)}
    return Found(Dialogue.of(whole, where), dropped=dropped)


def _tools(record: Mapping[str, Any]) -> object:
    """The tools of a record; columns of data sets hold None where there are none."""
    return record.get("tools") or None
