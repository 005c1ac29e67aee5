"""`dspark demo`: a chat model on maths, code and chat, plain beside speculative."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from dspark.cli.groups import Loading, Sampling, Speculation
from dspark.cli.inputs import load_model, measure_costs
from dspark.cli.options import Command, option, pick
from dspark.cli.screen import Screen, printable
from dspark.data.corpus import BOXED
from dspark.errors import CheckpointError, CompatibilityError
from dspark.request import Output, Request, SamplingParams

if TYPE_CHECKING:
    from dspark.cli.measure.decoding import Decoded, EngineOptions
    from dspark.cli.measure.decoding import Show as Told
    from dspark.engine.model import Model
    from dspark.engine.requests.sequence import Piece

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


@dataclass(frozen=True)
class Options(Loading):
    """Options of `demo`; revision and trust_remote_code do nothing for models that ship."""

    revision: str | None = None
    trust_remote_code: bool = False
    model: Literal["smollm2", "bundled"] | None = option(
        None,
        "smollm2 (SmolLM2-135M-Instruct, by default), or the tiny bundled model, which takes its "
        "place where it is not available",
    )
    max_new_tokens: int | None = pick(
        Sampling, "max_new_tokens", None, help="default: 128 with smollm2, 96 with bundled"
    )
    temperature: float = pick(Sampling, "temperature")
    only: Literal["math", "code", "chat"] | None = option(None, "one prompt instead of all three")
    tree_nodes: int | None = pick(Speculation, "tree_nodes")
    no_profile: bool = pick(Speculation, "no_profile")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object.

    Raises:
        CheckpointError: the model is missing, or has no drafter.
    """
    name, model = _load(options, screen)
    shown = SHOWS[name]
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens or shown.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed or 0,
    )
    from dspark.cli.measure.decoding import EngineOptions, comparable, compare_report

    engine_options = EngineOptions(batch_size=1, tree_nodes=options.tree_nodes)
    speculation = Speculation(no_profile=options.no_profile)
    measure_costs(speculation, model, [Request((0,), params)], 1, screen)
    must_agree = comparable(params.temperature, engine_options.verifier)
    runs: list[Decoded] = []
    plain_runs: list[Decoded] = []
    domains: dict[str, dict[str, Any]] = {}
    for domain in [options.only] if options.only else DOMAINS:
        prompt = shown.prompts[domain]
        request = Request(model.encode([{"role": "user", "content": prompt}]), params)
        screen.out.rule(domain, align="left")
        screen.out.print(Text(prompt, "italic"))
        plain, ours = _race(model, engine_options, request, prompt, shown.repeats, screen)
        domains[domain] = compare_report([ours], [plain], comparable=must_agree)
        screen.out.print(_verdict(model, request, plain, ours, domains[domain]["identical"]))
        plain_runs.append(plain)
        runs.append(ours)
    report = compare_report(runs, plain_runs, comparable=must_agree)
    screen.out.print(_table(domains if options.only else domains | {"all": report}))
    screen.out.print(shown.note, style="dim")
    return report | {"domains": domains, "model": name}


def _load(options: Options, screen: Screen) -> tuple[str, Model]:
    """The model asked for; by default SmolLM2, or the bundled model where that is unavailable."""
    for name in (options.model,) if options.model else tuple(SHOWS):
        threads = SHOWS[name].threads if options.threads is None else options.threads
        try:
            model = load_model(name, None, replace(options, threads=threads), screen)
            if model.drafter is None:
                raise CheckpointError(f"{name} has no drafter attached; reinstall dspark.")
            return name, model
        except (CheckpointError, CompatibilityError) as error:
            if name in (options.model, "bundled"):
                raise
            screen.warn(f"{error} The tiny bundled model takes its place.")
    raise AssertionError("the bundled model is loaded or refused")


def _race(
    model: Model,
    options: EngineOptions,
    request: Request,
    prompt: str,
    repeats: int,
    screen: Screen,
) -> tuple[Decoded, Decoded]:
    """Decode plainly and with DSpark; each run is shown as it goes if there is one of each.

    Otherwise they take turns, and those of median time are replayed and returned.
    """
    from dspark.cli.measure.decoding import decode
    from dspark.evaluation.load.closed_loop import warm_up

    engines = (options.plain_engine(model, [request]), options.engine(model, [request]))
    with screen.log.status("Warming up ..."):
        for engine in engines:
            warm_up(engine, [request])
    if repeats == 1:
        with Watched(("plain", "DSpark"), screen.out) as watched:
            plain, ours = (
                decode(engine, [request], [prompt], live=True, show=watched.show(side))
                for side, engine in enumerate(engines)
            )
        return plain, ours
    with screen.log.status("Decoding plainly and with DSpark in turn ..."):
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
        return Text("Sampled: the same distribution, but other draws, so the texts differ.\n")
    if identical:
        return Text("Identical, token by token.\n", "green")
    from dspark.cli.measure.decoding import differences

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


