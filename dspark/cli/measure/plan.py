"""`dspark plan`: capacity planning by simulation on measured tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dspark.cli.groups import Json, Traffic
from dspark.cli.options import Command, comma_list, integer, option, positive
from dspark.cli.screen import Screen, cell, table
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.scheduling.cost_table import CostTable
    from dspark.simulation.planning import Plan, Study
    from dspark.simulation.server import Way

EXAMPLE = """\
  dspark profile ./target --draft ./drafter --max-requests 32 --whole-steps --out costs.json
  dspark eval ./target --draft ./drafter --tasks mt-bench --data eval/ --out evaluation
  dspark plan --cost costs.json --acceptance evaluation --rate 1,2,4,8 --ttft-ms 500 --out plan
  dspark plan --cost costs.json --acceptance .8,.66,.55,.46 --trace day.jsonl --replicas 4"""
NAMES = ("off", "fixed", "fixed-N", "mtp1", "prefix", "lagged", "lookahead", "auto", "trees")
_NO_RANKS = (
    "The acceptance profile says nothing of drafts below the first rank, so trees cannot be "
    "planned; evaluate with dspark eval --tree-nodes N."
)
_MOST = 1 << 20


def _schedule(name: str) -> str:
    word, _, count = name.partition("-")
    if name not in NAMES[:2] + NAMES[3:] and not (word == "fixed" and count.isdecimal()):
        raise ValueError(name)
    return name


@dataclass(frozen=True)
class _Requests(Traffic):
    ABOUT: ClassVar = "Random arrivals, unless a trace is given."

    rate: tuple[float, ...] = option(
        (),
        "requests per second (default: a fifth to the whole of what can be served; of a trace its "
        "own)",
        read=comma_list(positive, "numbers like 1,2,4"),
        metavar="R,R",
    )
    requests: int = option(1000, "how many (default: {default})", metavar="N", least=2)
    burstiness: float = option(
        1.0,
        "shape of the gamma law between arrivals: 1 is a Poisson process, less comes in bursts "
        "(default: {default})",
        read=positive,
        metavar="B",
    )


@dataclass(frozen=True)
class _Fleet:
    TITLE: ClassVar = "servers"

    replicas: int = option(1, "servers, all alike (default: {default})", metavar="N", least=1)
    router: Literal["least", "round-robin", "random"] = option(
        "least", "who gets a request: the one with the fewest in flight (default), in turn, anyone"
    )
    batch_size: int | None = option(
        None, "requests at once of a server (default: as many as the table covers)",
        metavar="R", least=1,
    )  # fmt: skip
    step_tokens: int = option(
        512, "rows of a step, prompts included (default: {default})", metavar="N", least=1
    )
    cache_tokens: int | None = option(
        None, "rows of a server's cache (default: as many as are needed)", metavar="N", least=1
    )
    price: float | None = option(
        None, "of a server's hour, for the cost of a million tokens",
        read=positive, metavar="P",
    )  # fmt: skip


@dataclass(frozen=True)
class _Level:
    TITLE: ClassVar = "service level"

    ttft_ms: float = option(
        1000.0, "time to first token at most (default: {default})",
        read=positive, metavar="MS",
    )  # fmt: skip
    user_tokens_per_s: float | None = option(
        None, "speed of a user at least (default: any)",
        read=positive, metavar="S",
    )  # fmt: skip
    percentile: float = option(
        95.0, "percent of requests that must get both (default: {default})",
        read=positive, metavar="P",
    )  # fmt: skip


@dataclass(frozen=True)
class Options(_Requests, _Fleet, _Level, Json):
    """Options of `plan`."""

    cost: str = option(
        "", "a cost table of dspark profile --out, or a target whose table this machine has "
        "measured", metavar="F", required=True,
    )  # fmt: skip
    draft: str | None = option(
        None, "the drafter, where --cost names a target (default: its own)", metavar="D"
    )
    acceptance: str = option(
        "", "a folder or file of records of dspark eval, a JSON file with `survival`, or survivals "
        "per position like .8,.66,.55", metavar="F", required=True,
    )  # fmt: skip
    mtp_cost: Path | None = option(
        None, "the cost table with an MTP drafter, for mtp1", metavar="F"
    )
    mtp_acceptance: str | None = option(
        None, "the acceptance of its one draft, as --acceptance", metavar="F"
    )
    tree_cost: Path | None = option(
        None,
        "the cost table of dspark profile --tree-nodes, for trees; --acceptance is then of dspark "
        "eval --tree-nodes",
        metavar="F",
    )
    schedule: Any = option(
        None,
        f"of {', '.join(NAMES)}, where fixed-N drafts N tokens, and trees is lagged with trees or "
        "chains, whichever are faster (default: off, fixed, mtp1 and trees where they are known, "
        "lagged)",
        read=comma_list(_schedule, f"names among {', '.join(NAMES)}"),
        metavar="S,S",
    )
    users: tuple[int, ...] = option(
        (), "users of the closed loops (default: 1, 2, 4, ... as many as can run)",
        read=comma_list(integer(1, _MOST, "2^20"), "positive integers like 1,2,4"), metavar="C,C",
    )  # fmt: skip
    seed: int = option(0, "of all random numbers (default: 0)", metavar="N", least=0)
    out: Path | None = option(
        None, "write plan.html and plan.json into this directory", metavar="DIR"
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.simulation.planning import gains

    costs = _costs(options, screen)
    ways = _ways(options, costs, screen)
    study = _study(options, costs, ways)
    with screen.progress("simulating") as tell:
        plan = study.carry_out(lambda done: tell(done, study.runs))
    _show(plan, screen)
    baseline = "mtp1" if any(way.name == "mtp1" for way in ways) else "off"
    result = {
        "rows": [asdict(row) for row in plan.rows],
        "frontier": [asdict(row) for row in plan.frontier],
        "max_rate": dict(plan.max_rate),
        "service_level": asdict(plan.level),
        f"over_{baseline}": gains(plan.frontier, baseline),
        "settings": _about(options, costs, ways, study),
    }
    result["out"] = _write(options, plan, result, screen)
    return result


def _costs(options: Options, screen: Screen) -> CostTable:
    """The table of a file, or this machine's of a target."""
    from dspark.scheduling.cost_table import CostTable

    if Path(options.cost).is_file():
        return CostTable.load(options.cost)
    if options.cost.endswith(".json"):
        return CostTable.load(options.cost)  # which says what is wrong
    from dspark.engine.loading import load

    with screen.log.status(f"Loading {options.cost} ..."):
        found = load(options.cost, options.draft).costs
    if found is None:
        raise UsageError(
            f"This machine has no cost table of {options.cost}; measure one with dspark profile "
            f"{options.cost}, or name a file with --cost."
        )
    return found


