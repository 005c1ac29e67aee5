"""`dspark serve`: the OpenAI-compatible server and the live page."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dspark.cli.groups import PairOrPlain, Speculation
from dspark.cli.inputs import load_pair, measure_costs, tell_schedule
from dspark.cli.options import Command, number, option, pick, picked
from dspark.cli.screen import Screen
from dspark.errors import UsageError
from dspark.request import Verifier

if TYPE_CHECKING:
    from dspark.engine.engine import Engine
    from dspark.engine.model import Model
    from dspark.serving.context import Settings
    from dspark.serving.service import EngineService

EXAMPLE = """\
  dspark serve bundled
  dspark serve ./target --draft ./drafter --port 9000 --max-requests 32 --api-key-file keys.txt"""
# What the engine takes as it was given.
_OF_ENGINE = (
    "max_requests", "max_queue", "verifier", "schedule", "threshold", "block_size", "tree_nodes",
    "step_tokens", "cache_tokens", "memory_share",
)  # fmt: skip
MISSING = "dspark serve needs fastapi and uvicorn; install the extra dspark[serve]."


@dataclass(frozen=True)
class _Server:
    TITLE: ClassVar = "server"

    host: str = option("127.0.0.1", "address to listen on (default: {default})", metavar="H")
    port: int = option(8000, "0 picks a free port (default: {default})", metavar="P")
    served_model_name: str | None = option(
        None, "name that requests use (default: TARGET)", metavar="NAME"
    )
    api_key: tuple[str, ...] = option(
        (),
        "a key that requests must bear; repeatable; others on this machine can see it",
        metavar="K",
    )
    api_key_file: str | None = option(None, "the same, one key a line", metavar="FILE")
    cors_origin: tuple[str, ...] = option(
        (),
        "a web origin whose pages may read the answers; repeatable (default: none)",
        metavar="URL",
    )
    page_draft: tuple[str, ...] = option(
        (),
        "a further drafter that the live page offers; repeatable (ngram and the bundled model's "
        "are always there)",
        metavar="D",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "JSON lines on standard error (default: {default})"
    )
    log_prompts: bool = option(False, "also log the texts of prompts and answers")
    drain: float = option(
        30.0,
        "seconds that running answers get when the server stops (default: {default})",
        metavar="S",
    )


@dataclass(frozen=True)
class _Limits:
    TITLE: ClassVar = "limits"

    max_requests: int = option(8, "answers at once (default: {default})", metavar="R", least=1)
    max_queue: int = option(
        256,
        "answers that may wait beyond those; more get status 429 (default: {default})",
        metavar="N",
    )
    max_model_len: int | None = option(
        None,
        "tokens of prompt and answer together (default: the model's context)",
        metavar="N",
        least=1,
    )
    max_tokens: int = option(
        256, "new tokens where a request does not say (default: {default})", metavar="N", least=1
    )
    request_timeout: float | None = option(None, "seconds after which an answer ends", metavar="S")
    rate_limit: int | None = option(
        None, "requests a minute of each key or address", metavar="N", least=1
    )
    max_body_bytes: int = option(
        4 << 20, "size of a request (default: 4 MiB)", metavar="N", least=1
    )


@dataclass(frozen=True)
class _Engine(Speculation):
    TITLE: ClassVar = "speculation"

    verifier: Verifier = pick(
        Speculation,
        "verifier",
        help="of requests without a seed; those with one are verified by coupled (default: "
        "{default})",
    )
    block_size: int | None = pick(Speculation, "block_size", least=1)
    step_tokens: int | None = option(
        None,
        "rows of a step, prompts' included: fewer shorten the pauses that a long prompt makes for "
        "others (default: 512 on a CPU, else 2048)",
        metavar="N",
        least=1,
    )
    cache_tokens: int | None = option(
        None,
        "rows of the cache (default: room for --max-requests of --max-model-len, as far as "
        "--memory-share allows)",
        metavar="N",
        least=1,
    )
    memory_share: float | None = option(
        None,
        "what the cache may take of the free memory (default: .9 on a GPU, else .5)",
        metavar="S",
    )


@dataclass(frozen=True)
class _Learning:
    TITLE: ClassVar = "learning"

    learn: Literal["calibration", "drafter"] | None = option(
        None,
        "learn from the requests that say `store: true`: refresh the calibration, or train the "
        "drafter too; in the background, and without a change to any output (default: off; alone: "
        "calibration)",
        nargs="?",
        const="calibration",
    )
    learn_dir: str | None = option(
        None,
        "where samples and what is learned are kept, for their owner alone (default: a folder of "
        "this pair in the user's cache)",
        metavar="DIR",
    )
    learn_bytes: int = option(
        1 << 30, "samples on disk at most (default: 1 GiB)", metavar="N", least=1 << 20
    )
    learn_share: float | None = option(
        None,
        "of one core's time that the trainer takes at most, above 0 and at most 1 (default: 0.25)",
        read=partial(number, above=True),
        metavar="S",
    )


@dataclass(frozen=True)
class Options(_Server, _Limits, _Engine, _Learning, PairOrPlain):
    """Options of `serve`."""


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Serve until told to stop; the JSON object then says what was done.

    Raises:
        UsageError: an option has a value that cannot be used, or the extra is missing.
    """
    needed = ("fastapi", "uvicorn", "httptools", "prometheus_client")
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise UsageError(MISSING)
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port is {options.port}, but must be from 0 to 65535.")
    if options.learn is None and options.learn_dir is not None:
        raise UsageError("--learn-dir says where learning keeps its files; give --learn as well.")
    if options.learn is None and options.learn_share is not None:
        raise UsageError("--learn-share says how much learning may take; give --learn as well.")
    if options.learn_share is not None and options.learn_share > 1:
        raise UsageError(f"--learn-share is {options.learn_share:g}, but must be at most 1.")
    from dspark.serving.middleware import start_logging
    from dspark.serving.server import Server, bind

    settings = _settings(options)
    with bind(options.host, options.port) as address:
        model = load_pair(options, screen)
        drafters = _drafters(options, model)
        service = _service(options, model, screen)
        start_logging(options.log_level)
        server = Server(service, settings, drafters)
        screen.remark(cache_sentence(service.engine))
        port = address.getsockname()[1]
        screen.remark(
            f"Serving {settings.model_name} on http://{options.host}:{port}; Ctrl-C stops."
        )
        server.run([address])
    counters = server.service.counters
    return {
        "ok": server.started and server.service.fault is None,
        "steps": counters.steps,
        "verified": int(counters.verified_K.sum()),
        "accepted": int(counters.accepted_K.sum()),
    }


