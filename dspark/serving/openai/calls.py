"""Answers that are held to calls of tools.

By a grammar of the markup that the model's own template writes, each function's JSON schema in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark.errors import RequestError
from dspark.serving.openai.chat_template import CALL, CALL_END, THINK, THINK_END, ChatTemplate
from dspark.serving.openai.grammar import WHITE_SPACE
from dspark.serving.openai.output_parser import ToolCall, read_call
from dspark.serving.openai.tools import CallRule, ToolUse

_NAME, _KEY, _VALUE = "the_function", "the_key", "the_value"
_GAP = r"/[ \n]{0,4}/"


@dataclass(frozen=True)
class CallForm:
    """How a chat template writes a call, the marks `<tool_call>` and `</tool_call>` around it.

    Attributes:
        before: in front of the function's name.
        between: from there to the arguments.
        after: behind them.
        separator: between two of them, white space.
    """

    before: str
    between: str
    after: str
    separator: str


def call_form(template: ChatTemplate, told: list[dict[str, Any]]) -> CallForm:
    """Have the template write calls down, to see how it does.

    Args:
        template: of the model.
        told: tools of the chat.

    Raises:
        RequestError: it writes none that `parsing` reads, or arguments before the name.
    """
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    calls = [{"id": f"call0000{i}", "type": "function", "function": function} for i in range(2)]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    arguments = rf'\{{\s*"{_KEY}"\s*:\s*"{_VALUE}"\s*\}}'
    inside = rf"((?:(?!{CALL}).)*?)"
    pattern = rf"{CALL}{inside}{_NAME}{inside}({arguments}){inside}{CALL_END}"
    refusal = RequestError(
        f"Calls of tools cannot be forced or checked with the chat template of {template.model}, "
        f"which does not write them as JSON objects with name and arguments in {CALL}; leave out "
        "tool_choice, parallel_tool_calls and strict."
    )
    if {CALL, CALL_END} & set(template.tokenizer.all_special_tokens):  # which no text shows
        raise refusal
    try:
        text = template.write(messages, told, prompt=False)
    except RequestError as error:
        raise refusal from error
    found = list(re.finditer(pattern, text, re.DOTALL))
    if len(found) != 2:
        raise refusal
    first, second = found
    separator = text[first.end() : second.start()]
    whole = first.group()[len(CALL) : -len(CALL_END)]
    if separator.strip() or read_call(whole) != ToolCall(_NAME, json.dumps({_KEY: _VALUE})):
        raise refusal
    return CallForm(first.group(1), first.group(2), first.group(4), separator)


@dataclass(frozen=True)
class Marks:
    """How marks are spelt in a grammar: as the tokens that they are, where they are any.

    Attributes:
        ids: of the tokens that a tokenizer has besides those of its model, by their texts. Within
            any text of a grammar these do not occur.
    """

    ids: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Marks:
        """The marks of a transformers tokenizer."""
        return cls(tokenizer.get_added_vocab())

    def spelt(self, mark: str) -> str:
        """A mark alone."""
        return f"<[{self.ids[mark]}]>" if mark in self.ids else json.dumps(mark)

    def text(self, text: str) -> str:
        """A text with marks in it."""
        parts = re.split(f"({CALL}|{CALL_END})", text)
        return " ".join(self.spelt(part) for part in parts if part)

    def up_to(self, name: str, mark: str, but: str = "") -> list[str]:
        """Rules for any text up to a mark, which it ends with.

        Args:
            name: of the rule.
            mark: that ends it.
            but: an expression that the text must not match as a whole.
        """
        rest = f" & ~{but}" if but else ""
        upper, slashed = name.upper(), mark.replace("/", r"\/")
        if mark not in self.ids:
            return [f"{name}[lazy]: {upper}", rf"{upper}: /(.|\n)*{slashed}/{rest}"]
        never = rf" & ~/(.|\n)*{slashed}(.|\n)*/"  # spelt in other tokens it would be read too
        return [f"{name}: {upper} {self.spelt(mark)}", rf"{upper}: /(.|\n)*/{never}{rest}"]


def calls_grammar(
    form: CallForm, use: ToolUse, marks: Marks, *, reasons: bool, reasoning_open: bool
) -> str:
    """Answers that keep to what is wanted of tools, as a grammar in Lark's notation.

    Forced, an answer is calls and nothing else. Otherwise it is any text, in which `<tool_call>`
    begins a call that is held to its form. A model that reasons may do so before either.

    Args:
        form: of a call.
        use: what is wanted.
        marks: of the model's tokenizer.
        reasons: whether the model reasons, in its marks.
        reasoning_open: whether the prompt has opened a passage of it.
    """
    rules = [f"body: {' | '.join(f'call_{i}' for i in range(len(use.functions)))}"]
    rules += [f"call_{i}: {_call(form, rule, marks)}" for i, rule in enumerate(use.functions)]
    thought = ""
    if reasons:
        rules += [*marks.up_to("thought", THINK_END), f"gap: {_GAP}"]
        thought = "thought gap " if reasoning_open else f"({marks.spelt(THINK)} thought gap)? "
    if use.forced:
        more = f" ({marks.text(form.separator + CALL)} body)*" if use.several else ""
        return "\n".join([f"start: {thought}{marks.spelt(CALL)} body{more}", *rules])
    # A text that begins as a thought does is nothing else.
    but = rf"/{THINK}(.|\n)*/" if reasons and not reasoning_open else ""
    never = rf" & ~/(.|\n)*{CALL}(.|\n)*/" if CALL in marks.ids else ""
    rules += marks.up_to("talk", CALL, but)
    rules.append(rf"REST: /(.|\n)*/{never}" + (f" & ~{but}" if but else ""))
    said = "(talk body)* REST" if use.several else "(REST | talk body)"
    return "\n".join([f"start: {thought}{said}", *rules])


def _call(form: CallForm, rule: CallRule, marks: Marks) -> str:
    name = json.dumps(rule.name, ensure_ascii=False)[1:-1]
    head = json.dumps(form.before + name + form.between)
    schema = json.dumps({"x-guidance": {"whitespace_pattern": WHITE_SPACE}, **rule.schema})
    return f"{head} %json {schema} {marks.text(form.after + CALL_END)}"
