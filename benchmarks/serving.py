"""Does the server lose a request, change one, leak, or cost throughput?

Clients in a process of their own keep streams of a real server busy: prompts and answers of mixed
lengths at temperature 0, a part of the clients leaving at a random moment. Before, the bare engine
decodes the very same requests in a closed loop of as many users; every answer over HTTP must be,
text for text, what it gave. Where one is not, `differing` tells how far apart the two likeliest
tokens were at the first difference: rounding in another batch decides near-ties otherwise, which
`--batch-invariant` rules out. Then:

* overhead: the server's seconds, over HTTP, against the bare engine's, for the same tokens. The
  generator's own CPU time is told, and subtracted from the server's time for the second figure:
  with fewer cores than busy threads it takes that from the server. Both are repeated in turn, and
  medians count. With fewer places than users (`--running`) the rest waits in the engine's queue,
  on both sides, so that batches are always full.
  `cpu_overhead` holds the CPU time of the process with the server against that of the bare
  engine, which other work on the machine disturbs less; steps tell whether batches were as full.
* memory of the server's process after each tenth of the requests. Growth counts from the middle
  of the run: before, the allocator's heap grows until it has room for tensors of every size that
  come (docs/LOG.md), the sooner the more requests there are; what leaks goes on growing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import resource
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.common import add_options, emit, environment, load_pair, say
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.request import Output, Request, SamplingParams
from dspark.serving.context import Settings
from dspark.serving.server import Server, bind
from dspark.serving.service import EngineService

QUESTIONS = (
    "What does the command `{}` do?",
    "Show me common usages of `{}`.",
    "Hi, I want to book a table for {} at an Italian restaurant.",
    "Tom has {} apples and buys 4 more. How many apples has he now?",
)
WORDS = ("tar", "ls", "grep", "two", "three", "7", "12", "find", "sed", "curl", "git", "five")
MOST_OVERHEAD, MOST_GROWTH = 0.05, 0.05


@dataclass(frozen=True)
class Ask:
    """One request of a client.

    Attributes:
        prompt: token ids.
        tokens: new tokens at most.
        leaves: after how many events of its stream the client leaves; None to stay.
    """

    prompt: tuple[int, ...]
    tokens: int
    leaves: int | None


@dataclass
class Heard:
    """What a client got.

    Attributes:
        text: of the answer.
        finished: whether its stream ended as it should.
        first_s: from the request to its first text.
        left: whether the client left before the end.
    """

    text: str = ""
    finished: bool = False
    first_s: float | None = None
    left: bool = False


def asks_of(model: Model, args: argparse.Namespace) -> list[Ask]:
    """Mixed requests, from the seed."""
    rng, found = random.Random(args.seed), []
    for _ in range(args.requests):
        lines = rng.choices(QUESTIONS, k=rng.choice((1, 1, 1, 2, 5)))
        text = " ".join(line.format(rng.choice(WORDS)) for line in lines)
        leaves = rng.randint(1, 6) if rng.random() < args.leaving else None
        tokens = rng.randint(args.max_new_tokens // 8, args.max_new_tokens)
        found.append(Ask(model.encode(text, raw=False), tokens, leaves))
    return found


def request_of(ask: Ask) -> Request:
    """The same for the engine."""
    return Request(ask.prompt, SamplingParams(ask.tokens))


def open_engine(model: Model, args: argparse.Namespace) -> Engine:
    """An engine for the load."""
    return model.open_engine(
        max_requests=args.running or args.users,
        max_queue=args.users,
        max_length=512,
        schedule=args.schedule,
        cache_tokens=args.users * 256,
    )


def bare(engine: Engine, asks: Sequence[Ask], users: int) -> tuple[list[Output], float]:
    """The same closed loop without a server: answers and seconds."""
    waiting, alive = deque(range(len(asks))), dict[int, int]()
    outputs = dict[int, Output]()
    started = time.perf_counter()
    while waiting or alive:
        while waiting and len(alive) < users:
            index = waiting.popleft()
            alive[engine.add(request_of(asks[index]), live=True)] = index
        for event in engine.step():
            if event.output is not None:
                outputs[alive.pop(event.request_id)] = event.output
    return [outputs[index] for index in range(len(asks))], time.perf_counter() - started


class Client:
    """Asks one question after the other over a connection that it keeps until it leaves early.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, ask: Ask) -> Heard:
        """Ask, and read the stream to its end or up to where the client leaves."""
        heard = Heard()
        body = {"prompt": list(ask.prompt), "max_tokens": ask.tokens, "stream": True}
        data = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        started = time.perf_counter()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(head.encode() + data)
        events = 0
        async for line in reader:
            if line == b"0\r\n":  # the last chunk; an empty line ends it
                await reader.readline()
                return heard
            if not line.startswith(b"data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            if choice["text"] and heard.first_s is None:
                heard.first_s = time.perf_counter() - started
            heard.text += choice["text"]
            heard.finished = choice["finish_reason"] in ("stop", "length")
            events += 1
            if ask.leaves is not None and events >= ask.leaves and not heard.finished:
                heard.left = True
                break
        self.close()
        return heard

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def crowd(port: int, asks: Sequence[Ask], users: int, told: Connection) -> list[Heard]:
    """All asks, `users` of them at once; tells after each tenth."""
    waiting, heard = deque(range(len(asks))), [Heard() for _ in asks]
    tenth, done = max(1, len(asks) // 10), 0

    async def client() -> None:
        nonlocal done
        with contextlib.closing(Client(port)) as line:
            while waiting:
                index = waiting.popleft()
                heard[index] = await line.ask(asks[index])
                done += 1
                if done % tenth == 0:
                    told.send(("done", done))

    await asyncio.gather(*(client() for _ in range(users)))
    return heard


def generator(pipe: Connection) -> None:
    """The clients' process: a job after the other, until None."""
    while (job := pipe.recv()) is not None:
        port, asks, users = job
        before = resource.getrusage(resource.RUSAGE_SELF)
        started = time.perf_counter()
        heard = asyncio.run(crowd(port, asks, users, pipe))
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        pipe.send(("heard", heard, seconds, cpu_s))


class Load:
    """A server in this process, and clients in another.

    Args:
        engine: for the server.
        users: streams at once.
    """

    def __init__(self, engine: Engine, users: int) -> None:
        self.engine = engine
        self.users = users
        settings = Settings("bench", drain_s=5.0)
        self.server, self._socket = Server(EngineService(engine), settings), bind("127.0.0.1", 0)
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],))
        self._thread.start()
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._clients = context.Process(target=generator, args=(other,))
        self._clients.start()
        while not self.server.started:
            time.sleep(0.01)

    def run(self, asks: Sequence[Ask]) -> tuple[list[Heard], float, float, list[int]]:
        """Have asks asked: what was heard, seconds, the generator's CPU seconds, memory."""
        memory = list[int]()
        self._pipe.send((self._socket.getsockname()[1], list(asks), self.users))
        while (message := self._pipe.recv())[0] == "done":
            memory.append(resident_bytes())
            say(f"{message[1]} of {len(asks)} requests, {memory[-1] / 2**20:.0f} MiB")
        return message[1], message[2], message[3], memory

    def close(self) -> None:
        """Stop both."""
        self._pipe.send(None)
        self._clients.join()
        self.server.should_exit = True
        self._thread.join()
        self._socket.close()


