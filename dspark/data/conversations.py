"""Conversations and prompts: their types, validation, and the record formats of data sets.

A conversation is a list of {"role", "content"} messages. A prompt line holds `messages`, `turns`
(user turns only; the first is the prompt, later ones follow its answer) or `prompt` (raw text
without a template). `read_record` also accepts the spellings common in data sets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.data.files.json_lines import read_json_lines
from dspark.errors import DataError, is_unicode

Message = dict[str, Any]
"""`role` and `content`, both text; optionally `thinking` (text), `tool_calls` (OpenAI's format, but
arguments as an object), `tool_call_id` and `name`."""
ROLES = ("system", "user", "assistant", "tool")
THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")
"""Keys under which templates, servers and data sets hold a model's thinking."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: chat messages that end with a user turn, or raw text.

    Attributes:
        messages: chat messages, or None for raw text.
        text: the raw text, or the last user turn.
        later: further user turns, each asked after the answer to the previous one.
    """

    messages: tuple[Message, ...] | None
    text: str
    later: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """A conversation with everything its rendering depends on.

    Attributes:
        messages: the turns.
        tools: descriptions of the tools that the assistant may call, in the template's format.
        template_options: further variables of the chat template, such as `enable_thinking`; None
            if unknown.
        complete: whether the assistant ended its last answer itself; otherwise it was truncated.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    template_options: Mapping[str, Any] | None = None
    complete: bool = True

    @classmethod
    def of(cls, record: Mapping[str, Any], where: str) -> Dialogue:
        """Read a record: `messages`; `tools`, `chat_template_kwargs`, `finish_reason` if present.

        Raises:
            DataError: one of them is malformed.
        """
        messages = check_messages(record.get("messages"), where)
        tools, options = record.get("tools"), record.get("chat_template_kwargs")
        if tools is not None and not _is_list_of_objects(tools):
            raise DataError(f"{where}: 'tools' must be a list of objects.")
        if options is not None and not isinstance(options, dict):
            raise DataError(f"{where}: 'chat_template_kwargs' must be an object.")
        complete = record.get("finish_reason") != "length"
        return cls(messages, tuple(tools or ()), options, complete)


def check_messages(messages: object, where: str) -> tuple[Message, ...]:
    """Validate messages and return them as `Message` dictionaries.

    Content in parts, as in OpenAI's API, becomes one text.

    Raises:
        DataError: they are not a non-empty list of {"role", "content"} with known roles.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a non-empty list.")
    return tuple(_check_message(message, where) for message in messages)


def _check_message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where}: every message needs a 'role' and a 'content' string.")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: the role is {role!r}, but must be one of {ROLES}.")
    calls = message.get("tool_calls") or []
    content = joined_parts(message.get("content"))
    if content is None and calls:
        content = ""
    if content is None:
        raise DataError(f"{where}: every message needs a 'role' and a 'content' string.")
    checked: Message = {"role": role, "content": content}
    if thinking := thinking_of(message):
        checked["thinking"] = thinking
    if calls:
        checked["tool_calls"] = check_tool_calls(calls, where)
    for key in ("tool_call_id", "name"):
        if isinstance(message.get(key), str):
            checked[key] = message[key]
    for text in (content, thinking):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: a text has {text[error.start]!r}, half a character."
            ) from None
    return checked


def thinking_of(message: Mapping[str, Any]) -> str:
    """A message's thinking, under any of its keys; empty if there is none."""
    found = (message.get(key) for key in THINKING_KEYS)
    return next((text for text in found if isinstance(text, str) and text), "")


def joined_parts(content: object) -> str | None:
    """The text of a message's content, which may come in parts; None if it is not text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]


def check_tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Validate an assistant's tool calls and parse their arguments, as templates require.

    Raises:
        DataError: one of them names no function.
    """
    if not isinstance(calls, list) or not _is_list_of_objects(calls):
        raise DataError(f"{where}: 'tool_calls' must be a list of objects.")
    checked = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a tool call needs a 'function' with a 'name'.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise DataError(
                    f"{where}: the arguments of {function['name']!r} are not valid JSON."
                ) from None
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_conversations(path: str | Path) -> Iterator[tuple[Message, ...]]:
    """Yield every conversation of a file with a `messages` field a line.

    Raises:
        DataError: the file or a line is malformed.
    """
    for where, record in read_json_lines(path):
        yield check_messages(record.get("messages"), where)


