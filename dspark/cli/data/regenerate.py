"""`dspark data regenerate`: answers prompts with the target itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dspark.cli.groups import PROMPTS_HELP, Batch, Loading, Pair, Sampling
from dspark.cli.inputs import load_model
from dspark.cli.options import Command, option, pick, picked
from dspark.cli.screen import Screen
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.data.answers.regenerate import RegenerateReport, Responder
    from dspark.data.answers.replay import AnswerFilters
    from dspark.data.answers.sampling import Sampling as ChosenSampling

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


@dataclass(frozen=True)
class _Answers:
    TITLE: ClassVar = (
        "answers (by default as the model's generation_config.json recommends, else temperature 1)"
    )

    temperature: float | None = pick(
        Sampling, "temperature", None, help="0 takes the most likely token"
    )
    top_p: float | None = pick(Sampling, "top_p", None, help=None)
    top_k: int | None = pick(Sampling, "top_k", None, help=None)
    min_p: float | None = pick(Sampling, "min_p", None, help=None)
    max_new_tokens: int = pick(
        Sampling, "max_new_tokens", help="per answer (default: {default})", least=1
    )
    thinking: Literal["on", "off", "default"] = option(
        "default", "`enable_thinking` of the chat template (default: left to the template)"
    )


@dataclass(frozen=True)
class _Filters:
    TITLE: ClassVar = "answers that are not kept"

    only_finished: bool = option(False, "drop answers cut at --max-new-tokens")
    drop_repeated_tokens: int | None = option(
        None, "drop answers that repeat N neighbouring tokens", metavar="N", least=0
    )
    drop_repeated_words: int | None = option(
        None, "drop answers that repeat N neighbouring words", metavar="N", least=0
    )
    drop_containing: tuple[str, ...] = option(
        (), "drop answers that contain TEXT; repeatable", metavar="TEXT"
    )


@dataclass(frozen=True)
class _Engine:
    TITLE: ClassVar = "by this machine"

    draft: str | None = pick(
        Pair, "draft", help="a drafter, which makes it faster (default: the attached one)"
    )
    batch_size: int | None = pick(Batch, "batch_size", None, help="requests at once (default: 16)")


@dataclass(frozen=True)
class _Servers:
    TITLE: ClassVar = "by servers"

    server: tuple[str, ...] = option(
        (), "a server of TARGET with OpenAI's API; repeatable, to share the work", metavar="URL"
    )
    server_model: str | None = option(
        None, "TARGET's name there (default: the one it has)", metavar="NAME"
    )
    concurrency: int | None = option(
        None, "concurrent requests per server (default: 32)", metavar="R", least=1
    )
    api_key_env: str | None = option(
        None, "the environment variable that holds the key", metavar="VARIABLE"
    )
    timeout: float | None = option(None, "seconds for a reply (default: 600)", metavar="S")
    retries: int | None = option(
        None, "times that a failed call is repeated (default: 4)", metavar="N", least=0
    )


@dataclass(frozen=True)
class Options(_Answers, _Filters, _Engine, _Servers, Loading):
    """Options of `data regenerate`."""

    target: str = pick(Pair, "target")
    prompts: str = option("", PROMPTS_HELP, metavar="FILE", required=True)
    out: Path = option(
        Path("regenerated.jsonl"), "JSON lines, .gz compresses (default: {default})", metavar="FILE"
    )
    limit: int | None = option(None, "read at most N lines", metavar="N", least=1)
    strict: bool = option(False, "stop at the first malformed line")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    _check(options)
    from dspark.data.answers.regenerate import journal_path, regenerate

    out = options.out
    responder = _by_servers(options, screen) if options.server else _by_engine(options, screen)
    if journal_path(out).exists():
        screen.remark(f"Going on with {journal_path(out)}.")
    try:
        with screen.progress("lines", counted=True) as tell:
            report = regenerate(
                responder,
                options.prompts,
                out,
                limit=options.limit,
                strict=options.strict,
                progress=tell,
            )
    except KeyboardInterrupt:
        screen.remark("What is done is kept; the same command continues from here.")
        raise
    screen.say(_sentence(report, out))
    return picked(report, "records", "failed", "skipped", "input", "resumed", "bytes") | {
        "bytes_per_token": report.bytes / report.tokens if report.tokens else None,
        "out": str(out),
        "failures": str(report.failures) if report.failures else None,
    }


def _sentence(report: RegenerateReport, out: Path) -> str:
    failed = f"; {report.failed} failed, see {report.failures}" if report.failed else ""
    skipped = f"; {report.skipped} not wanted" if report.skipped else ""
    return f"{report.records} records in {out}{failed}{skipped}."


def _check(options: Options) -> None:
    if options.timeout is not None and not options.timeout > 0:
        raise UsageError(f"--timeout is {options.timeout}, but must be above 0.")
    for name in ENGINE_ONLY if options.server else SERVER_ONLY:
        if getattr(options, name) not in (None, False):
            other = "without" if options.server else "together with"
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} acts only {other} --server; leave one of them out.")


def _wanted(options: Options) -> AnswerFilters:
    from dspark.data.answers.replay import AnswerFilters

    return AnswerFilters(
        finished=options.only_finished,
        token_gram=options.drop_repeated_tokens or 0,
        word_gram=options.drop_repeated_words or 0,
        without=options.drop_containing,
    )


def _sampling(options: Options, source: str, screen: Screen) -> ChosenSampling:
    from dspark.data.answers.sampling import choose_sampling, recommended_sampling

    given = picked(options, "temperature", "top_p", "top_k", "min_p")
    recommended = recommended_sampling(source, revision=options.revision, offline=options.offline)
    sampling = choose_sampling(given, recommended)
    if sampling.recommended:
        names = ", ".join(f"{name} {sampling.values[name]:g}" for name in sampling.recommended)
        screen.remark(f"As {source} recommends: {names}.")
    return sampling


def _by_engine(options: Options, screen: Screen) -> Responder:
    from dspark.data.answers.engine_backend import EngineResponder
    from dspark.data.answers.sampling import template_options

    sampling = _sampling(options, options.target, screen)
    params = sampling.params(options.max_new_tokens, options.seed or 0)
    return EngineResponder(
        load_model(options.target, options.draft, options, screen),
        params,
        _wanted(options),
        template_options(options.thinking),
        options.batch_size or 16,
    )


def _by_servers(options: Options, screen: Screen) -> Responder:
    from dspark.data.answers.chat_server import ChatServer, served_model, server_url
    from dspark.data.answers.sampling import template_options
    from dspark.data.answers.server_backend import ServerResponder

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


COMMAND = Command(
    "regenerate", "answer the prompts of a file with the target itself", EXAMPLE, Options, run
)