def resident_bytes() -> int:
    """What this process holds, as it is: a collection of garbage would take the server's time."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def gap_at(engine: Engine, ask: Ask, output: Output, heard: str) -> dict[str, Any]:
    """How far apart the two likeliest tokens are where a text leaves the bare engine's.

    Args:
        engine: idle.
        ask: the question.
        output: the bare engine's answer.
        heard: another answer to it.

    Returns:
        The place of the first differing token and the difference of log-probabilities there.
    """
    tokenizer, ids = engine.target.tokenizer, output.token_ids
    place = 0
    while place < len(ids) and heard.startswith(tokenizer.decode(ids[: place + 1])):
        place += 1
    prompt = (*ask.prompt, *ids[:place])
    number = engine.add(Request(prompt, SamplingParams(1, logprobs=2)))
    found = None
    while found is None:
        found = next((e.output for e in engine.step() if e.request_id == number), None)
    assert found.logprobs is not None
    (_, best), (_, second) = found.logprobs[0].top
    return {"token": place, "gap": best - second}


def differences(
    engine: Engine, asks: Sequence[Ask], heard: Sequence[Heard], outputs: Sequence[Output]
) -> list[dict[str, Any]]:
    """The complete answers that are not the bare engine's; an idle engine looks into them."""
    found = zip(asks, heard, outputs, strict=True)
    return [
        {"request": i, **gap_at(engine, ask, output, each.text)}
        for i, (ask, each, output) in enumerate(found)
        if each.finished and each.text != output.text
    ]


def judge(asks: Sequence[Ask], heard: Sequence[Heard], texts: Sequence[str]) -> dict[str, Any]:
    """What became of the requests."""
    stayed = [i for i, each in enumerate(heard) if not each.left]
    first = [h.first_s for h in heard if h.first_s is not None]
    prefix = sum(h.left and not texts[i].startswith(h.text) for i, h in enumerate(heard))
    return {
        "requests": len(asks),
        "left": len(asks) - len(stayed),
        "complete": sum(heard[i].finished for i in stayed),
        "identical": sum(heard[i].text == texts[i] for i in stayed),
        "lost": sum(not heard[i].finished for i in stayed),
        "wrong_before_leaving": prefix,
        "first_token_s": {"p50": quantile(first, 0.5), "p95": quantile(first, 0.95)},
    }


