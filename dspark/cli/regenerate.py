"""`dspark data regenerate`: answers prompts with the target itself."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dspark.cli.common import (
    TARGET_HELP,
    Commands,
    Screen,
    add_common_options,
    add_loading_options,
    check_positive,
    load_model,
    new_parser,
)
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.data.answers.regenerate import RegenerateReport, Responder
    from dspark.data.answers.replay import AnswerFilters
    from dspark.data.answers.sampling import Sampling

EXAMPLE = """\
  dspark data regenerate bundled --prompts questions.jsonl.gz --out answers.jsonl.gz
  dspark data regenerate Qwen/Qwen3-4B --server http://localhost:30000 \\
    --server http://localhost:30001 --thinking off --max-new-tokens 4096 \\
    --prompts prompts.jsonl --out answers.jsonl.gz"""
ENGINE_ONLY = (
    "draft",
    "batch_size",
    "drop_repeated_tokens",
    "trust_remote_code",
    "batch_invariant",
    "quantize",
)
SERVER_ONLY = ("server_model", "concurrency", "api_key_env", "timeout", "retries")


def add_parser(commands: Commands) -> None:
    """Add `data regenerate`."""
    parser = new_parser(
        commands, "regenerate", "answer the prompts of a file with the target itself", EXAMPLE
    )
    parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSON lines with `messages`, `turns` or `prompt`",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="JSON lines, .gz compresses (default: regenerated.jsonl)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="read at most so many lines")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed line")
    _add_answer_options(parser)
    _add_filter_options(parser)
    _add_engine_options(parser)
    _add_server_options(parser)
    add_loading_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "answers (by default as the model's generation_config.json recommends, else temperature 1)"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="M")
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="per answer (default: 256)"
    )
    group.add_argument(
        "--thinking",
        choices=("on", "off", "default"),
        default="default",
        help="`enable_thinking` of the chat template (default: left to the template)",
    )


def _add_filter_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers that are not kept")
    group.add_argument(
        "--only-finished", action="store_true", help="drop answers cut at --max-new-tokens"
    )
    for unit in ("tokens", "words"):
        group.add_argument(
            f"--drop-repeated-{unit}",
            type=int,
            metavar="N",
            help=f"drop answers in which N neighbouring {unit} stand twice",
        )
    group.add_argument(
        "--drop-containing",
        action="append",
        default=[],
        metavar="TEXT",
        help="drop answers that contain TEXT; repeatable",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("by this machine")
    group.add_argument(
        "--draft", metavar="D", help="a drafter, which makes it faster (default: the attached one)"
    )
    group.add_argument("--batch-size", type=int, metavar="R", help="requests at once (default: 16)")


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("by servers")
    group.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="a server of TARGET with OpenAI's API; repeatable, to share the work",
    )
    group.add_argument(
        "--server-model", metavar="NAME", help="TARGET's name there (default: the one it has)"
    )
    group.add_argument(
        "--concurrency", type=int, metavar="R", help="requests at once, per server (default: 32)"
    )
    group.add_argument(
        "--api-key-env", metavar="VARIABLE", help="the environment variable that holds the key"
    )
    group.add_argument(
        "--timeout", type=float, metavar="S", help="seconds for a reply (default: 600)"
    )
    group.add_argument(
        "--retries", type=int, metavar="N", help="calls made again after a fault (default: 4)"
    )


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    _check(options)
    from dspark.data.answers.regenerate import journal_path, regenerate

    out = Path(options.out or "regenerated.jsonl")
    responder = _by_servers(options, screen) if options.server else _by_engine(options, screen)
    if journal_path(out).exists():
        screen.log.print(Text(f"Going on with {journal_path(out)}."), soft_wrap=True)
    columns = (TextColumn("lines"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=screen.log) as bar:
            task = bar.add_task("", total=None)
            report = regenerate(
                responder,
                options.prompts,
                out,
                limit=options.limit,
                strict=options.strict,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        screen.log.print("What is done is kept; the same command goes on from here.")
        raise
    screen.out.print(Text(_sentence(report, out)), soft_wrap=True)
    return {
        "records": report.records,
        "failed": report.failed,
        "skipped": report.skipped,
        "input": report.input,
        "resumed": report.resumed,
        "bytes": report.bytes,
        "bytes_per_token": report.bytes / report.tokens if report.tokens else None,
        "out": str(out),
        "failures": str(report.failures) if report.failures else None,
    }


def _sentence(report: RegenerateReport, out: Path) -> str:
    failed = f"; {report.failed} failed, see {report.failures}" if report.failed else ""
    skipped = f"; {report.skipped} not wanted" if report.skipped else ""
    return f"{report.records} records in {out}{failed}{skipped}."


def _check(options: argparse.Namespace) -> None:
    check_positive(options, "limit", "batch_size", "concurrency", "max_new_tokens")
    for name in ("drop_repeated_tokens", "drop_repeated_words", "retries"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UsageError(f"{_flag(name)} is {value}, but must be at least 0.")
    if options.timeout is not None and not options.timeout > 0:
        raise UsageError(f"--timeout is {options.timeout}, but must be above 0.")
    for name in ENGINE_ONLY if options.server else SERVER_ONLY:
        if getattr(options, name) not in (None, False):
            other = "without" if options.server else "together with"
            raise UsageError(f"{_flag(name)} acts only {other} --server; leave one of them out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wanted(options: argparse.Namespace) -> AnswerFilters:
    from dspark.data.answers.replay import AnswerFilters

    return AnswerFilters(
        finished=options.only_finished,
        token_gram=options.drop_repeated_tokens or 0,
        word_gram=options.drop_repeated_words or 0,
        without=tuple(options.drop_containing),
    )


def _sampling(options: argparse.Namespace, source: str, screen: Screen) -> Sampling:
    from dspark.data.answers.sampling import choose_sampling, recommended_sampling

    given = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    recommended = recommended_sampling(source, revision=options.revision, offline=options.offline)
    sampling = choose_sampling(given, recommended)
    if sampling.recommended:
        names = ", ".join(f"{name} {sampling.values[name]:g}" for name in sampling.recommended)
        screen.log.print(Text(f"As {source} recommends: {names}."), soft_wrap=True)
    return sampling


def _by_engine(options: argparse.Namespace, screen: Screen) -> Responder:
    from dspark.data.answers.engine_backend import EngineResponder
    from dspark.data.answers.sampling import template_options

    sampling = _sampling(options, options.target, screen)
    params = sampling.params(options.max_new_tokens, options.seed or 0)
    return EngineResponder(
        load_model(options, options.draft, screen),
        params,
        _wanted(options),
        template_options(options.thinking),
        options.batch_size or 16,
    )


def _by_servers(options: argparse.Namespace, screen: Screen) -> Responder:
    from dataclasses import replace

    from dspark.data.answers.sampling import template_options
    from dspark.data.answers.server_backend import (
        ChatServer,
        ServerResponder,
        served_model,
        server_url,
    )

    sampling = _sampling(options, options.target, screen)
    sampling.params(options.max_new_tokens, options.seed or 0)  # refuses values out of range
    server = ChatServer(
        tuple(server_url(url) for url in options.server),
        options.server_model or options.target,
        _api_key(options.api_key_env),
        timeout_s=options.timeout or 600.0,
        retries=4 if options.retries is None else options.retries,
    )
    return ServerResponder(
        replace(server, model=served_model(server, server.model)),
        sampling,
        options.max_new_tokens,
        options.seed,
        _wanted(options),
        template_options(options.thinking),
        options.concurrency or 32,
    )


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise UsageError(f"--api-key-env is {variable}, but that variable is empty; set it.")
    return key
