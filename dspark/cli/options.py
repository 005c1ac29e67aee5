"""Command-line options: each declared once, as a field of a dataclass, and shared as groups.

A command's options are a frozen dataclass. It inherits the groups (`cli.groups`) that it takes
whole and takes single options of other groups by `pick`, with a default or a help text of its own.
A field with a plain default is no option of that command. A class's `TITLE` heads its options in
`--help`; classes with `LAST` come behind the others, in the order of its numbers.

argparse does the parsing: it is in the standard library, starts in milliseconds, and its help is
what users know. What it lacks, types and sharing, is the table below; click, typer and tyro bring
both, but each would change flags, messages or exit codes that scripts rely on.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from dspark.errors import UsageError

T = TypeVar("T")
OptionsT = TypeVar("OptionsT")


def option(default: Any, help: str | None, **how: Any) -> Any:
    """A field that is an option.

    The annotation gives the type: `bool` is a switch, `Literal` a choice, `tuple[X, ...]` an option
    that can be repeated.

    Args:
        default: its value where it is not given.
        help: for `--help`; `{default}` is filled in.
        how: for argparse (`metavar`, `required`, `nargs`, `action`, `choices`), or one of
            flag: its name, where that is not the field's.
            positional: whether it is given by its place.
            read: parses the text, in place of the type.
            least: smallest value that is accepted.
            exclusive: options of the class with the same word here exclude each other.
    """
    return field(default=default, metadata={"how": {"help": help, **how}})


def pick(group: type, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """An option of another group, with another default or other details."""
    own: Field[Any] = group.__dataclass_fields__[name]  # type: ignore[attr-defined]
    how = own.metadata["how"] | changes
    return field(default=own.default if default is MISSING else default, metadata={"how": how})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add what a dataclass declares: its own options first, then its groups in their order."""
    hints, places = get_type_hints(options), _Places(parser)
    owners = {name: c for c in reversed(options.__mro__) for name in inspect.get_annotations(c)}
    order = sorted(options.__mro__, key=lambda owner: vars(owner).get("LAST", 0))
    for each in sorted(_declared(options), key=lambda each: order.index(owners[each.name])):
        how = dict(each.metadata["how"])
        named = vars(owners[each.name])
        exclusive = how.pop("exclusive", None)
        place = places.of(named.get("TITLE", ""), named.get("ABOUT"), exclusive)
        words, keywords = _for_argparse(each, hints[each.name], how)
        place.add_argument(*words, **keywords)


def read_options(options: type[OptionsT], found: argparse.Namespace) -> OptionsT:
    """The parsed values as a dataclass.

    Raises:
        UsageError: a number is smaller than it may be.
    """
    values: dict[str, Any] = {"words": found.words}
    for each in _declared(options):
        value, least = getattr(found, each.name), each.metadata["how"].get("least")
        if isinstance(value, list):
            value = tuple(value)
        elif value is None:
            value = each.default
        if least is not None and value is not None and value < least:
            raise UsageError(f"{_flag(each)} is {value}, but must be at least {least}.")
        values[each.name] = value
    return options(**values)


def picked(source: object, *names: str) -> dict[str, Any]:
    """Some attributes of options, or of a report, by their names."""
    return {name: getattr(source, name) for name in names}


def comma_list(read: Callable[[str], T], what: str) -> Callable[[str], tuple[T, ...]]:
    """Parses a list between commas, each value once; `what` describes it in the refusal."""

    def parse(text: str) -> tuple[T, ...]:
        try:
            return tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what}") from error

    return parse


def positive(text: str) -> float:
    """Parse a finite number above 0; what is no number is a ValueError."""
    return number(text, above=True)


def number(text: str, *, above: bool = False) -> float:
    """Parse a finite number of at least 0, or above 0; what is no number is a ValueError."""
    value = float(text)
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        bound = "above 0" if above else "0 or above"
        raise argparse.ArgumentTypeError(f"{text.strip()} is not {bound}")
    return value


def integer(least: int, most: int, shown: str) -> Callable[[str], int]:
    """Parses an integer of a range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {shown}")
        return int(text)

    return parse


class _Place(Protocol):
    """What an option is added to: a parser, or a group of one."""

    def add_argument(self, *words: str, **keywords: Any) -> argparse.Action: ...


class _Places:
    """The argument groups of a parser by title, and those of options that exclude each other."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._found: dict[tuple[str, str | None], Any] = {}

    def of(self, title: str, about: str | None, exclusive: str | None) -> _Place:
        if not title and exclusive is None:
            return self._parser
        if (title, None) not in self._found:
            self._found[title, None] = self._parser.add_argument_group(title, about)
        if (title, exclusive) not in self._found:
            group = self._found[title, None].add_mutually_exclusive_group()
            self._found[title, exclusive] = group
        place: _Place = self._found[title, exclusive]
        return place


def _declared(options: type) -> list[Field[Any]]:
    return [each for each in fields(options) if "how" in each.metadata]


def _flag(each: Field[Any]) -> str:
    return str(each.metadata["how"].get("flag") or "--" + each.name.replace("_", "-"))


def _for_argparse(
    each: Field[Any], hint: Any, how: dict[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Words and keywords of `add_argument`."""
    read, positional = how.pop("read", None), how.pop("positional", False)
    for name in ("flag", "least"):
        how.pop(name, None)
    help = how.pop("help")
    if help is not None:
        default = each.default.replace("%", "%%") if isinstance(each.default, str) else each.default
        how["help"] = help.replace("{default}", str(default))
    kind = _without_none(hint)
    if get_origin(kind) is tuple and read is None:
        kind = get_args(kind)[0]
        if not positional:
            how.setdefault("action", "append")
    if get_origin(kind) is Literal:
        how.setdefault("choices", get_args(kind))
    elif kind is bool:
        how.setdefault("action", "store_true")
    elif "action" not in how or how["action"] == "append":
        how["type"] = read or (kind if kind in (int, float, Path) else None)
    if positional:
        return (each.name,), how
    repeated = how.get("action") == "append"
    return (_flag(each),), {"dest": each.name, "default": None if repeated else each.default, **how}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return kinds[0] if len(kinds) == 1 else str
    return hint


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: the word on the command line.
        summary: one line for the overview, and the start of its help.
        example: ends its help.
        options: the dataclass of its options.
        run: does it: (options, screen) -> its JSON object.
    """

    name: str
    summary: str
    example: str
    options: type
    run: Callable[[Any, Any], Mapping[str, Any]]

    def add_to(self, commands: Any) -> None:
        """Add its parser."""
        parser = new_parser(commands, self.name, self.summary, self.example)
        add_options(parser, self.options)
        parser.set_defaults(command=self)


def new_parser(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand's parser, whose help ends with an example.

    Args:
        commands: what `add_subparsers` gave, which has no public type.
        name: as in `Command`.
        summary: likewise.
        example: likewise.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