def overhead(
    model: Model, load: Load, asks: Sequence[Ask], args: argparse.Namespace
) -> dict[str, Any]:
    """The server against the bare engine, in turn; nobody leaves."""
    staying = [replace(ask, leaves=None) for ask in asks]
    names = (
        "bare",
        "server",
        "generator_cpu",
        "bare_cpu",
        "server_cpu",
        "bare_steps",
        "server_steps",
    )
    ways: dict[str, list[float]] = {name: [] for name in names}
    engine, tokens = open_engine(model, args), 0
    for repeat in range(args.repeats):
        engine.memory.pool.evict_all()
        before = time.process_time(), _steps(engine)
        outputs, seconds = bare(engine, staying, args.users)
        tokens = sum(len(output.token_ids) for output in outputs)
        ways["bare"].append(seconds)
        ways["bare_cpu"].append(time.process_time() - before[0])
        ways["bare_steps"].append(_steps(engine) - before[1])
        load.engine.memory.pool.evict_all()
        before = time.process_time(), _steps(load.engine)
        _, seconds, cpu_s, _ = load.run(staying)
        ways["server"].append(seconds)
        ways["generator_cpu"].append(cpu_s)
        ways["server_cpu"].append(time.process_time() - before[0])
        ways["server_steps"].append(_steps(load.engine) - before[1])
        say(f"repeat {repeat + 1}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in ways.items()))
    medians = {name: statistics.median(values) for name, values in ways.items()}
    raw = [s / b - 1 for s, b in zip(ways["server"], ways["bare"], strict=True)]
    net = [
        (s - c) / b - 1
        for s, c, b in zip(ways["server"], ways["generator_cpu"], ways["bare"], strict=True)
    ]
    return {
        "requests": len(staying),
        "tokens": tokens,
        "bare_tokens_per_s": tokens / medians["bare"],
        "server_tokens_per_s": tokens / medians["server"],
        "generator_cpu_s": medians["generator_cpu"],
        "overhead_with_generator": statistics.median(raw),
        "overhead": statistics.median(net),
        "cpu_overhead": medians["server_cpu"] / medians["bare_cpu"] - 1,
        "steps": {name: medians[f"{name}_steps"] for name in ("bare", "server")},
        "overheads": net,
    }


def _steps(engine: Engine) -> int:
    return engine.clock.steps + engine.clock.prefills


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--users", type=int, default=64, help="streams at once")
    parser.add_argument("--running", type=int, help="of them in the engine's batch; default: all")
    parser.add_argument("--leaving", type=float, default=0.1, help="share of clients that leave")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of the longest answers")
    parser.add_argument("--schedule", default="fixed", help="fixed needs no profile")
    parser.add_argument("--batch-invariant", action="store_true", help="no near-ties")
    parser.add_argument("--overhead-requests", type=int, default=512, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="of server and bare engine in turn")
    return parser.parse_args()


def main() -> None:
    """Run it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    model = load_pair(args.model, args.dtype or "float32", batch_invariant=args.batch_invariant)
    asks = asks_of(model, args)
    say(f"decoding {len(asks)} requests without a server")
    alone = open_engine(model, args)
    outputs, seconds = bare(alone, asks, args.users)
    say(f"that took {seconds:.0f} s; now over HTTP")
    load = Load(open_engine(model, args), args.users)
    try:
        heard, seconds, cpu_s, memory = load.run(asks)
        result = judge(asks, heard, [output.text for output in outputs])
        result["differing"] = differences(alone, asks, heard, outputs)
        idle = load.server.service.snapshot()
        result |= {"seconds": seconds, "generator_cpu_s": cpu_s}
        result |= {"held_pages_when_idle": idle.pages_held, "running_when_idle": idle.running}
        result["mebibytes"] = [bytes_ / 2**20 for bytes_ in memory]
        result["growth"] = memory[-1] / memory[len(memory) // 2] - 1
        result["overhead"] = overhead(model, load, asks[: args.overhead_requests], args)
    finally:
        load.close()
    stayed = result["requests"] - result["left"]
    result["reached"] = {
        "none_lost": result["lost"] == 0 and result["complete"] == stayed,
        "all_identical": result["identical"] == stayed and not result["wrong_before_leaving"],
        "memory_flat": result["growth"] <= MOST_GROWTH,
        "overhead": result["overhead"]["overhead"] <= MOST_OVERHEAD,
    }
    emit("serving", environment(model.target.dtype), result)


if __name__ == "__main__":
    main()
