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
        text: without thinking and end tokens.
        finish_reason: stop, or length if it was truncated.
        tokens: number generated; 0 if unknown.
        thinking: the thinking before it.
        tool_calls: of the assistant, in the format of `conversations.Message`.
        token_ids: the tokens; empty if unknown.
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
    """A conversation in progress.

    Attributes:
        line: its number in the input, from 1.
        checksum: of that line.
        source: the line's record; None if it cannot be read.
        dialogue: its tools and template options; None for raw text.
        raw: text to continue without a template.
        said: the turns so far.
        to_come: the remaining turns; their answers are placeholders.
        place: the source's answer that the next one replaces.
        answers: number of answers so far.
        input_ids: of raw text, including generated tokens.
        prompt_len: number of prompt tokens among them.
        finish_reason: of the last answer.
        tokens: generated so far.
        fault: why it failed; otherwise empty.
        again: whether it may be retried (a server did not answer).
        unwanted: whether the filters rejected an answer.
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
        """The replay of a record, read by `conversations.read_record`.

        A conversation that ends with a user turn gets one more answer.

        Args:
            line: its number.
            checksum: of the line.
            source: the record.
            where: its name in messages.
            options: chat-template variables, which override the record's.

        Raises:
            DataError: there is nothing to answer.
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
        """The tools that the assistant may call."""
        return self.dialogue.tools if self.dialogue else ()

    def next_turn(self) -> bool:
        """Advance to the next answer; False if there is none."""
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
        """Add an answer.

        The conversation ends after a truncated answer or one whose tool calls differ from the
        source's (whose tool results follow), and before an answer that ended within its thinking.
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
        """End with the answers so far; fail for this reason if there are none."""
        self.to_come.clear()
        while self.said and self.said[-1]["role"] != "assistant":
            self.said.pop()
        if not self.answers:
            self.fail(reason)

    def fail(self, reason: str, *, again: bool = False) -> None:
        """End without a result."""
        self.fault, self.again = reason, again

    @property
    def status(self) -> str:
        """done, failed or skipped."""
        return "failed" if self.fault else "skipped" if self.unwanted else "done"

    def result(self) -> dict[str, Any] | None:
        """The record for the output or the list of failures; None if skipped."""
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
    """Names and arguments of tool calls."""
    functions = [call.get("function") or {} for call in calls]
    return [(function.get("name"), function.get("arguments")) for function in functions]


@dataclass(frozen=True)
class AnswerFilters:
    """Conditions that an answer must meet to be kept; none by default.

    Attributes:
        finished: the model ended it within the token limit.
        token_gram: no n-gram of this many tokens occurs twice; 0 disables the check.
        word_gram: likewise for words, split at white space.
        without: it contains none of these texts.
    """

    finished: bool = False
    token_gram: int = 0
    word_gram: int = 0
    without: tuple[str, ...] = ()

    def keeps(self, reply: Reply) -> bool:
        """Whether an answer is kept."""
        if self.finished and reply.finish_reason != "stop":
            return False
        if any(text in reply.text for text in self.without):
            return False
        rows = ((reply.token_ids, self.token_gram), (reply.text.split(), self.word_gram))
        return not any(repeats_gram(items, size) for items, size in rows)


def repeats_gram(items: Sequence[object], size: int) -> bool:
    """Whether any n-gram of `size` items occurs twice; False for 0."""
    if size == 0:
        return False
    grams = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
    return len(set(grams)) < len(grams)
