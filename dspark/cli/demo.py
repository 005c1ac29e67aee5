"""`dspark demo`: the bundled model on maths, code and chat, plain beside speculative."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
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
from dspark.data.formats import BOXED
from dspark.errors import CheckpointError
from dspark.request import Request, SamplingParams

if TYPE_CHECKING:
    from dspark.cli.decoding import Decoded, EngineOptions
    from dspark.engine.model import Model

EXAMPLE = """\
  dspark demo
  dspark demo --only math --json"""
PROMPTS = {
    "math": "Anna bakes 24 muffins every morning. She sells half of them at the market for $3 "
    "each and gives the rest to her neighbors. How much money does she make in a week?" + BOXED,
    "code": "What does the command `tar` do? Show me common usages.",
    "chat": "Hi, I want to book a table for two at an Italian restaurant in San Jose.",
}
REPEATS = 3
NOTE = (
    "The model is tiny: it shows the method, not knowledge, and a plain step of it is mostly "
    "dispatch overhead; the figure that the README leads with is measured at Qwen3-0.6B shapes."
)


def add_parser(commands: Commands) -> None:
    """Add `demo`."""
    parser = new_parser(
        commands, "demo", "decode with the bundled model, plainly and with DSpark", EXAMPLE
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=96, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the best"
    )
    parser.add_argument("--only", choices=tuple(PROMPTS), help="one prompt instead of all three")
    add_mode_options(parser)
    add_no_profile(parser)
    add_common_options(parser)
    # One thread and float32: the fastest identical mode measured for a model this small.
    parser.set_defaults(
        run=run,
        target="bundled",
        revision=None,
        offline=True,
        trust_remote_code=False,
        threads=1,
        schedule=None,
        verifier="block",
        block_size=None,
    )


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object.

    Raises:
        CheckpointError: the bundled model is missing, or has no drafter.
    """
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed or 0,
    )
    model = load_model(options, None, screen)
    if model.drafter is None:
        raise CheckpointError("The bundled model has no drafter attached; reinstall dspark.")
    from dspark.cli.comparison import comparable, compare_report
    from dspark.cli.decoding import EngineOptions

    engine_options = EngineOptions(batch_size=1)
    measure_costs(options, model, [Request((0,), params)], 1, screen)
    must_agree = comparable(params.temperature, engine_options.verifier)
    runs: list[Decoded] = []
    plain_runs: list[Decoded] = []
    domains: dict[str, dict[str, Any]] = {}
    for name in [options.only] if options.only else PROMPTS:
        plain, ours = _decode_both(model, engine_options, name, params, screen)
        _show(name, plain, ours, screen)
        domains[name] = compare_report([ours], [plain], comparable=must_agree)
        screen.out.print(_verdict(domains[name]["identical"]))
        plain_runs.append(plain)
        runs.append(ours)
    report = compare_report(runs, plain_runs, comparable=must_agree)
    screen.out.print(_table(domains if options.only else domains | {"all": report}))
    screen.out.print(NOTE, style="dim")
    return report | {"domains": domains}


def _decode_both(
    model: Model, options: EngineOptions, name: str, params: SamplingParams, screen: Screen
) -> tuple[Decoded, Decoded]:
    """Decode plainly and with DSpark in turn, several times; the run of median time of each."""
    from dspark.cli.decoding import decode, warm_up

    prompt = PROMPTS[name]
    request = Request(model.encode([{"role": "user", "content": prompt}]), params)
    engines = (options.plain_engine(model, [request]), options.engine(model, [request]))
    with screen.log.status(f"Decoding {name}, plainly and with DSpark in turn ..."):
        for engine in engines:
            warm_up(engine, request)
        pairs = [
            tuple(decode(engine, [request], [prompt], live=True) for engine in engines)
            for _ in range(REPEATS)
        ]
    plain, ours = (_median([pair[i] for pair in pairs]) for i in range(2))
    return plain, ours


def _median(runs: list[Decoded]) -> Decoded:
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def _show(name: str, plain: Decoded, ours: Decoded, screen: Screen) -> None:
    from dspark.cli.replay import Side, replay

    screen.out.rule(name, align="left")
    screen.out.print(Text(PROMPTS[name], "italic"))
    replay([Side("plain", plain), Side("DSpark", ours)], screen.out)


def _verdict(identical: bool | None) -> Text:
    if identical is None:
        return Text("Sampled: the same law, but other draws, so the texts differ.\n")
    if identical:
        return Text("Identical, token by token.\n", "green")
    return Text("The two outputs differ; please report this.\n", "red")


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
