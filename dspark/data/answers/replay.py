"""Conversation replay: the turns of a conversation, its answers regenerated one after another.

A backend asks `Replay.next_turn` for the next answer to give, passes the answer to `Replay.take`,
and calls `Replay.fail` if there is none. `AnswerFilters` says which answers are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.data.conversations import Dialogue, Message, read_record


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: without thinking and end marks.
        finish_reason: stop, or length where it was cut.
        tokens: how many were generated; 0 where nobody says.
        thinking: what was thought before it.
        tool_calls: of the assistant, as `conversations.Message` has them.
        token_ids: the tokens themselves; empty where nobody says.
    """

    text: str
    finish_reason: str
    tokens: int = 0
    thinking: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    token_ids: tuple[int, ...] = ()

    @property
    def message(self) -> Message:
        """The reply as a turn of a conversation."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["thinking"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass
class Replay:
    """A conversation on its way.

    Attributes:
        line: its number in the input, from 1.
        checksum: of that line.
        source: the record that stands there; None where it cannot be read.
        dialogue: how it is rendered, its tools and template options; None for raw text.
        raw: text to go on from, without a template.
        said: the turns so far.
        to_come: the turns to come; the answers among them are places to fill.
        place: the answer of the source in whose place the next one comes.
        answers: how many have been given.
        input_ids: of raw text, what has been generated included.
        prompt_len: how many of them were given.
        finish_reason: of the last answer.
        tokens: generated so far.
        fault: why it failed; empty where it has not.
        again: whether it may be tried again (a server that did not answer).
        unwanted: whether one of its answers is not worth keeping.
    """

    line: int
    checksum: int
    source: dict[str, Any] | None
    dialogue: Dialogue | None = None
    raw: str = ""
    said: list[Message] = field(default_factory=list)
    to_come: list[Message] = field(default_factory=list)
    place: Message | None = None
    answers: int = 0
    input_ids: tuple[int, ...] = ()
    prompt_len: int = 0
    finish_reason: str = ""
    tokens: int = 0
    fault: str = ""
    again: bool = False
    unwanted: bool = False

    @classmethod
    def of(
        cls,
        line: int,
        checksum: int,
        source: dict[str, Any],
        where: str,
        options: Mapping[str, Any],
    ) -> Replay:
        """Make a replay of a record, as `records.read_record` reads it.

        A conversation that ends with a user's turn gets one answer more.

        Args:
            line: its number.
            checksum: of the line.
            source: the record.
            where: what to call it in a sentence.
            options: variables of the chat template, which go before those of the record.

        Raises:
            DataError: it holds nothing to answer.
        """
        found = read_record(source, where)
        if found.dialogue is None:
            return cls(line, checksum, source, raw=found.raw)
        given = source.get("chat_template_kwargs")
        both = {**(given if isinstance(given, dict) else {}), **options}
        turns = list(found.dialogue.messages)
        if turns[-1]["role"] != "assistant":
            turns.append({"role": "assistant", "content": ""})
        return cls(
            line,
            checksum,
            source,
            Dialogue((), found.dialogue.tools, both or None),
            to_come=turns,
        )

    @property
    def options(self) -> Mapping[str, Any]:
        """Variables of the chat template."""
        return (self.dialogue.template_options if self.dialogue else None) or {}

    @property
    def tools(self) -> Sequence[dict[str, Any]]:
        """What the assistant may call."""
        return self.dialogue.tools if self.dialogue else ()

    def next_turn(self) -> bool:
        """Say what others say next; whether there is an answer to give now."""
        if self.fault or self.unwanted:
            return False
        if self.dialogue is None:
            return self.answers == 0
        while self.to_come:
            message = self.to_come.pop(0)
            if message["role"] == "assistant":
                self.place = message
                return True
            self.said.append(message)
        return False

    def take(self, reply: Reply, *, keep: bool = True) -> None:
        """Put an answer in its place.

        The conversation ends with an answer that was cut, or that is followed by what tools
        replied to other calls than its own; and before one that ended within its thinking.
        """
        self.tokens += reply.tokens
        if reply.thinking and not reply.text and not reply.tool_calls:
            self.stop("An answer ended within its thinking; raise --max-new-tokens.")
            return
        self.answers += 1
        self.finish_reason = reply.finish_reason
        self.unwanted = not keep
        if self.dialogue is None:
            self.input_ids += reply.token_ids
            return
        self.said.append(reply.message)
        cut = reply.finish_reason != "stop"
        if cut or not self._goes_on(reply):
            self.to_come.clear()

    def _goes_on(self, reply: Reply) -> bool:
        before = (self.place or {}).get("tool_calls") or []
        return _called(before) == _called(reply.tool_calls)

    def stop(self, reason: str) -> None:
        """End it with the answers that it has; without any it fails for this reason."""
        self.to_come.clear()
        while self.said and self.said[-1]["role"] != "assistant":
            self.said.pop()
        if not self.answers:
            self.fail(reason)

    def fail(self, reason: str, *, again: bool = False) -> None:
        """End it without a result."""
        self.fault, self.again = reason, again

    @property
    def status(self) -> str:
        """What became of it: done, failed or skipped."""
        return "failed" if self.fault else "skipped" if self.unwanted else "done"

    def result(self) -> dict[str, Any] | None:
        """The line that goes into the output, or into the list of failures."""
        source = self.source or {}
        if self.fault:
            return {**source, "line": self.line, "error": self.fault}
        if self.unwanted:
            return None
        name = {"id": source["id"]} if "id" in source else {}
        if self.dialogue is None:
            ids = {"input_ids": list(self.input_ids), "prompt_len": self.prompt_len}
            return {**name, **ids, "finish_reason": self.finish_reason}
        record: dict[str, Any] = {**name, "messages": self.said}
        if self.tools:
            record["tools"] = list(self.tools)
        if self.options:
            record["chat_template_kwargs"] = dict(self.options)
        return {**record, "finish_reason": self.finish_reason}


def _called(calls: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    """Name and arguments of calls."""
    functions = [call.get("function") or {} for call in calls]
    return [(function.get("name"), function.get("arguments")) for function in functions]


@dataclass(frozen=True)
class AnswerFilters:
    """Which answers are worth keeping; by default all.

    Attributes:
        finished: only those that the model ended itself, within the limit of tokens.
        token_gram: only those in which no row of so many neighbouring tokens stands twice; 0 does
            not look.
        word_gram: the same of words, as split at white space.
        without: only those that contain none of these texts.
    """

    finished: bool = False
    token_gram: int = 0
    word_gram: int = 0
    without: tuple[str, ...] = ()

    def keeps(self, reply: Reply) -> bool:
        """Whether an answer is wanted."""
        if self.finished and reply.finish_reason != "stop":
            return False
        if any(text in reply.text for text in self.without):
            return False
        rows = ((reply.token_ids, self.token_gram), (reply.text.split(), self.word_gram))
        return not any(repeats_gram(items, size) for items, size in rows)


def repeats_gram(items: Sequence[object], size: int) -> bool:
    """Whether any `size` neighbouring items stand twice in a row of items; for 0, False."""
    if size == 0:
        return False
    grams = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
    return len(set(grams)) < len(grams)