# The display

DRAFTED = "green"
REPLAY_SECONDS = 4.0
_FRAMES_PER_SECOND = 20


@dataclass(frozen=True)
class Side:
    """One of the two runs, and what it is called.

    For a replay both are decoded first, one after the other, so that neither the other run nor the
    display takes time from them; the replay then keeps their measured pace, stretched alike.
    """

    title: str
    run: Decoded

    def text_at(self, seconds: float) -> Text:
        """What had been decoded by then; accepted drafts are coloured."""
        text = Text(overflow="fold")
        for moment, pieces in self.run.moments:
            if moment > seconds:
                break
            for piece in pieces:
                text.append(printable(piece.text), DRAFTED if piece.drafted else "")
        return text

    def panel_at(self, seconds: float) -> Panel:
        """The text, with the run's time so far."""
        shown = min(seconds, self.run.seconds)
        note = f"{shown:.2f} s"
        if seconds >= self.run.seconds:
            note += f", {self.run.tokens_per_s:.0f} tokens/s"
        return Panel(self.text_at(seconds), title=self.title, subtitle=note)


class Watched:
    """Panels side by side that runs fill one after the other; elsewhere than on a terminal, text.

    The time of showing is not counted in a run's.
    """

    def __init__(self, titles: Sequence[str], console: Console) -> None:
        self.titles, self.console = titles, console
        self.texts = [Text(overflow="fold") for _ in titles]
        self.live = (
            Live(self._frame(), console=console, auto_refresh=False)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Watched:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, side: int) -> Told:
        """What to tell of the steps of one run."""
        if self.live is None:
            self.console.print(f"[{self.titles[side]}]", style="bold", markup=False)

        def step(_index: int, pieces: Sequence[Piece], output: Output | None) -> None:
            for piece in pieces:
                self.texts[side].append(printable(piece.text), DRAFTED if piece.drafted else "")
                if self.live is None:
                    self.console.file.write(printable(piece.text))
            if self.live is not None:
                self.live.update(self._frame(), refresh=True)
            else:
                self.console.file.write("\n" if output is not None else "")
                self.console.file.flush()

        return step

    def _frame(self) -> Table:
        sides = zip(self.titles, self.texts, strict=True)
        panels = [Panel(text, title=title) for title, text in sides]
        return side_by_side(panels, "Decoded in turn.")


def replay(sides: Sequence[Side], console: Console) -> None:
    """Play the runs side by side on a terminal; elsewhere print them one after the other."""
    if not console.is_terminal:
        for side in sides:
            console.print(f"[{side.title}]", style="bold", markup=False)
            console.print(side.text_at(side.run.seconds), soft_wrap=True)
        return
    longest = max(side.run.seconds for side in sides)
    stretch = REPLAY_SECONDS / longest
    started = time.monotonic()
    with Live(_frame(sides, 0.0, stretch), console=console, auto_refresh=False) as live:
        while (seconds := (time.monotonic() - started) / stretch) < longest:
            live.update(_frame(sides, seconds, stretch), refresh=True)
            time.sleep(1 / _FRAMES_PER_SECOND)
        live.update(_frame(sides, longest, stretch), refresh=True)


def _frame(sides: Sequence[Side], seconds: float, stretch: float) -> Table:
    pace = f"replayed together at {1 / stretch:.2g} x their speed"
    panels = [side.panel_at(seconds) for side in sides]
    return side_by_side(panels, f"Timed in turn, {pace}.")


def side_by_side(panels: Sequence[Panel], how: str) -> Table:
    """Panels of equal width, and under them how they came about."""
    grid = Table.grid(*[Column(ratio=1) for _ in panels], expand=True)
    grid.caption = f"{how} Green: drafted and accepted."
    grid.add_row(*panels)
    return grid


COMMAND = Command(
    "demo", "decode with a chat model, plainly and with DSpark", EXAMPLE, Options, run
)
