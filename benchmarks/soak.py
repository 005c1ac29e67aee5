"""Do pages or memory leak while thousands of requests come, end and are cancelled?

The cache is too small for all that run. Random prompts of random lengths, many with a shared
beginning, greedy and sampled, a third of them cancelled at a random moment, some before they ran.
After every thousand the engine is idle: then no page may be held, the pool must prove itself, and
the process's memory is noted. The memory of the first thousand is warm-up; growth after it is a
leak.
"""

from __future__ import annotations

import argparse
import gc
import random
import time

import torch

from benchmarks.common import add_options, emit, environment, load_pair, say
from dspark.engine.engine import Engine
from dspark.engine.speculation.schedule import SCHEDULES, Schedule
from dspark.request import Request, SamplingParams


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--cancelled", type=float, default=0.3, help="share of requests")
    parser.add_argument("--max-requests", type=int, default=16, help="at once")
    parser.add_argument("--cache-tokens", type=int, default=2048)
    parser.add_argument("--schedule", choices=SCHEDULES[:3], default="fixed")
    parser.add_argument("--every", type=int, default=1000, help="requests between two looks")
    return parser.parse_args()


def resident_bytes(device: torch.device) -> int:
    """What the process holds: on the device, or of the host's memory."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Traffic:
    """Random requests, from a seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.vocab_size = vocab_size
        self.starts = [self.tokens(80) for _ in range(5)]

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(self.vocab_size) for _ in range(count)]

    def request(self) -> Request:
        start = self.random.choice(self.starts)[: self.random.randint(0, 80)]
        params = SamplingParams(
            self.random.randint(1, 40),
            temperature=self.random.choice((0.0, 0.7, 1.0)),
            seed=self.random.randrange(2**31),
        )
        return Request((*start, *self.tokens(self.random.randint(1, 30))), params)


def drive(engine: Engine, traffic: Traffic, count: int, share: float) -> dict[str, int]:
    """Run `count` requests to their ends; what became of them."""
    waiting, alive, doomed = count, dict[int, int](), 0
    counts = {"finished": 0, "cancelled": 0, "tokens": 0}
    step = 0
    while waiting or engine.has_work:
        for _ in range(min(waiting, traffic.random.randint(0, 4) if len(alive) < 40 else 0)):
            number, waiting = engine.add(traffic.request()), waiting - 1
            # A request that is to be cancelled is so after a few steps, unless it has ended.
            doomed = traffic.random.random() < share
            alive[number] = step + traffic.random.randint(0, 12) if doomed else -1
        for number in [n for n, when in alive.items() if 0 <= when <= step]:
            del alive[number]
            output = engine.cancel(number)
            assert output is not None
            counts["cancelled"] += 1
            counts["tokens"] += len(output.token_ids)
        for event in engine.step():
            if event.output is not None:
                del alive[event.request_id]
                counts["finished"] += 1
                counts["tokens"] += len(event.output.token_ids)
        step += 1
    return counts


def main() -> None:
    """Run it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    model = load_pair(args.model, args.dtype or "float32")
    engine = Engine(
        model.target,
        model.drafter,
        max_requests=args.max_requests,
        cache_tokens=args.cache_tokens,
        schedule=Schedule(args.schedule),
    )
    traffic = Traffic(model.target.vocab_size, args.seed)
    total = {"finished": 0, "cancelled": 0, "tokens": 0}
    memory, held = list[int](), 0
    started = time.perf_counter()
    while sum(total[name] for name in ("finished", "cancelled")) < args.requests:
        for name, number in drive(engine, traffic, args.every, args.cancelled).items():
            total[name] += number
        engine.memory.check()
        held += engine.memory.pool.in_use
        memory.append(resident_bytes(model.target.device))
        say(f"{total} held pages {held}, {memory[-1] / 2**20:.1f} MiB")
    emit(
        "soak",
        environment(model.target.dtype),
        {
            **total,
            "seconds": time.perf_counter() - started,
            "preemptions": engine.roster.preemptions,
            "hit_tokens": engine.memory.pool.hit_tokens,
            "pages": engine.memory.pool.pages,
            "held_pages_when_idle": held,
            "mebibytes": [bytes_ / 2**20 for bytes_ in memory],
            "growth_after_warm_up": memory[-1] / memory[0] - 1,
        },
    )


if __name__ == "__main__":
    main()
