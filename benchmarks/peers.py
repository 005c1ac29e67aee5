"""Our engine beside transformers and llama.cpp: same model, prompts and threads, in turn.

One request at a time, greedy, prompts of the chat template. Each way decodes each prompt in turn,
several times, each time another way first; medians count. Decoding is timed from the first token
of an answer to its last, and the prompt by itself. Ways:

* `dspark`, plain, and `dspark draft` with the drafter (`--draft`, or the one attached);
* `transformers` (`generate`), and `transformers lookup`, its assisted decoding with prompt lookup;
* with `--llama-cpp BIN_DIR` and a GGUF file of the target for each of its types
  (`--gguf F16=FILE`, repeatable): `llama.cpp F16`, ..., and with `--gguf-draft FILE`
  (`dspark convert --to gguf`) `llama.cpp F16 draft`, ....

`--context` times prompts of 128 to 8,000 tokens, `--batch` 1 to 32 requests at once, `--servers`
this package's server and `llama-server` over HTTP (benchmarks/peer_servers.py). The last line is
JSON; `python -m benchmarks.peers_figure LINES.json OUT.png` draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

import dspark
from benchmarks.common import DTYPES, add_machine_options, emit, environment, model_path, say
from benchmarks.llama_cpp import Process, complete, free_port, server_command
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.checkpoints.gguf_writer import spec_flags
from dspark.engine.model import Model
from dspark.errors import UsageError
from dspark.request import Request, SamplingParams

OURS, OURS_DRAFT = "dspark", "dspark draft"
PEER, PEER_LOOKUP = "transformers", "transformers lookup"
LLAMA = "llama.cpp"
SIXTEEN_BITS = ("F16", "BF16")
LOOKUP_TOKENS = 7
CONTEXTS, BATCHES = (128, 512, 2048, 8000), (1, 2, 4, 8, 16, 32)
CONTEXT_TOKENS = 32
USERS = (1, 8, 32)


@dataclass(frozen=True)
class Timed:
    """One answer: its tokens, and the seconds of its prompt and of what follows the first token.

    Attributes:
        token_ids: the answer, without a token that ended it.
        prefill_s: until its first tokens are there.
        decoded: tokens after those.
        decode_s: their seconds.
        accepted_length: tokens gained per round; None where nothing is drafted.
    """

    token_ids: tuple[int, ...]
    prefill_s: float
    decoded: int
    decode_s: float
    accepted_length: float | None = None


Way = Callable[[Sequence[int], int], Timed]
"""(prompt ids, new tokens at most) -> the answer."""


def ours(model: Model, max_length: int, args: argparse.Namespace) -> Way:
    """This package's engine, one request at a time; no prompt is kept for the next."""
    few = Request((0,), SamplingParams(max_new_tokens=1, temperature=0.0))
    drafts = model.drafter is not None
    engine = model.engine(
        [few],
        batch_size=1,
        max_length=max_length,
        prefix_reuse=False,
        schedule=args.schedule if drafts else None,
        block_size=args.block_size if drafts else None,
    )

    def decode(prompt: Sequence[int], tokens: int) -> Timed:
        params = SamplingParams(max_new_tokens=tokens, temperature=0.0)
        started = time.perf_counter()
        engine.add(Request(tuple(prompt), params))
        first_s, seen = None, 0
        while engine.has_work:
            for event in engine.step():
                seen += len(event.pieces)
                if first_s is None and (event.pieces or event.output):
                    first_s = time.perf_counter() - started
                if event.output is not None:
                    output = event.output
        end_s, prompt_s = time.perf_counter() - started, first_s or 0.0
        stats = output.stats
        return Timed(
            _without_end(output.token_ids, model.target.eos_token_ids),
            prompt_s,
            len(output.token_ids) - 1,
            end_s - prompt_s,
            stats.accepted_length if drafts else None,
        )

    return decode


def transformers(model: Any, lookup: int | None, end_ids: frozenset[int]) -> Way:
    """Transformers' `generate`, `lookup` tokens drafted from the prompt where it is given."""

    def decode(prompt: Sequence[int], tokens: int) -> Timed:
        watch = _FirstToken()
        ids_1T = torch.tensor([list(prompt)], device=model.device)
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(end_ids),
            pad_token_id=min(end_ids),
            prompt_lookup_num_tokens=lookup,
        )
        with torch.inference_mode():
            out_1T = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                generation_config=config,
                stopping_criteria=[watch],
            )
        end = time.perf_counter()
        answer = out_1T[0, len(prompt) :].tolist()
        return Timed(
            _without_end(answer, end_ids),
            watch.at - watch.started,
            len(answer) - (watch.length - len(prompt)),
            end - watch.at,
        )

    return decode


