"""`dspark generate`: continues prompts, and with --compare sets plain decoding beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dspark.cli.groups import Batch, PairOrPlain, Prompts, Sampling, Speculation
from dspark.cli.inputs import encode, load_pair, measure_costs, named_prompts, tell_schedule
from dspark.cli.options import Command, option, pick, picked
from dspark.cli.screen import Screen
from dspark.data.conversations import Prompt
from dspark.errors import UsageError
from dspark.request import Output, Request, SamplingParams, Verifier

if TYPE_CHECKING:
    from dspark.cli.measure.decoding import Decoded, Difference, EngineOptions
    from dspark.engine.engine import Engine
    from dspark.engine.model import Model
    from dspark.engine.requests.sequence import Piece

EXAMPLE = """\
  dspark generate bundled --prompt "What does the command `tar` do?" --compare
  dspark generate ./target --draft ./drafter --prompts questions.jsonl --temperature 1 --json"""
DRAFTED = "green"


@dataclass(frozen=True)
class _Answers:
    TITLE: ClassVar = "sampling"

    stop: tuple[str, ...] = option((), "ends the output; repeatable", metavar="S")
    n: int = option(1, "answers to each prompt (default: {default})", metavar="N")
    logprobs: int | None = option(
        None,
        "with --json: each token's log-probability, and those of the L most likely tokens",
        metavar="L",
    )
    timeout: float | None = option(None, "seconds after which an answer ends as it is", metavar="S")


@dataclass(frozen=True)
class _Decoding(Speculation, Batch):
    TITLE: ClassVar = "speculation"

    verifier: Verifier | None = pick(  # type: ignore[assignment]
        Speculation,
        "verifier",
        None,
        help="default: block; coupled where --seed is given and tokens are sampled, whose output "
        "is plain decoding's. With token or block a seed reproduces under --schedule off, fixed "
        "and threshold only",
    )
    compare: bool = option(False, "also decode plainly, and compare speed and output")


@dataclass(frozen=True)
class Options(Prompts, Sampling, _Answers, _Decoding, PairOrPlain):
    """Options of `generate`."""


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    verifier = options.verifier or _default_verifier(options)
    options = replace(options, verifier=verifier)
    named = picked(options, *(each.name for each in fields(Sampling)), "stop", "n", "logprobs")
    params = SamplingParams(**named, seed=options.seed or 0)
    _check_options(options)
    prompts = named_prompts(options)
    model = load_pair(options, screen)
    from dspark.cli.measure.decoding import run_report
    from dspark.evaluation.load.closed_loop import warm_up

    engine_options = _engine_options(options, model)
    requests = _requests(model, prompts, params, options)
    prompts = [prompt for prompt in prompts for _ in range(params.n)]
    if options.cost is not None:
        model.use_costs(options.cost)
    measure_costs(options, model, requests, min(options.batch_size, len(requests)), screen)
    with screen.log.status("Preparing the engine ..."):
        engine = engine_options.engine(model, requests)
    tell_schedule(model, engine, requests, screen)
    if options.compare:
        warm_up(engine, requests[:1])
    decoded = _decode_and_show(engine, requests, prompts, screen)
    report = run_report([decoded])
    if options.compare:
        report |= _compare(model, engine_options, requests, decoded, screen)
    _summarise(report, screen)
    return report


def _default_verifier(options: Options) -> Verifier:
    """A seed that is named names a text, whatever load and schedule."""
    return "coupled" if options.seed is not None and options.temperature > 0 else "block"


def _engine_options(options: Options, model: Model) -> EngineOptions:
    """Check what only makes sense with a drafter, or with one schedule."""
    from dspark.cli.measure.decoding import EngineOptions
    from dspark.engine.speculation.schedule import Schedule

    Schedule(options.schedule or "fixed", options.threshold)  # refuses what does not go together
    idle = model.drafter is None or options.schedule == "off"
    for name, given in (
        ("--block-size", options.block_size),
        ("--tree-nodes", options.tree_nodes),
        ("--schedule", options.schedule),
        ("--cost", options.cost),
    ):
        if idle and given not in (None, "off"):
            raise UsageError(
                f"{name} is {given}, but nothing is drafted here; give a drafter with --draft."
            )
    return EngineOptions(
        verifier=options.verifier or _default_verifier(options),
        **picked(options, "schedule", "threshold", "block_size", "tree_nodes", "batch_size"),
    )


def _check_options(options: Options) -> None:
    """Refuse what would not act, or would not mean anything."""
    if options.logprobs is not None and not options.json:
        raise UsageError(f"--logprobs is {options.logprobs}, but only --json shows them; add it.")
    if options.timeout is not None and options.compare:
        raise UsageError(
            f"--timeout is {options.timeout}, but --compare compares whole answers; leave one out."
        )


def _requests(
    model: Model, prompts: Sequence[Prompt], params: SamplingParams, options: Options
) -> list[Request]:
    """One request per answer; prompt i draws with seed + i."""
    return [
        sample
        for i, prompt in enumerate(prompts)
        for sample in Request(
            encode(prompt, model, raw=options.raw),
            params.with_seed(params.seed + i),
            timeout_s=options.timeout,
        ).samples()
    ]


def _decode_and_show(
    engine: Engine, requests: Sequence[Request], prompts: Sequence[Prompt], screen: Screen
) -> Decoded:
    """One prompt is streamed; of several, each is printed once those before it are."""
    from dspark.cli.measure.decoding import decode

    texts = [prompt.text for prompt in prompts]
    if len(requests) == 1:

        def stream(_index: int, pieces: Sequence[Piece], _output: Output | None) -> None:
            for piece in pieces:
                screen.write(piece.text, DRAFTED if piece.drafted else "")

        decoded = decode(engine, requests, texts, live=True, show=stream)
        screen.write("\n")
        return decoded
    waiting: dict[int, Output] = {}
    printed = 0

    def show_finished(index: int, _pieces: Sequence[Piece], output: Output | None) -> None:
        nonlocal printed
        if output is not None:
            waiting[index] = output
        while printed in waiting:
            done = waiting.pop(printed)
            printed += 1
            screen.out.rule(f"{printed} of {len(requests)}", align="left")
            screen.write(done.text + "\n")

    return decode(engine, requests, texts, show=show_finished)


def _compare(
    model: Model,
    engine_options: EngineOptions,
    requests: Sequence[Request],
    decoded: Decoded,
    screen: Screen,
) -> dict[str, Any]:
    """Decode plainly, and set both beside each other."""
    from dspark.cli.measure.decoding import comparable, compare_report, decode, differences
    from dspark.evaluation.load.closed_loop import warm_up

    plain_engine = engine_options.plain_engine(model, requests)
    with screen.log.status("Decoding plainly ..."):
        warm_up(plain_engine, requests[:1])
        texts = [output.prompt for output in decoded.outputs]
        plain = decode(plain_engine, requests, texts, live=len(requests) == 1)
    temperature = requests[0].params.temperature
    must_agree = comparable(temperature, engine_options.verifier)
    report = compare_report([decoded], [plain], comparable=must_agree)
    found: list[Difference] = []
    if temperature == 0:
        found = differences(model.target, requests, decoded.outputs, plain.outputs)
    for difference in found:
        target = model.target
        sentence = difference.sentence(target.dtype, batch_invariant=target.batch_invariant)
        screen.warn(sentence)
    report["differences"] = [
        {"request": d.request, "position": d.position, "top2_gap": d.top2_gap} for d in found
    ]
    return report


def _summarise(report: dict[str, Any], screen: Screen) -> None:
    parts = [f"{report['generated_tokens']} tokens, {report['tokens_per_s']:.1f} tokens/s"]
    if report["drafted"]:
        parts.append(
            f"accepted length {report['accepted_length']:.2f} in {report['rounds']} rounds"
        )
    if "speedup" in report:
        parts.append(
            f"{report['speedup']:.2f} x plain decoding ({report['plain_tokens_per_s']:.1f} "
            f"tokens/s), {verdict(report['identical'])}"
        )
    screen.remark("; ".join(parts) + ".", "dim")


def verdict(identical: bool | None) -> str:
    """Say whether the outputs agree."""
    if identical is None:
        return "same distribution, other draws"
    return "identical output" if identical else "DIFFERENT output"


COMMAND = Command("generate", "continue prompts with a model", EXAMPLE, Options, run)
