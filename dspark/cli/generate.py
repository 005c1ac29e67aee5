"""`dspark generate`: continues prompts, and with --compare sets plain decoding beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    add_loading_options,
    add_pair_options,
    load_model,
    new_parser,
)
from dspark.cli.options import add_drafting_options
from dspark.cli.prompts import PromptText, add_prompt_options, read_prompt_texts
from dspark.cli.starting import measure_costs, tell_schedule
from dspark.errors import UsageError
from dspark.request import Output, Request, SamplingParams, Verifier

if TYPE_CHECKING:
    from dspark.cli.comparison import Difference
    from dspark.cli.decoding import Decoded, EngineOptions
    from dspark.engine.engine import Engine
    from dspark.engine.model import Model
    from dspark.engine.sequence import Piece

EXAMPLE = """\
  dspark generate bundled --prompt "What does the command `tar` do?" --compare
  dspark generate ./target --draft ./drafter --prompts questions.jsonl --temperature 1 --json"""
DRAFTED = "green"


def add_parser(commands: Commands) -> None:
    """Add `generate`."""
    parser = new_parser(commands, "generate", "continue prompts with a model", EXAMPLE)
    add_pair_options(parser, plain=True)
    add_prompt_options(parser)
    _add_sampling_options(parser)
    _add_decoding_options(parser)
    add_loading_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the best"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 (default) is off")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0 (default) is off")
    group.add_argument("--min-p", type=float, default=0.0, metavar="M", help="0 (default) is off")
    for name, off in (("repetition", 1.0), ("presence", 0.0), ("frequency", 0.0)):
        group.add_argument(
            f"--{name}-penalty",
            type=float,
            default=off,
            metavar="X",
            help=f"{off:g} (default) is off",
        )
    group.add_argument(
        "--stop", action="append", default=[], metavar="S", help="ends the output; repeatable"
    )
    group.add_argument(
        "--n", type=int, default=1, metavar="N", help="answers to each prompt (default: 1)"
    )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="L",
        help="with --json: each token's log-probability, and those of the L most likely tokens",
    )
    group.add_argument(
        "--timeout", type=float, metavar="S", help="seconds after which an answer ends as it is"
    )


def _add_decoding_options(parser: argparse.ArgumentParser) -> None:
    group = add_drafting_options(
        parser,
        verifier=None,
        verifier_help="default: block; coupled where --seed is given and tokens are sampled, whose "
        "output is plain decoding's. With token or block a seed reproduces under --schedule off, "
        "fixed and threshold only",
    )
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="R", help="requests at once (default: 8)"
    )
    group.add_argument(
        "--compare", action="store_true", help="also decode plainly, and compare speed and output"
    )


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    options.verifier = options.verifier or _default_verifier(options)
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=tuple(options.stop),
        seed=options.seed or 0,
        n=options.n,
        logprobs=options.logprobs,
    )
    _check_options(options)
    prompts = read_prompt_texts(options)
    model = load_model(options, options.draft, screen)
    from dspark.cli.decoding import run_report, warm_up

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
        warm_up(engine, requests[0])
    decoded = _decode_and_show(engine, requests, prompts, screen)
    report = run_report([decoded])
    if options.compare:
        report |= _compare(model, engine_options, requests, decoded, screen)
    _summarise(report, screen)
    return report


def _default_verifier(options: argparse.Namespace) -> Verifier:
    """A seed that is named names a text, whatever load and schedule."""
    return "coupled" if options.seed is not None and options.temperature > 0 else "block"


def _engine_options(options: argparse.Namespace, model: Model) -> EngineOptions:
    """Check what only makes sense with a drafter, or with one schedule."""
    from dspark.cli.decoding import EngineOptions
    from dspark.engine.schedule import Schedule

    if options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}, but must be at least 1.")
    Schedule(options.schedule or "fixed", options.threshold)  # refuses what does not go together
    idle = model.drafter is None or options.schedule == "off"
    for name, given in (
        ("--block-size", options.block_size),
        ("--schedule", options.schedule),
        ("--cost", options.cost),
    ):
        if idle and given not in (None, "off"):
            raise UsageError(
                f"{name} is {given}, but nothing is drafted here; give a drafter with --draft."
            )
    return EngineOptions(
        verifier=options.verifier,
        schedule=options.schedule,
        threshold=options.threshold,
        block_size=options.block_size,
        batch_size=options.batch_size,
    )


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what would not act, or would not mean anything."""
    if options.logprobs is not None and not options.json:
        raise UsageError(f"--logprobs is {options.logprobs}, but only --json shows them; add it.")
    if options.timeout is not None and options.compare:
        raise UsageError(
            f"--timeout is {options.timeout}, but --compare compares whole answers; leave one out."
        )


def _requests(
    model: Model,
    prompts: Sequence[PromptText],
    params: SamplingParams,
    options: argparse.Namespace,
) -> list[Request]:
    """One request per answer; prompt i draws with seed + i."""
    return [
        sample
        for i, prompt in enumerate(prompts)
        for sample in Request(
            prompt.encode(model, raw=options.raw),
            params.with_seed(params.seed + i),
            timeout_s=options.timeout,
        ).samples()
    ]


def _decode_and_show(
    engine: Engine, requests: Sequence[Request], prompts: Sequence[PromptText], screen: Screen
) -> Decoded:
    """One prompt is streamed; of several, each is printed once those before it are."""
    from dspark.cli.decoding import decode

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
    from dspark.cli.comparison import comparable, compare_report, differences
    from dspark.cli.decoding import decode, warm_up

    plain_engine = engine_options.plain_engine(model, requests)
    with screen.log.status("Decoding plainly ..."):
        warm_up(plain_engine, requests[0])
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
        screen.log.print(sentence, style="yellow")
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
    screen.log.print("; ".join(parts) + ".", style="dim", soft_wrap=True)


def verdict(identical: bool | None) -> str:
    """Say whether the outputs agree."""
    if identical is None:
        return "same law, other draws"
    return "identical output" if identical else "DIFFERENT output"