class _FirstToken(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first tokens were there; stops nothing."""

    def __init__(self) -> None:
        self.started, self.at, self.length = time.perf_counter(), 0.0, 0

    def __call__(self, input_ids: torch.Tensor, _: Any, **__: Any) -> Any:
        if not self.length:
            self.at, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def llama(port: int, end_ids: frozenset[int]) -> Way:
    """A running `llama-server`."""

    def decode(prompt: Sequence[int], tokens: int) -> Timed:
        answer = complete(port, prompt, tokens)
        decoded = max(answer.generated - 1, 0)
        length = None
        if answer.drafted:
            length = decoded / max(decoded - answer.accepted, 1)
        ids = _without_end(answer.token_ids, end_ids)
        return Timed(ids, answer.prefill_s, decoded, answer.decode_s, length)

    return decode


def _without_end(ids: Sequence[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    return tuple(ids[:-1]) if ids and ids[-1] in end_ids else tuple(ids)


@dataclass
class Results:
    """Of one way: what it answered first, and its seconds, by prompt and repeat."""

    answers: list[Timed] = field(default_factory=list)
    repeats: list[list[Timed]] = field(default_factory=list)

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all prompts together, each with its median seconds."""
        seconds = sum(statistics.median(t.decode_s for t in runs) for runs in self.repeats)
        return sum(answer.decoded for answer in self.answers) / seconds if seconds else 0.0

    @property
    def prefill_s(self) -> float:
        """Likewise, of the prompts."""
        return sum(statistics.median(t.prefill_s for t in runs) for runs in self.repeats)

    def summary(self, prompt_tokens: int) -> dict[str, Any]:
        """What the JSON line says of it."""
        lengths = [a.accepted_length for a in self.answers if a.accepted_length is not None]
        said: dict[str, Any] = {
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "prefill_tokens_per_s": prompt_tokens / self.prefill_s if self.prefill_s else 0.0,
            "tokens": sum(len(answer.token_ids) for answer in self.answers),
        }
        return said | ({"accepted_length": statistics.fmean(lengths)} if lengths else {})


def in_turn(
    ways: Mapping[str, Way], prompts: Sequence[Sequence[int]], tokens: int, repeats: int
) -> dict[str, Results]:
    """Every way on every prompt, in turn; one short answer of each first, untimed."""
    names = list(ways)
    results = {name: Results() for name in names}
    for way in ways.values():
        way(prompts[0], min(tokens, 4))
    for i, prompt in enumerate(prompts):
        runs: dict[str, list[Timed]] = {name: [] for name in names}
        for repeat in range(repeats):
            turn = (i + repeat) % len(names)
            for name in names[turn:] + names[:turn]:
                runs[name].append(ways[name](prompt, tokens))
        for name, result in results.items():
            result.repeats.append(runs[name])
            result.answers.append(runs[name][0])
        speeds = ", ".join(f"{n} {r.decode_tokens_per_s:.1f}" for n, r in results.items())
        say(f"{i + 1} of {len(prompts)} prompts; tokens/s: {speeds}")
    return results


def ratios(speeds: Mapping[str, float]) -> dict[str, float]:
    """Ours over each peer's best, of the ways that were run."""
    plain = {n: s for n, s in speeds.items() if n.startswith(LLAMA)}
    groups = {
        "transformers": {n: s for n, s in speeds.items() if n == PEER},
        "llama.cpp F16 plain": {n: s for n, s in plain.items() if n == f"{LLAMA} F16"},
        "llama.cpp best of 16 bits": {
            n: s for n, s in plain.items() if n.split()[1] in SIXTEEN_BITS
        },
        "llama.cpp best": plain,
    }
    return {
        f"{mine} over {group}": speeds[mine] / max(others.values())
        for mine in (OURS, OURS_DRAFT)
        for group, others in groups.items()
        if mine in speeds and others and max(others.values()) > 0
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as lines of aligned columns, the names of their fields above."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [head, *([_shown(row.get(name)) for name in head] for row in rows)]
    first, *others = (max(len(line[i]) for line in cells) for i in range(len(head)))
    return "\n".join(
        "  ".join((line[0].ljust(first), *map(str.rjust, line[1:], others))) for line in cells
    )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# Loading


def load_ours(args: argparse.Namespace, draft: str | None) -> Model:
    """The target with a drafter ("none" for none).

    Raises:
        UsageError: this version's `load` lacks an option that was given.
    """
    extra = {n: v for n in ("weights", "quantize") if (v := getattr(args, n)) is not None}
    missing = set(extra) - set(inspect.signature(dspark.load).parameters)
    if missing:
        raise UsageError(f"dspark.load has no {min(missing)} in this version; leave it out.")
    options: dict[str, Any] = {"dtype": args.dtype or "auto", "offline": True, **extra}
    return dspark.load(args.model, draft, **options)


def draft_of(args: argparse.Namespace) -> str | None:
    """The drafter that the options name; None for plain decoding only."""
    if args.draft == "none":
        return None
    if args.draft is None and not (model_path(args.model) / "dspark").is_dir():
        return None
    return args.draft or str(model_path(args.model))


@contextlib.contextmanager
def llama_servers(
    args: argparse.Namespace, max_length: int, slots: int = 1
) -> Iterator[dict[str, int]]:
    """Ports of a `llama-server` for each GGUF file, and for each with the drafter."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports: dict[str, int] = {}
        for name, model in args.gguf.items() if args.llama_cpp else ():
            for draft in ([], *([llama_draft(args)] if args.gguf_draft else [])):
                port = free_port()
                command = server_command(
                    args.llama_cpp,
                    model,
                    port,
                    threads=args.threads,
                    context=max_length,
                    slots=slots,
                    draft=draft,
                )
                label = f"{LLAMA} {name}{' draft' if draft else ''}"
                say(f"starting {label}")
                stack.enter_context(Process(command, port, folder / f"{port}.log"))
                ports[label] = port
        yield ports


def llama_draft(args: argparse.Namespace) -> list[str]:
    """The options of llama.cpp's programs for our drafter."""
    flags = spec_flags(load_drafter(args.gguf_draft)).split()
    return ["-md", str(args.gguf_draft), *flags, "-td", str(args.threads)]


@contextlib.contextmanager
def all_ways(
    args: argparse.Namespace, max_length: int
) -> Iterator[tuple[dict[str, Way], Model, int]]:
    """Every way that the options ask for, the plain model of this package, the longest answer."""
    plain = load_ours(args, "none")
    max_length = min(max_length, plain.target.max_context)
    ends = frozenset(plain.target.eos_token_ids)
    ways = {OURS: ours(plain, max_length, args)}
    if (draft := draft_of(args)) is not None:
        ways[OURS_DRAFT] = ours(load_ours(args, draft), max_length, args)
    if not args.no_transformers:
        dtype = DTYPES[args.dtype or "float32"]
        path = model_path(args.model)
        peer = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        ways |= {PEER: transformers(peer, None, ends)}
        ways |= {PEER_LOOKUP: transformers(peer, LOOKUP_TOKENS, ends)}
    with llama_servers(args, max_length) as ports:
        ways |= {name: llama(port, ends) for name, port in ports.items()}
        yield ways, plain, max_length


# Modes


def prompts_of(model: Model, args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Held-out prompts of the three domains, in turn."""
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=0.0, seed=args.seed)
    sets = [domain_requests(model, args.data, d, args.prompts, params) for d in DOMAINS]
    return [request.prompt_ids for row in zip(*sets, strict=True) for request in row]


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    """One request at a time."""
    with all_ways(args, args.max_length) as (ways, plain, _):
        prompts = prompts_of(plain, args)
        results = in_turn(ways, prompts, args.max_new_tokens, args.repeats)
    rows = sum(map(len, prompts))
    first = results[OURS].answers
    ways_said = {}
    for name, result in results.items():
        same = [a.token_ids == b.token_ids for a, b in zip(first, result.answers, strict=True)]
        said = result.summary(rows) | {"same_as_dspark": sum(same) / len(same)}
        ways_said[name] = said
    speeds = {name: said["decode_tokens_per_s"] for name, said in ways_said.items()}
    print(table([{"way": name, **said} for name, said in ways_said.items()]))
    return {"prompts": len(prompts), "ways": ways_said, "ratios": ratios(speeds)}


def context(args: argparse.Namespace) -> dict[str, Any]:
    """Prompts of several lengths: seconds of the prompt, and tokens/s behind it."""
    wanted = max(args.lengths) + CONTEXT_TOKENS
    with all_ways(args, wanted) as (ways, plain, max_length):
        lengths = [n for n in args.lengths if n + CONTEXT_TOKENS <= max_length]
        text = [t for prompt in prompts_of(plain, args) for t in prompt]
        said: dict[str, dict[str, Any]] = {name: {} for name in ways}
        for length in lengths:
            prompt = (text * (1 + length // len(text)))[:length]
            for name, result in in_turn(ways, [prompt], CONTEXT_TOKENS, args.repeats).items():
                said[name][str(length)] = result.summary(length)
    rows = [
        {"way": name, **{n: row["decode_tokens_per_s"] for n, row in by_length.items()}}
        for name, by_length in said.items()
    ]
    print(table(rows))
    return {"context": said}


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Several requests at once, prompts included: tokens per second of all together."""
    plain = load_ours(args, "none")
    models = {OURS: plain}
    if (draft := draft_of(args)) is not None:
        models[OURS_DRAFT] = load_ours(args, draft)
    prompts = prompts_of(plain, args)
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=0.0)
    said: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in args.sizes:
        requests = [Request(prompts[i % len(prompts)], params) for i in range(size)]
        few = [replace(r, params=replace(params, max_new_tokens=4)) for r in requests]
        seconds: dict[str, list[float]] = {name: [] for name in models}
        tokens = dict.fromkeys(models, 0)
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                engine = model.engine(requests, batch_size=size, prefix_reuse=False)
                started = time.perf_counter()
                outputs = engine.run(requests if repeat else few)
                if repeat:  # the first run, a short one, is not counted
                    seconds[name].append(time.perf_counter() - started)
                    tokens[name] = sum(len(o.token_ids) for o in outputs)
        for name in models:
            said[name][str(size)] = tokens[name] / statistics.median(seconds[name])
        say(f"batch {size}: " + ", ".join(f"{n} {r[str(size)]:.1f}" for n, r in said.items()))
    print(table([{"way": name, **row} for name, row in said.items()]))
    return {"batch": said}


def servers(args: argparse.Namespace) -> dict[str, Any]:
    """This package's server and llama-server, over HTTP."""
    from benchmarks.peer_servers import compare

    plain = load_ours(args, "none")
    prompts = prompts_of(plain, args)
    del plain
    said = compare(args, prompts, draft_of(args))
    rows = [
        {"server": name, **{f"{u} users": row["tokens_per_s"] for u, row in by_users.items()}}
        for name, by_users in said.items()
    ]
    print(table(rows))
    found = {}
    for users in map(str, args.users):
        speeds = {name: row[users]["tokens_per_s"] for name, row in said.items()}
        found[users] = ratios(speeds)
    return {"servers": said, "ratios": found}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_machine_options(parser)
    add = parser.add_argument
    add("--model", default="bundled", help="target directory")
    add("--draft", help="drafter; none for plain only; default: the one attached")
    add("--weights", help="passed to dspark.load")
    add("--quantize", help="passed to dspark.load")
    add("--schedule", default="fixed", help="of the drafter")
    add("--block-size", type=int, help="drafts a round; default: the drafter's own")
    add("--data", type=Path, default=Path("../shared/data"), help="folder of prompts")
    add("--prompts", type=int, default=4, help="per domain")
    add("--max-new-tokens", type=int, default=128)
    add("--max-length", type=int, default=1024, help="of prompt and answer; --context has its own")
    add("--repeats", type=int, default=3)
    add("--no-transformers", action="store_true", help="leave transformers out")
    add("--llama-cpp", type=Path, metavar="BIN_DIR", help="folder of llama.cpp's programs")
    add("--gguf", action="append", default=[], metavar="TYPE=FILE", help="the target; repeatable")
    add("--gguf-draft", type=Path, metavar="FILE", help="our drafter for llama.cpp")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--context", action="store_true", help="vary the prompt's length")
    mode.add_argument("--batch", action="store_true", help="vary the requests at once")
    mode.add_argument("--servers", action="store_true", help="over HTTP, with several users")
    add("--lengths", type=int, nargs="+", default=CONTEXTS, help="of --context")
    add("--sizes", type=int, nargs="+", default=BATCHES, help="of --batch")
    add("--users", type=int, nargs="+", default=USERS, help="of --servers")
    add("--requests", type=int, default=4, help="per user, of --servers")
    args = parser.parse_args()
    try:
        args.gguf = {name: Path(path) for name, path in (g.split("=", 1) for g in args.gguf)}
    except ValueError:
        parser.error("--gguf takes TYPE=FILE, as in --gguf F16=model-F16.gguf")
    if bool(args.gguf) != bool(args.llama_cpp):
        parser.error("--llama-cpp and --gguf need each other")
    if args.gguf_draft and not args.gguf:
        parser.error("--gguf-draft needs --llama-cpp and --gguf")
    return args


def main() -> None:
    """Run the measurement."""
    args = options()
    torch.set_num_threads(args.threads)
    mode = next((m for m in (context, batch, servers) if getattr(args, m.__name__)), decoding)
    found = mode(args)
    settings = ("model", "draft", "weights", "quantize", "schedule", "max_new_tokens", "repeats")
    said = {name: getattr(args, name) for name in settings}
    emit(
        "peers",
        environment(DTYPES[args.dtype or "float32"]),
        {"mode": mode.__name__, "settings": said, **found},
    )


if __name__ == "__main__":
    main()
