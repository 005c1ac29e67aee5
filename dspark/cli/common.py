"""What the subcommands share: options, consoles, and loading a model."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.text import Text

from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.engine.model import Model

TARGET_HELP = "a directory, a .gguf file, a hub id, or a name that ships: smollm2, bundled"
# What a kind of packed weights means, said at the start.
_SAYS = {
    "fp16": "the checkpoint's values in 16 bits, computed in 32",
    "onednn": "laid out for oneDNN",
    "int8": "quantised to 8 bits: outputs are those of the quantised model",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Commands(Protocol):
    """What a subcommand adds its parser to (argparse gives its own class no public name)."""

    def add_parser(self, name: str, **kwargs: Any) -> argparse.ArgumentParser:
        """Add a subcommand."""
        ...


class OptionGroup(Protocol):
    """What an option is added to: a parser, or a group of its options."""

    def add_argument(
        self,
        *names: str,
        action: str | type[argparse.Action],
        default: Any = ...,
        help: str,
    ) -> argparse.Action:
        """Add an option."""
        ...


@dataclass(frozen=True)
class Screen:
    """Where a command writes.

    Attributes:
        out: the answer: standard output, or standard error under `--json`.
        log: progress and remarks: standard error.
    """

    out: Console = field(default_factory=lambda: Console(highlight=False))
    log: Console = field(default_factory=lambda: Console(highlight=False, stderr=True))

    def write(self, text: str, style: str = "") -> None:
        """Write a model's text, no line end added: coloured on a terminal, else just as it is."""
        if self.out.is_terminal:
            self.out.print(Text(printable(text), style), end="", soft_wrap=True)
        else:
            self.out.file.write(text)
            self.out.file.flush()


REMARKING = ("dspark.sources", "dspark.engine.loading", "dspark.data.prompts.sources")
"""The loggers whose remarks a user of the command should see: what is fetched, and from where."""


@contextmanager
def showing_remarks(screen: Screen) -> Iterator[None]:
    """Print what `REMARKING` say, each remark once, while a command runs."""
    said: set[str] = set()

    class Remarks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in said:
                said.add(text)
                screen.log.print(Text(text, "dim"), soft_wrap=True)

    remarks, loggers = Remarks(), [logging.getLogger(name) for name in REMARKING]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(remarks)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(remarks)
            logger.setLevel(level)


def new_parser(
    commands: Commands, name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    """A subcommand's parser, whose help ends with an example."""
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes."""
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="dtype of the weights; auto is the checkpoint's own, on a CPU float32 unless bfloat16 "
        "is measured to be faster",
    )
    group.add_argument(
        "--seed", type=seed_number, metavar="N", help="names all randomness (default: 0)"
    )
    group.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads")
    group.add_argument(
        "--json",
        action="store_true",
        help="make the last line of standard output a JSON object; all else goes to standard error",
    )


def add_pair_options(
    parser: argparse.ArgumentParser, *, lookup: bool = True, plain: bool = False
) -> None:
    """Add what names a target and its drafter.

    Args:
        parser: of the command.
        lookup: prompt lookup may be the drafter.
        plain: there need not be any drafter.
    """
    others = ", `ngram` (prompt lookup) or `none`" if plain else ", or `ngram`" if lookup else ""
    missing = ", or none where there is none" if plain else ""
    parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    parser.add_argument(
        "--draft",
        metavar="D",
        help=f"a drafter's directory or hub id{others}; by default the drafter attached to "
        f"TARGET{missing}",
    )
    add_draft_top_k(parser)


def add_draft_top_k(parser: argparse.ArgumentParser) -> None:
    """Add `--draft-top-k`."""
    parser.add_argument(
        "--draft-top-k",
        type=int,
        metavar="N",
        help="draft from the N likeliest tokens of each slot before the Markov head's bias, which "
        "is then computed for these only (default: from all)",
    )


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse options below 1; those that are not given pass.

    Raises:
        UsageError: names the first one.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is {value}, but must be at least 1.")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add what commands take that load a model from a directory or the hub."""
    group = parser.add_argument_group("loading")
    group.add_argument("--revision", help="branch, tag or commit of TARGET on the hub")
    group.add_argument("--offline", action="store_true", help="use what is on this machine only")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that TARGET brings along"
    )
    add_mode_options(group)


def add_mode_options(group: OptionGroup) -> None:
    """Add the switches for how a target runs."""
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="make results independent, to the last bit, of what else is in a batch: greedy "
        "output is then plain decoding's in bfloat16 too, at some cost in speed",
    )
    group.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="record decoding steps as CUDA graphs, or never do (default: where it is possible)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="run the decoder layers through torch.compile: the first steps take seconds to "
        "minutes, the later ones may be faster",
    )
    group.add_argument(
        "--weights",
        action="store",
        default="auto",
        help="auto, plain or packed: lay weights out once for the kernels of a CPU (default: "
        "where that is measured to be faster)",
    )
    group.add_argument(
        "--quantize",
        action="store",
        default=None,
        help="int8: run in 8-bit integers on a CPU; outputs are then those of the quantised model",
    )


def seed_number(text: str) -> int:
    """Parse a seed."""
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2^63 - 1")
    return int(text)


def thread_count(text: str) -> int:
    """Parse a number of threads."""
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 4096")
    return int(text)


def use_threads(options: argparse.Namespace) -> None:
    """Apply `--threads`."""
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


def load_model(options: argparse.Namespace, draft: str | None, screen: Screen) -> Model:
    """Load the target that the options name, with a drafter.

    Raises:
        CheckpointError, CompatibilityError, UsageError: as `dspark.load`.
    """
    draft_top_k: int | None = getattr(options, "draft_top_k", None)
    if draft_top_k is not None:
        check_positive(options, "draft_top_k")
    with screen.log.status(f"Loading {options.target} ..."):
        from dspark.engine.loading import load

        use_threads(options)
        model = load(
            options.target,
            draft,
            device=options.device,
            dtype=options.dtype,
            revision=options.revision,
            offline=options.offline,
            trust_remote_code=options.trust_remote_code,
            batch_invariant=options.batch_invariant,
            cuda_graphs=options.cuda_graphs,
            compile=options.compile,
            weights=options.weights,
            quantize=options.quantize,
            draft_top_k=draft_top_k,
        )
    dtype = str(model.target.parts().embedding_VH.dtype).removeprefix("torch.")
    if (options.dtype, model.target.device.type, dtype) == ("auto", "cpu", "bfloat16"):
        screen.log.print("Dtype: bfloat16, which is measured to be faster here than float32.")
    if model.target.weights != "plain":
        screen.log.print(f"Weights: {model.target.weights} ({_SAYS[model.target.weights_kind]}).")
    return model


def printable(text: str) -> str:
    """Drop control characters, with which a model's text could take over the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot hold, by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