def _ways(options: Options, costs: CostTable, screen: Screen) -> list[Way]:
    from dspark.engine.speculation.schedule import Schedule
    from dspark.scheduling.cost_table import CostTable
    from dspark.simulation.acceptance_source import read_acceptance
    from dspark.simulation.server import Way

    acceptance = read_acceptance(options.acceptance, options.seed)
    knows_mtp = options.mtp_cost is not None and options.mtp_acceptance is not None
    mtp, trees = ("mtp1",) if knows_mtp else (), ("trees",) if options.tree_cost else ()
    names = options.schedule or ("off", "fixed", *mtp, "lagged", *trees)
    if not costs.extras or not costs.prompts:
        screen.warn(
            "The cost table says nothing of prompts or of whole steps, so these are guessed from "
            "its rounds; measure it with dspark profile --whole-steps."
        )
    found = []
    for name in names:
        word, _, count = name.partition("-")
        if name == "off":
            found.append(Way("off", costs))
        elif name == "mtp1":
            if options.mtp_cost is None or options.mtp_acceptance is None:
                raise UsageError("mtp1 needs --mtp-cost and --mtp-acceptance.")
            single = read_acceptance(options.mtp_acceptance, options.seed).shortened(1)
            found.append(Way(name, CostTable.load(options.mtp_cost), single))
        elif name == "trees":
            if options.tree_cost is None:
                raise UsageError("trees needs --tree-cost.")
            if acceptance.trees is None:
                raise UsageError(_NO_RANKS)
            tree_costs = CostTable.load(options.tree_cost)
            found.append(Way(name, costs, acceptance, Schedule("lagged"), tree_costs=tree_costs))
        elif count:
            if not 1 <= int(count) <= acceptance.num_drafts:
                raise UsageError(f"{name} drafts {count} of {acceptance.num_drafts} tokens.")
            fewer = acceptance.shortened(int(count))
            found.append(Way(name, costs, fewer, Schedule("fixed"), acceptance.num_drafts))
        else:
            found.append(Way(name, costs, acceptance, Schedule(word)))
    return found


