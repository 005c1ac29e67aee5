"""`dspark serve`: the OpenAI-compatible server and the live page."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    add_loading_options,
    add_pair_options,
    check_positive,
    load_model,
    new_parser,
)
from dspark.cli.options import add_drafting_options
from dspark.cli.starting import measure_costs, tell_schedule
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.engine.engine import Engine
    from dspark.engine.model import Model
    from dspark.serving.settings import Settings

EXAMPLE = """\
  dspark serve bundled
  dspark serve ./target --draft ./drafter --port 9000 --max-requests 32 --api-key-file keys.txt"""
MISSING = "dspark serve needs fastapi and uvicorn; install the extra dspark[serve]."


def add_parser(commands: Commands) -> None:
    """Add `serve`."""
    parser = new_parser(commands, "serve", "serve a model over OpenAI's HTTP interface", EXAMPLE)
    add_pair_options(parser, plain=True)
    _add_server_options(parser)
    _add_limit_options(parser)
    _add_engine_options(parser)
    add_loading_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="H", help="default: %(default)s")
    group.add_argument(
        "--port", type=int, default=8000, metavar="P", help="0 takes any (default: %(default)s)"
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="what requests call it (default: TARGET)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="K",
        help="a key that requests must bear; repeatable; others on this machine can see it",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="the same, one key a line")
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a web origin whose pages may read the answers; repeatable (default: none)",
    )
    group.add_argument(
        "--page-draft",
        action="append",
        default=[],
        metavar="D",
        help="a further drafter that the live page offers; repeatable (ngram, and the bundled "
        "model's, are there by themselves)",
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="JSON lines on standard error (default: %(default)s)",
    )
    group.add_argument(
        "--log-prompts", action="store_true", help="also log the texts of prompts and answers"
    )
    group.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that open answers have once the server is to stop (default: 30)",
    )


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-requests", type=int, default=8, metavar="R", help="answers at once (default: 8)"
    )
    group.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="answers that may wait beyond those; more get status 429 (default: 256)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's context)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="new tokens where a request does not say (default: 256)",
    )
    group.add_argument(
        "--request-timeout", type=float, metavar="S", help="seconds after which an answer ends"
    )
    group.add_argument(
        "--rate-limit", type=int, metavar="N", help="requests a minute of each key or address"
    )
    group.add_argument(
        "--max-body-bytes",
        type=int,
        default=4 << 20,
        metavar="N",
        help="size of a request (default: 4 MiB)",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = add_drafting_options(
        parser,
        verifier="block",
        verifier_help="of requests without a seed; those with one are verified by coupled "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--step-tokens",
        type=int,
        metavar="N",
        help="rows of a step, prompts' included: fewer shorten the pauses that a long prompt "
        "makes for others (default: 512 on a CPU, else 2048)",
    )
    group.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="rows of the cache (default: room for --max-requests of --max-model-len, as far as "
        "--memory-share allows)",
    )
    group.add_argument(
        "--memory-share",
        type=float,
        metavar="S",
        help="what the cache may take of the free memory (default: .9 on a GPU, else .5)",
    )


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Serve until told to stop; the JSON object then says what was done.

    Raises:
        UsageError: an option has a value that cannot be used, or the extra is missing.
    """
    needed = ("fastapi", "uvicorn", "httptools", "prometheus_client")
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise UsageError(MISSING)
    check_positive(options, "max_requests", "max_model_len", "max_tokens", "block_size")
    check_positive(options, "max_body_bytes", "rate_limit", "step_tokens", "cache_tokens")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port is {options.port}, but must be from 0 to 65535.")
    from dspark.serving.ops.logs import start_logging
    from dspark.serving.server import Server, bind
    from dspark.serving.service import EngineService

    settings = _settings(options)
    with bind(options.host, options.port) as address:
        model = load_model(options, options.draft, screen)
        service = EngineService(_engine(options, model, screen))
        drafters = _drafters(options, model)
        start_logging(options.log_level)
        server = Server(service, settings, drafters)
        screen.log.print(cache_sentence(service.engine), soft_wrap=True, markup=False)
        screen.log.print(
            f"Serving {settings.model_name} on http://{options.host}:{address.getsockname()[1]}; "
            "Ctrl-C stops.",
            soft_wrap=True,
            markup=False,
        )
        server.run([address])
    counters = server.service.counters
    return {
        "ok": server.started and server.service.fault is None,
        "steps": counters.steps,
        "verified": int(counters.verified_K.sum()),
        "accepted": int(counters.accepted_K.sum()),
    }


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


def _settings(options: argparse.Namespace) -> Settings:
    from dspark.serving.server import read_keys
    from dspark.serving.settings import Settings

    return Settings(
        model_name=options.served_model_name or options.target,
        api_keys=read_keys(options.api_key, options.api_key_file),
        cors_origins=tuple(options.cors_origin),
        max_body_bytes=options.max_body_bytes,
        requests_per_minute=options.rate_limit,
        request_timeout_s=options.request_timeout,
        default_max_tokens=options.max_tokens,
        seed=options.seed,
        log_prompts=options.log_prompts,
        drain_s=options.drain,
    )


def _drafters(options: argparse.Namespace, model: Model) -> dict[str, Model]:
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


def _engine(options: argparse.Namespace, model: Model, screen: Screen) -> Engine:
    if model.drafter is None and options.schedule not in (None, "off"):
        raise UsageError(
            f"--schedule is {options.schedule}, but nothing is drafted here; give a drafter with "
            "--draft."
        )
    if options.cost is not None:
        model.use_costs(options.cost)
    measure_costs(options, model, None, options.max_requests, screen)
    with screen.log.status("Preparing the engine ..."):
        engine = model.open_engine(
            max_requests=options.max_requests,
            max_length=options.max_model_len,
            max_queue=options.max_queue,
            verifier=options.verifier,
            schedule=options.schedule,
            threshold=options.threshold,
            block_size=options.block_size,
            step_tokens=options.step_tokens,
            cache_tokens=options.cache_tokens,
            memory_share=options.memory_share,
        )
    tell_schedule(model, engine, None, screen)
    return engine
