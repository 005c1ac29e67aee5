"""`dspark profile`: measures what steps cost on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.groups import Pair, Speculation, Traffic
from dspark.cli.inputs import load_pair
from dspark.cli.options import Command, option, pick
from dspark.cli.screen import Screen, table
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.engine.profile import Progress
    from dspark.scheduling.cost_table import CostTable

EXAMPLE = """\
  dspark profile bundled
  dspark profile bundled --whole-steps --max-requests 16 --out costs.json
  dspark profile bundled --whole-steps --prompt-tokens 200:.5 --answer-tokens 300 --out costs.json
  dspark profile ./target --draft ./drafter --max-requests 32 --out costs.json"""

_TOLD, _HOW = "with --whole-steps, lengths", "as in dspark plan (default: some of 24 to 200 tokens)"
_DRAWN = 64  # lengths of requests that are measured in turn


@dataclass(frozen=True)
class Options(Pair):
    """Options of `profile`."""

    max_requests: int = option(8, "requests at once (default: {default})", metavar="R", least=1)
    block_size: int | None = pick(Speculation, "block_size")
    tree_nodes: int | None = pick(
        Speculation,
        "tree_nodes",
        help="measure rounds of draft trees with so many nodes, for dspark plan --tree-cost; needs "
        "--out",
    )
    repeats: int = option(5, "rounds per point (default: {default})", metavar="N", least=1)
    whole_steps: bool = option(
        False, "measure prompts and whole steps too, for dspark plan (a few seconds more)"
    )
    prompt_tokens: Any = pick(Traffic, "prompt_tokens", None, help=f"{_TOLD} of prompts {_HOW}")
    answer_tokens: Any = pick(Traffic, "answer_tokens", None, help=f"{_TOLD} of answers {_HOW}")
    trace: Path | None = pick(Traffic, "trace", help=f"{_TOLD} of both: a trace, {_HOW}")
    out: Path | None = option(
        None,
        "file for the table (default: in the user's cache, where other commands look)",
        metavar="FILE",
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    if options.tree_nodes is not None and options.out is None:
        raise UsageError("--tree-nodes needs --out: the user's cache keeps tables of chains alone.")
    if options.whole_steps and options.block_size is not None:
        raise UsageError("--whole-steps measures the drafter's own blocks; leave --block-size out.")
    told = options.prompt_tokens or options.answer_tokens
    if (told or options.trace is not None) and not options.whole_steps:
        raise UsageError("--prompt-tokens, --answer-tokens and --trace need --whole-steps.")
    if told and options.trace is not None:
        raise UsageError("A trace has its own lengths; leave --prompt-tokens and the like out.")
    lengths = _traffic(options)
    model = load_pair(options, screen)
    with screen.progress("rounds") as tell:
        if options.tree_nodes is None:
            costs = model.profile(
                max_requests=options.max_requests,
                block_size=options.block_size,
                repeats=options.repeats,
                progress=tell,
            )
        else:
            costs = _tree_costs(options, model, tell)
    if options.whole_steps:
        assert model.drafter is not None, "profile() refuses a model without one"
        from dspark.engine.profile_steps import LENGTHS, measure_steps

        with screen.log.status("Measuring prompts and whole steps ..."):
            nodes = options.tree_nodes
            costs = measure_steps(
                model.target, model.drafter, costs, tree_nodes=nodes, lengths=lengths or LENGTHS
            )
    path = costs.save(options.out)
    shown = table("requests", "tokens", "verify ms", "draft ms")
    for point in costs.points:
        times = (f"{point.verify_ms:.2f}", f"{point.draft_ms:.2f}")
        shown.add_row(str(point.requests), str(point.tokens), *times)
    screen.out.print(shown)
    for sentence in costs.warnings():
        screen.warn(sentence)
    screen.say(f"Written to {path}.")
    return {
        "points": [asdict(point) for point in costs.points],
        "prompts": [asdict(prompt) for prompt in costs.prompts],
        "extras": [asdict(extra) for extra in costs.extras],
        "machine": asdict(costs.machine),
        "warnings": costs.warnings(),
        "out": str(path),
    }


def _traffic(options: Options) -> list[tuple[int, int]] | None:
    """(prompt, answer) tokens of requests, where the options say anything of them."""
    from dspark.simulation.arrivals import Lengths, drawn_arrivals, read_trace

    if options.trace is not None:
        found = read_trace(options.trace)
    elif options.prompt_tokens or options.answer_tokens:
        usual = (Traffic.prompt_tokens, Traffic.answer_tokens)
        given = (options.prompt_tokens, options.answer_tokens)
        prompts, answers = (Lengths(*(a or b)) for a, b in zip(given, usual, strict=True))
        found = drawn_arrivals(_DRAWN, prompts, answers)
    else:
        return None
    return [*zip(found.prompt_N.tolist(), found.answer_N.tolist(), strict=True)]


def _tree_costs(options: Options, model: Model, tell: Progress) -> CostTable:
    """The table of rounds that draft trees."""
    from dspark.engine.profile import measure_costs
    from dspark.engine.speculation.trees.draft import check_trees

    nodes, drafter = options.tree_nodes, model.drafter
    assert nodes is not None
    if drafter is None:
        raise UsageError("--tree-nodes needs a drafter; give one with --draft.")
    check_trees(nodes, drafter, model.target, "fixed")
    return measure_costs(
        model.target,
        drafter,
        replace(model.machine, drafter=f"{model.machine.drafter} trees of {nodes}"),
        max_requests=options.max_requests,
        block_size=options.block_size,
        tree_nodes=nodes,
        repeats=options.repeats,
        progress=tell,
    )


COMMAND = Command(
    "profile",
    "measure what steps cost on this machine, for the schedules that weigh it",
    EXAMPLE,
    Options,
    run,
)