def _study(options: Options, costs: CostTable, ways: list[Way]) -> Study:
    from dspark.simulation.arrivals import Lengths, drawn_arrivals, read_trace
    from dspark.simulation.fleet import Fleet
    from dspark.simulation.planning import ServiceLevel, Study, capacity
    from dspark.simulation.server import Limits

    if options.percentile >= 100:
        raise UsageError(f"--percentile is {options.percentile}, but must be below 100.")
    if options.trace is not None:
        arrivals = read_trace(options.trace)
    else:
        arrivals = drawn_arrivals(
            options.requests,
            Lengths(*options.prompt_tokens),
            Lengths(*options.answer_tokens),
            burstiness=options.burstiness,
            seed=options.seed,
        )
    most = max(point.requests for point in costs.points)
    limits = Limits(options.batch_size or most, options.step_tokens, options.cache_tokens)
    fleet = Fleet(limits, options.replicas, options.router, options.seed)
    rates = options.rate
    if not rates and options.trace is not None:
        rates = (arrivals.rate,)
    elif not rates:
        best = max(capacity(way, arrivals, fleet) for way in ways)
        rates = tuple(float(f"{best * share:.3g}") for share in (0.2, 0.4, 0.6, 0.8, 1.0))
    users = options.users or tuple(
        options.replicas * (1 << n) for n in range(limits.max_requests.bit_length())
    )
    level = ServiceLevel(options.ttft_ms, options.user_tokens_per_s, options.percentile)
    return Study(ways, arrivals, fleet, rates, users, level, options.price)


def _about(options: Options, costs: CostTable, ways: list[Way], study: Study) -> dict[str, str]:
    arrivals, limits = study.arrivals, study.fleet.limits
    drafters = {way.acceptance.source: None for way in ways if way.acceptance}
    return {
        "target": costs.machine.target,
        "drafter": costs.machine.drafter,
        "costs measured on": f"{costs.machine.hardware}, {costs.machine.threads} threads, "
        f"{costs.machine.dtype}",
        "acceptance": "; ".join(drafters),
        "requests": f"{len(arrivals)}, "
        + (str(options.trace) if options.trace else f"burstiness {options.burstiness:g}"),
        "prompts": f"{arrivals.prompt_N.mean():.0f} tokens in the mean",
        "answers": f"{arrivals.answer_N.mean():.0f} tokens in the mean",
        "servers": f"{options.replicas}, router {options.router}, {limits.max_requests} requests "
        f"at once, {limits.step_tokens} rows a step",
        "cache": "as needed" if limits.cache_tokens is None else f"{limits.cache_tokens} tokens",
        "seed": str(options.seed),
    }


def _show(plan: Plan, screen: Screen) -> None:
    numbers = ("tokens/s", "TTFT p50", "p95", "per user", "accepted", "verified")
    rows = table("requests/s", "schedule", right=numbers)
    for row in plan.rows:
        rows.add_row(
            f"{row.rate:.3g}",
            row.schedule,
            cell(row.tokens_per_s),
            *(f"{row.ttft_ms[name]:.0f}" for name in ("p50", "p95")),
            cell(row.tokens_per_s_per_user["p50"]),
            cell(row.accepted_length),
            cell(row.verified_per_request),
        )
    screen.out.print(rows)
    screen.out.print("\nLargest rate within the service level, requests per second:")
    for name, rate in plan.max_rate.items():
        screen.out.print(f"  {name:<10}{cell(rate)}")


def _write(options: Options, plan: Plan, result: Mapping[str, Any], screen: Screen) -> list[str]:
    if options.out is None:
        return []
    from dspark.scheduling.json_files import write_json
    from dspark.simulation.page import MISSING, write_page

    paths = [options.out / "plan.html", options.out / "plan.json"]
    if not write_page(plan, result["settings"], paths[0]):
        screen.warn(MISSING)
    write_json(paths[1], result)
    screen.say(f"\nWritten: {', '.join(map(str, paths))}.")
    return [str(path) for path in paths]


COMMAND = Command(
    "plan",
    "plan capacity: simulate servers on measured costs, every schedule under the same arrivals",
    EXAMPLE,
    Options,
    run,
)
