"""Groups of command-line options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from dspark.cli.options import integer, number, option, pick, positive
from dspark.engine.speculation.schedule import ScheduleName
from dspark.request import Verifier

TARGET_HELP = "a directory, a .gguf file, a hub id, or a name that ships: smollm2, bundled"
PROMPTS_HELP = "JSON lines with `turns`, `messages` or `prompt`"
LARGEST_SEED, MOST_THREADS = (1 << 63) - 1, 4096


@dataclass(frozen=True)
class Json:
    """What every command takes; `words` is the command line itself."""

    TITLE: ClassVar = "common options"
    LAST: ClassVar = 3

    words: tuple[str, ...] = ()
    json: bool = option(
        False,
        "make the last line of standard output a JSON object; all else goes to standard error",
    )


@dataclass(frozen=True)
class Common(Json):
    """What every command that computes takes."""

    TITLE: ClassVar = "common options"
    LAST: ClassVar = 2

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
    LAST: ClassVar = 1

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


def _lengths(text: str) -> tuple[float, float]:
    mean, _, spread = text.partition(":")
    return positive(mean), number(spread) if spread else 1.0


@dataclass(frozen=True)
class Traffic:
    """How long requests are: (mean, standard deviation over mean) of tokens, or a trace."""

    TITLE: ClassVar = "requests"

    trace: Path | None = option(
        None,
        "JSON lines or CSV with arrival_s, prompt_tokens and answer_tokens; the columns of the "
        "Mooncake and Azure traces are known too",
        metavar="FILE",
    )
    prompt_tokens: Any = option(
        (256.0, 1.0),
        "mean length of prompts, and standard deviation over mean (default: 256:1)",
        read=_lengths,
        metavar="M[:S]",
    )
    answer_tokens: Any = option(
        (256.0, 1.0), "the same of answers (default: 256:1)", read=_lengths, metavar="M[:S]"
    )


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
