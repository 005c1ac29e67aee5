"""`dspark demo`: a chat model on maths, code and chat, plain beside speculative."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    add_mode_options,
    load_model,
    new_parser,
)
from dspark.cli.options import add_no_profile
from dspark.cli.starting import measure_costs
from dspark.data.corpus import BOXED
from dspark.errors import CheckpointError, CompatibilityError
from dspark.request import Request, SamplingParams

if TYPE_CHECKING:
    from dspark.cli.decoding import Decoded, EngineOptions
    from dspark.engine.model import Model

EXAMPLE = """\
  dspark demo
  dspark demo --model bundled --only math --json"""
DOMAINS = ("math", "code", "chat")


@dataclass(frozen=True)
class Show:
    """How one of the models is shown.

    Attributes:
        prompts: one of each domain.
        max_new_tokens: of each answer, unless the user says otherwise.
        threads: of the CPU; None for all.
        repeats: runs of each prompt, of which the one of median time counts. A single one is shown
            while it is decoded, several are replayed afterwards.
        note: what to know about the figures.
    """

    prompts: Mapping[str, str]
    max_new_tokens: int
    threads: int | None
    repeats: int
    note: str


MUFFINS = (
    "Anna bakes 24 muffins every morning. She sells half of them at the market for $3 each and "
    "gives the rest to her neighbors. How much money does she make in a week?"
)
SHOWS = {
    "smollm2": Show(
        {
            "math": MUFFINS,
            "code": "Write a Python function that returns the n-th Fibonacci number.",
            "chat": "What should I see on a weekend in Rome?",
        },
        max_new_tokens=128,
        threads=None,
        repeats=1,
        note="SmolLM2-135M-Instruct; each text was decoded once, in turn, on this machine.",
    ),
    # One thread and float32: the fastest identical mode measured for a model this small.
    "bundled": Show(
        {
            "math": MUFFINS + BOXED,
            "code": "What does the command `tar` do? Show me common usages.",
            "chat": "Hi, I want to book a table for two at an Italian restaurant in San Jose.",
        },
        max_new_tokens=96,
        threads=1,
        repeats=3,
        note="The model is tiny: it shows the method, not knowledge, and a plain step of it is "
        "mostly dispatch overhead; docs/bundled_figures.md has figures at Qwen3-0.6B shapes.",
    ),
}


def add_parser(commands: Commands) -> None:
    """Add `demo`."""
    parser = new_parser(
        commands, "demo", "decode with a chat model, plainly and with DSpark", EXAMPLE
    )
    parser.add_argument(
        "--model",
        choices=tuple(SHOWS),
        help="smollm2 (SmolLM2-135M-Instruct, by default), or the tiny bundled model, which takes "
        "its place where it cannot be had",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="default: 128 with smollm2, 96 with bundled",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the best"
    )
    parser.add_argument("--only", choices=DOMAINS, help="one prompt instead of all three")
    parser.add_argument("--offline", action="store_true", help="use what is on this machine only")
    add_mode_options(parser)
    add_no_profile(parser)
    add_common_options(parser)
    parser.set_defaults(
        run=run,
        revision=None,
        trust_remote_code=False,
        schedule=None,
        verifier="block",
        block_size=None,
    )


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object.

    Raises:
        CheckpointError: the model is missing, or has no drafter.
    """
    model = _load(options, screen)
    shown = SHOWS[options.target]
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens or shown.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed or 0,
    )
    from dspark.cli.comparison import comparable, compare_report
    from dspark.cli.decoding import EngineOptions

    engine_options = EngineOptions(batch_size=1)
    measure_costs(options, model, [Request((0,), params)], 1, screen)
    must_agree = comparable(params.temperature, engine_options.verifier)
    runs: list[Decoded] = []
    plain_runs: list[Decoded] = []
    domains: dict[str, dict[str, Any]] = {}
    for name in [options.only] if options.only else DOMAINS:
        prompt = shown.prompts[name]
        request = Request(model.encode([{"role": "user", "content": prompt}]), params)
        screen.out.rule(name, align="left")
        screen.out.print(Text(prompt, "italic"))
        both = _watch if shown.repeats == 1 else _decode_and_replay
        plain, ours = both(model, engine_options, request, prompt, shown.repeats, screen)
        domains[name] = compare_report([ours], [plain], comparable=must_agree)
        screen.out.print(_verdict(model, request, plain, ours, domains[name]["identical"]))
        plain_runs.append(plain)
        runs.append(ours)
    report = compare_report(runs, plain_runs, comparable=must_agree)
    screen.out.print(_table(domains if options.only else domains | {"all": report}))
    screen.out.print(shown.note, style="dim")
    return report | {"domains": domains, "model": options.target}