def as_prompt(record: dict[str, Any], where: str) -> Prompt:
    """Convert one JSON object to a prompt.

    Trailing assistant messages of `messages` are dropped: the model is to answer.

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
        first, *later = check_turns(record["turns"], where)
        return Prompt(({"role": "user", "content": first},), first, tuple(later))
    text = record.get("prompt")
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: needs 'messages', 'turns' or a non-empty 'prompt'.")
    return Prompt(None, text)


def check_turns(turns: object, where: str) -> Sequence[str]:
    """Validate user turns.

    Raises:
        DataError: they are not a non-empty list of strings.
    """
    whole = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
    if not whole or not isinstance(turns, list):
        raise DataError(f"{where}: 'turns' must be a non-empty list of strings.")
    return turns


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts from a JSON-lines file, at most `limit` of them.

    Raises:
        DataError: the file or a line is malformed, or there is no prompt in it.
    """
    prompts: list[Prompt] = []
    for where, record in read_json_lines(path):
        if limit is not None and len(prompts) >= limit:
            break
        if not is_unicode(json.dumps(record, ensure_ascii=False)):
            raise DataError(f"{where} has half of a surrogate pair, which is no character.")
        prompts.append(as_prompt(record, where))
    if not prompts:
        raise DataError(f"{path} holds no prompt.")
    return prompts


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
"""Role names in data sets and their standard names; turns of other roles are dropped."""
RECORD_KEYS = ("messages", "conversations", "turns", "prompt", "instruction")
"""Keys that may hold a record's turns, in order of precedence."""


@dataclass(frozen=True)
class ParsedRecord:
    """The conversation or raw text of a record.

    Attributes:
        dialogue: its turns; None for raw text.
        raw: text without a template, if it holds no turns.
        dropped: number of dropped turns by role: unknown roles, and answers before the first
            question (as "assistant").
    """

    dialogue: Dialogue | None
    raw: str = ""
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def asked(self) -> list[str]:
        """Everything given to the model, that is, all but the answers; identifies the prompt."""
        if self.dialogue is None:
            return [self.raw]
        return [m["content"] for m in self.dialogue.messages if m["role"] != "assistant"]

    @property
    def user_turns(self) -> list[str]:
        """The user turns, or the raw text."""
        if self.dialogue is None:
            return [self.raw]
        return [m["content"] for m in self.dialogue.messages if m["role"] == "user"]


def read_record(record: Mapping[str, Any], where: str) -> ParsedRecord:
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
        found = ParsedRecord(Dialogue.of({"messages": said}, where))
    elif isinstance(record.get("prompt"), str):
        found = ParsedRecord(None, record["prompt"])
    elif isinstance(record.get("instruction"), str):
        text = with_input(record["instruction"], record.get("input"))
        found = ParsedRecord(Dialogue.of({"messages": list(_asked_and_answered(text))}, where))
    else:
        *others, last = map(repr, RECORD_KEYS)
        raise DataError(f"{where}: needs {', '.join(others)} or {last}.")
    if not any(text.strip() for text in found.user_turns):
        raise DataError(f"{where}: there is no user turn with any text.")
    return found


def with_input(instruction: str, given: object) -> str:
    """An instruction in Alpaca's format, with its input text if there is one."""
    if not isinstance(given, str) or not given.strip():
        return instruction
    return f"{instruction}\n\nInput:\n{given}"


def _asked_and_answered(text: str) -> tuple[Message, Message]:
    return {"role": "user", "content": text}, {"role": "assistant", "content": ""}


def _conversation(record: Mapping[str, Any], turns: object, where: str) -> ParsedRecord:
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
            dropped[role] += 1  # it answers no question
        else:
            content = turn.get("content", turn.get("value"))
            messages.append({**turn, "role": role, "content": content})
    if not any(m["role"] == "user" for m in messages):
        raise DataError(f"{where}: there is no user turn with any text.")
    # Data sets hold None for no tools.
    whole = {"messages": messages, "tools": record.get("tools") or None}
    return ParsedRecord(Dialogue.of(whole, where), dropped=dropped)
