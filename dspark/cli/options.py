"""Command-line options: each declared once, as a field of a dataclass, and shared as groups.

A command's options are a frozen dataclass. It inherits the groups that it takes whole (`Common`,
`Loading`, `Pair`, ...) and takes single options of other groups by `pick`, with a default or a help
text of its own. A field with a plain default is no option of that command. A class's `TITLE` heads
its options in `--help`.

argparse does the parsing: it is in the standard library, starts in milliseconds, and its help is
what users know. What it lacks, types and sharing, is the table below; click, typer and tyro bring
both, but each would change flags, messages or exit codes that scripts rely on.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from dspark.engine.speculation.schedule import ScheduleName
from dspark.errors import UsageError
from dspark.request import Verifier

TARGET_HELP = "a directory, a .gguf file, a hub id, or a name that ships: smollm2, bundled"
PROMPTS_HELP = "JSON lines with `turns`, `messages` or `prompt`"
LARGEST_SEED, MOST_THREADS = (1 << 63) - 1, 4096

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
    order = [c for c in options.__mro__ if c not in _LAST] + list(_LAST)
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


def comma_list(read: Callable[[str], T], what: str) -> Callable[[str], tuple[T, ...]]:
    """Parses a list between commas, each value once; `what` describes it in the refusal."""

    def parse(text: str) -> tuple[T, ...]:
        try:
            return tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what}") from error

    return parse


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


# The groups


@dataclass(frozen=True)
class Json:
    """What every command takes; `words` is the command line itself."""

    TITLE: ClassVar = "common options"

    words: tuple[str, ...] = ()
    json: bool = option(
        False,
        "make the last line of standard output a JSON object; all else goes to standard error",
    )


@dataclass(frozen=True)
class Common(Json):
    """What every command that computes takes."""

    TITLE: ClassVar = "common options"

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps (default: {default})")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "dtype of the weights; auto is the checkpoint's own, on a CPU float32 unless bfloat16 is "
        "measured to be faster",
    )
    seed: int | None = option(
        None,
        "seed of all random numbers (default: 0)",
        read=integer(0, LARGEST_SEED, "2^63 - 1"),
        metavar="N",
    )
    threads: int | None = option(
        None, "CPU threads", read=integer(1, MOST_THREADS, str(MOST_THREADS)), metavar="N"
    )


@dataclass(frozen=True)
class Loading(Common):
    """How a target is loaded, and how it runs."""

    TITLE: ClassVar = "loading"

    revision: str | None = option(None, "branch, tag or commit of TARGET on the hub")
    offline: bool = option(False, "use only what is on this machine")
    trust_remote_code: bool = option(False, "run code that TARGET brings along")
    batch_invariant: bool = option(
        False,
        "make results independent, to the last bit, of what else is in a batch: greedy output is "
        "then plain decoding's in bfloat16 too, at some cost in speed",
    )
    cuda_graphs: Any = option(
        "auto",
        "record decoding steps as CUDA graphs, or never do (default: where it is possible)",
        action=argparse.BooleanOptionalAction,
    )
    compile: bool = option(
        False,
        "run the decoder layers through torch.compile: the first steps take seconds to minutes, "
        "the later ones may be faster",
    )
    weights: Any = option(
        "auto",
        "auto, plain or packed: lay weights out once for the kernels of a CPU (default: where that "
        "is measured to be faster)",
        action="store",
    )
    quantize: Any = option(
        None,
        "int8: run in 8-bit integers on a CPU; outputs are then those of the quantised model",
        action="store",
    )


@dataclass(frozen=True)
class Pair(Loading):
    """A target and its drafter."""

    TITLE: ClassVar = ""

    target: str = option("", TARGET_HELP, positional=True, metavar="TARGET")
    draft: str | None = option(
        None,
        "a drafter's directory or hub id, or `ngram`; by default the drafter attached to TARGET",
        metavar="D",
    )
    draft_top_k: int | None = option(
        None,
        "draft from the N most likely tokens of each slot before the Markov head's bias, which is "
        "then computed for these only (default: from all)",
        metavar="N",
        least=1,
    )


@dataclass(frozen=True)
class PairOrPlain(Pair):
    """A target, and a drafter if there is one."""

    TITLE: ClassVar = ""

    draft: str | None = pick(
        Pair,
        "draft",
        help="a drafter's directory or hub id, `ngram` (prompt lookup) or `none`; by default the "
        "drafter attached to TARGET, or none where there is none",
    )


@dataclass(frozen=True)
class Prompts:
    """Prompts of `generate` and `calibrate`."""

    TITLE: ClassVar = "prompts (standard input, as one prompt, if none is named)"

    prompt: tuple[str, ...] = option(
        (), "a prompt; repeatable", metavar="TEXT", exclusive="prompts"
    )
    prompts: str | None = option(
        None,
        "JSON lines with `turns` (the first one is asked), `messages` or `prompt`",
        metavar="FILE",
        exclusive="prompts",
    )
    raw: bool = option(False, "take texts as they are, without the chat template")


@dataclass(frozen=True)
class Sampling:
    """What a request may ask for."""

    TITLE: ClassVar = "sampling"

    max_new_tokens: int = option(256, "tokens of each answer (default: {default})", metavar="N")
    temperature: float = option(0.0, "0 (default) takes the most likely token", metavar="T")
    top_p: float = option(1.0, "1 (default) is off", metavar="P")
    top_k: int = option(0, "0 (default) is off", metavar="K")
    min_p: float = option(0.0, "0 (default) is off", metavar="M")
    repetition_penalty: float = option(1.0, "1 (default) is off", metavar="X")
    presence_penalty: float = option(0.0, "0 (default) is off", metavar="X")
    frequency_penalty: float = option(0.0, "0 (default) is off", metavar="X")


@dataclass(frozen=True)
class Speculation:
    """How a drafter is used."""

    TITLE: ClassVar = "speculation"

    block_size: int | None = option(None, "drafts per round (default: the drafter's)", metavar="K")
    tree_nodes: int | None = option(
        None,
        "draft trees of so many nodes at most in rounds where they are faster than chains, with "
        "--schedule fixed in all (default: chains)",
        metavar="N",
        least=1,
    )
    verifier: Verifier = option("block", "default: {default}")
    schedule: ScheduleName | None = option(
        None,
        "which drafts are verified (default: auto, which is lagged where the drafter is calibrated "
        "and costs are known, else every draft while that is faster than none)",
    )
    threshold: float | None = option(None, "least confidence for --schedule threshold", metavar="C")
    cost: str | None = option(
        None, "a cost table in place of the one in the user's cache", metavar="FILE"
    )
    no_profile: bool = option(
        False, "do not measure at start what steps cost on this machine, where that is not known"
    )


@dataclass(frozen=True)
class Batch:
    """How many requests run at once."""

    TITLE: ClassVar = "speculation"

    batch_size: int = option(8, "requests at once (default: {default})", metavar="R", least=1)


class _ListRecipes(argparse.Action):
    """Like --help: prints, stops, and needs no RECIPE beside it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str, default: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help, default=default)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from dspark.training.recipe import load_recipe, recipe_names

        for name in recipe_names():
            recipe = load_recipe(name)
            if recipe.kind == "drafter":
                what = f"{recipe.algorithm} for {recipe.target}"
            elif recipe.initial is None:
                what = "a target from scratch"
            else:
                what = f"a target that goes on from {recipe.initial}"
            print(f"{name:<24}{what}")
        parser.exit()


@dataclass(frozen=True)
class Recipe(Common):
    """A training recipe, and keys of it that are changed."""

    TITLE: ClassVar = ""

    recipe: str = option(
        "", "a YAML file, or the name of a bundled recipe", positional=True, metavar="RECIPE"
    )
    listing: bool = option(
        False, "print the names of the bundled recipes and stop", flag="--list", action=_ListRecipes
    )
    set_keys: tuple[str, ...] = option(
        (),
        "change a key of the recipe, as in run.steps=100; repeatable",
        flag="--set",
        metavar="KEY=VALUE",
    )

    @property
    def overrides(self) -> list[str]:
        """Changed keys; `--seed` and `--dtype` stand for keys too, and leave them if not given."""
        found = list(self.set_keys)
        if self.seed is not None:
            found.append(f"run.seed={self.seed}")
        if self.dtype != "auto":
            found.append(f"run.dtype={self.dtype}")
        return found


_LAST = (Loading, Common, Json)


# Commands


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
    options: type[Json]
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