def _load(options: argparse.Namespace, screen: Screen) -> Model:
    """The model asked for, or the bundled one where nobody asked and the real one is not here.

    Sets the target and the threads of `options`.
    """
    threads = options.threads
    for name in (options.model,) if options.model else tuple(SHOWS):
        options.target = name
        options.threads = SHOWS[name].threads if threads is None else threads
        try:
            model = load_model(options, None, screen)
            if model.drafter is None:
                raise CheckpointError(f"{name} has no drafter attached; reinstall dspark.")
            return model
        except (CheckpointError, CompatibilityError) as error:
            if name in (options.model, "bundled"):
                raise
            sentence = f"{error} The tiny bundled model takes its place."
            screen.log.print(Text(sentence, "yellow"), soft_wrap=True)
    raise AssertionError("the bundled model is loaded or refused")


def _watch(
    model: Model,
    options: EngineOptions,
    request: Request,
    prompt: str,
    repeats: int,  # noqa: ARG001
    screen: Screen,
) -> tuple[Decoded, Decoded]:
    """Decode plainly, then with DSpark, each shown as it goes."""
    from dspark.cli.decoding import decode, warm_up
    from dspark.cli.replay import Watched

    engines = (options.plain_engine(model, [request]), options.engine(model, [request]))
    with screen.log.status("Warming up ..."):
        for engine in engines:
            warm_up(engine, request)
    with Watched(("plain", "DSpark"), screen.out) as watched:
        plain, ours = (
            decode(engine, [request], [prompt], live=True, show=watched.show(side))
            for side, engine in enumerate(engines)
        )
    return plain, ours


def _decode_and_replay(
    model: Model,
    options: EngineOptions,
    request: Request,
    prompt: str,
    repeats: int,
    screen: Screen,
) -> tuple[Decoded, Decoded]:
    """Decode plainly and with DSpark in turn, several times; the run of median time of each."""
    from dspark.cli.decoding import decode, warm_up
    from dspark.cli.replay import Side, replay

    engines = (options.plain_engine(model, [request]), options.engine(model, [request]))
    with screen.log.status("Decoding plainly and with DSpark in turn ..."):
        for engine in engines:
            warm_up(engine, request)
        pairs = [
            tuple(decode(engine, [request], [prompt], live=True) for engine in engines)
            for _ in range(repeats)
        ]
    plain, ours = (_median([pair[i] for pair in pairs]) for i in range(2))
    replay([Side("plain", plain), Side("DSpark", ours)], screen.out)
    return plain, ours


def _median(runs: list[Decoded]) -> Decoded:
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def _verdict(
    model: Model, request: Request, plain: Decoded, ours: Decoded, identical: bool | None
) -> Text:
    if identical is None:
        return Text("Sampled: the same law, but other draws, so the texts differ.\n")
    if identical:
        return Text("Identical, token by token.\n", "green")
    from dspark.cli.comparison import differences

    target = model.target
    (difference,) = differences(target, [request], ours.outputs, plain.outputs)
    sentence = difference.sentence(target.dtype, batch_invariant=target.batch_invariant)
    return Text(sentence + "\n", "red")


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Speed of both, and how much of the drafts was kept, a row per domain."""
    table = Table(caption="Kept: percent of drafts kept at each position, given all before it.")
    for heading in ("", "plain\ntokens/s", "DSpark\ntokens/s", "speed-up", "accepted\nlength"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("kept", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['plain_tokens_per_s']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['speedup']:.2f} x",
            f"{row['accepted_length']:.2f}",
            _percent(row["conditional_acceptance"]),
        )
    return table


def _percent(shares: Sequence[float | None]) -> str:
    return " ".join("-" if share is None else f"{100 * share:.0f}" for share in shares)
