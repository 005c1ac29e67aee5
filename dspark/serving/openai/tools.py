"""Tools of a chat: which of them an answer may call, must call, and how often."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import Strict

_CHOICES = '\'auto\', \'none\', \'required\' or {"type": "function", "function": {"name": NAME}}'
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


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