def _service(options: Options, model: Model, screen: Screen) -> EngineService:
    from dspark.serving.service import EngineService

    if options.learn is None:
        return EngineService(_engine(options, model, screen))
    from dspark.serving.learning.directory import DEFAULT_SHARE
    from dspark.serving.learning.learner import Learner, resume

    share = options.learn_share or DEFAULT_SHARE
    directory = resume(model, options.learn_dir, options.learn, share)
    engine = _engine(options, model, screen)
    learner = Learner(
        directory, engine, draft_top_k=model.draft_top_k, max_bytes=options.learn_bytes
    )
    screen.remark(
        f"{learner.sentence()} Requests with `store: true` are kept in {directory.path}, as token "
        "ids."
    )
    return EngineService(engine, learner=learner)


def cache_sentence(engine: Engine) -> str:
    """How many tokens and requests the cache of an engine has room for."""
    memory, length = engine.memory, engine.max_length
    whole = min(memory.tokens // length, engine.max_requests)
    when = "as they are used" if engine.target.device.type == "cpu" else "at once"
    rest = "" if whole == engine.max_requests else f" ({whole} at full length)"
    return (
        f"The cache holds {memory.tokens:,} tokens, taking up to {memory.bytes / 1e9:.2f} GB "
        f"{when}: {engine.max_requests} requests at once{rest}, of {length:,} tokens at most."
    )


def _settings(options: Options) -> Settings:
    from dspark.serving.context import Settings
    from dspark.serving.server import read_keys

    return Settings(
        model_name=options.served_model_name or options.target,
        api_keys=read_keys(options.api_key, options.api_key_file),
        cors_origins=options.cors_origin,
        max_body_bytes=options.max_body_bytes,
        requests_per_minute=options.rate_limit,
        request_timeout_s=options.request_timeout,
        default_max_tokens=options.max_tokens,
        seed=options.seed,
        log_prompts=options.log_prompts,
        drain_s=options.drain,
    )


def _drafters(options: Options, model: Model) -> dict[str, Model]:
    """What the live page offers, the model's own drafter first."""
    from dspark.engine.loading import load_draft
    from dspark.sources.names import BUNDLED_DRAFTERS

    found = {} if model.drafter is None else {model.name: model}
    further = BUNDLED_DRAFTERS if options.target == "bundled" else ()
    for name in (*options.page_draft, *further, "ngram"):
        if name == "none":
            raise UsageError("--page-draft is none, which the live page offers by itself.")
        if name not in found:
            found[name] = load_draft(model.target, name, offline=options.offline)
    return found


def _engine(options: Options, model: Model, screen: Screen) -> Engine:
    if model.drafter is None and options.schedule not in (None, "off"):
        raise UsageError(
            f"--schedule is {options.schedule}, but nothing is drafted here; give a drafter with "
            "--draft."
        )
    if options.cost is not None:
        model.use_costs(options.cost)
    measure_costs(options, model, None, options.max_requests, screen)
    with screen.log.status("Preparing the engine ..."):
        engine = model.open_engine(max_length=options.max_model_len, **picked(options, *_OF_ENGINE))
    tell_schedule(model, engine, None, screen)
    return engine


COMMAND = Command("serve", "serve a model over OpenAI's HTTP interface", EXAMPLE, Options, run)
