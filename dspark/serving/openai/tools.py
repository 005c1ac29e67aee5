"""Tools of a chat: which of them an answer may or must call, and the grammar that holds it to that.

The grammar is of the markup that the model's own chat template writes around a call, with each
function's JSON schema in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dspark.errors import RequestError
from dspark.request import TokenMask
from dspark.serving.context import Context
from dspark.serving.openai.chat_template import (
    CALL,
    CALL_END,
    THINK,
    THINK_END,
    ChatTemplate,
    Rendered,
)
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import ALWAYS_LONG, SharedFields, Strict, TextFormat
from dspark.serving.openai.grammar import WHITE_SPACE
from dspark.serving.openai.output_parser import ToolCall, read_call

_CHOICES = '\'auto\', \'none\', \'required\' or {"type": "function", "function": {"name": NAME}}'
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}

_NAME, _KEY, _VALUE = "the_function", "the_key", "the_value"
_GAP = r"/[ \n]{0,4}/"


class Function(Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class CallRule:
    """What a call of a function must be.

    Attributes:
        name: of the function.
        schema: of its arguments, which are an object.
    """

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """What an answer is to do with tools.

    Attributes:
        told: tools that the model is told of, as JSON schemas; None for none.
        functions: what it may call.
        forced: whether it must call one of them, and nothing else.
        several: whether it may call more than once.
        because: the parameter for whose sake calls are held to a grammar; None where they are the
            model's own affair.
    """

    told: list[dict[str, Any]] | None = None
    functions: tuple[CallRule, ...] = ()
    forced: bool = False
    several: bool = True
    because: str | None = None


def tool_use(
    tools: Sequence[Tool] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
) -> ToolUse:
    """What `tools`, `tool_choice` and `parallel_tool_calls` ask for together.

    Raises:
        ApiError: they contradict each other, or one has a value that is unknown.
    """
    named = _named(choice)
    if not tools:
        for name, given in (
            ("tool_choice", choice not in (None, "auto", "none")),
            ("parallel_tool_calls", parallel is False),
        ):
            if given:
                raise ApiError(
                    400,
                    f"{name} is given, but no tools are; give tools, or leave it out.",
                    param=name,
                    code="invalid_combination",
                )
        return ToolUse()
    if choice == "none":
        return ToolUse()
    functions = [tool.function for tool in tools]
    if named is not None:
        functions = [each for each in functions if each.name == named][:1]
        if not functions:
            sentence = f"tool_choice names {named[:100]!r}, which is none of the tools."
            raise ApiError(400, sentence, param="tool_choice", code="invalid_value")
    forced = named is not None or choice == "required"
    several = named is None and parallel is not False
    reasons = {
        "tool_choice": forced,
        "parallel_tool_calls": not several,
        "tools": any(function.strict for function in functions),
    }
    because = next((name for name, holds in reasons.items() if holds), None)
    return ToolUse(
        told=[tool.model_dump(exclude_none=True) for tool in tools],
        functions=()
        if because is None
        else tuple(CallRule(each.name, _schema(each, forced)) for each in functions),
        forced=forced,
        several=several,
        because=because,
    )


def _named(choice: str | Mapping[str, Any] | None) -> str | None:
    """The function that a choice names."""
    if choice is None or choice in ("auto", "none", "required"):
        return None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function")
        if set(choice) == {"type", "function"} and isinstance(function, Mapping):
            name = function.get("name")
            if set(function) == {"name"} and isinstance(name, str):
                return name
    shown = json.dumps(choice)[:100]
    sentence = f"tool_choice is {shown}, but must be {_CHOICES}."
    raise ApiError(400, sentence, param="tool_choice", code="unsupported_value")


def _schema(function: Function, forced: bool) -> Mapping[str, Any]:
    """What arguments must be; where no call is forced, `strict` functions alone are held to it."""
    if not (forced or function.strict):
        return ANY_ARGUMENTS
    if function.parameters is None:
        return NO_ARGUMENTS
    if function.parameters.get("type", "object") != "object":
        sentence = (
            f"The parameters of the function {function.name[:100]!r} have a type other than "
            "'object', but arguments are an object."
        )
        raise ApiError(400, sentence, param="tools", code="invalid_value")
    return {"type": "object", **function.parameters}


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


async def calls_mask_of(
    fields: SharedFields, use: ToolUse, rendered: Rendered, template: ChatTemplate, context: Context
) -> TokenMask | None:
    """The mask that holds calls of tools to what is wanted; None where nothing is.

    A response format leaves no room for calls: it rules alone.

    Args:
        fields: the request.
        use: what it wants of tools.
        rendered: its prompt.
        template: that wrote it.
        context: who makes masks.

    Raises:
        RequestError: the package for it is missing, a schema cannot be followed, or the template's
            calls are none that are read here.
        ApiError: the request also wants what excludes a call, or the answer could not end.
    """
    told, grammars = use.told, context.grammars
    formatted = not isinstance(fields.response_format, TextFormat | None)
    if use.forced and formatted:
        sentence = "response_format and a forced tool_choice exclude each other; leave one out."
        raise ApiError(400, sentence, param="response_format", code="invalid_combination")
    if told is None or use.because is None or formatted:
        return None
    for name in ("ignore_eos", "min_tokens"):
        if getattr(fields, name):
            sentence = f"{name} excludes calls that are forced or checked; leave it out."
            raise ApiError(400, sentence, param=name, code="invalid_combination")
    grammars.check_installed(use.because)

    def make() -> TokenMask:
        grammar = calls_grammar(
            call_form(template, told),
            use,
            Marks(template.tokenizer.get_added_vocab()),
            reasons=template.mentions(THINK),
            reasoning_open=rendered.reasoning_open,
        )
        return grammars.lark(grammar, what="tools' schema")

    return await context.prepare(make, ALWAYS_LONG)
