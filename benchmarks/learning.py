"""Learning while serving under drift: a drafter of one domain serves the traffic of another.

A small DSpark drafter is trained on answers in one domain (`--before`) and serves closed-loop
traffic of another (`--after`) at temperature 0, with `--learn drafter`. Reported are its accepted
length over the traffic, and that of three drafters on held-out prompts of the new domain: the one
it began with, the one that was learned, and one trained on that domain beforehand for as many
steps as the first. Every answer whose decoding saw a swap, and as many others, must be plain
decoding's. While the server catches up with what it has gathered, the trainer is called in between.
How much throughput it costs as a process is measured apart, `--throughput-s` seconds in all: two
engines with the learned drafter serve by turns, one that goes on learning and one that does not,
beside which the trainer's process is stopped.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from benchmarks.common import (
    add_machine_options,
    emit,
    environment,
    model_path,
    say,
    settings_of,
)
from benchmarks.feature_cache import CORPUS, train_one, write_answers, write_recipe
from benchmarks.identity import differences
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.data.corpus import read_source
from dspark.engine.engine import Engine
from dspark.engine.loading import load, load_draft
from dspark.engine.model import Model
from dspark.request import Output, Request, SamplingParams, merge_stats
from dspark.serving.learning.directory import DEFAULT_SHARE, LearningDirectory
from dspark.serving.learning.learner import Learner, resume
from dspark.serving.learning.trainer import Trainer

RECOVERED, COST = 0.9, 0.1


def domain_traffic(model: Model, args: argparse.Namespace, domain: str) -> Iterator[Request]:
    """Prompts of a domain's training corpus, without end, all of them consenting."""
    kind, name = CORPUS[domain]
    conversations = list(read_source(kind, args.data / "corpus" / name))  # type: ignore[arg-type]
    random.Random(f"{domain} {args.seed}").shuffle(conversations)
    while True:
        for messages in conversations:
            asked = list(messages)
            while asked and asked[-1]["role"] != "user":
                asked.pop()
            ids = model.encode(asked) if asked else ()
            if ids and len(ids) + args.answer_tokens <= args.max_length:
                yield Request(ids, SamplingParams(args.answer_tokens), learn=True)


def trained(model: Model, args: argparse.Namespace, domain: str, folder: Path) -> Path:
    """A drafter of one domain."""
    place = folder / domain
    place.mkdir()
    traffic = domain_traffic(model, args, domain)
    requests = [next(traffic) for _ in range(args.train_prompts)]
    write_answers(model, requests, place / "train.jsonl", args.users)
    return train_one(write_recipe(model, args, place), [], args.seed, place, "drafter")


def held_out_length(model: Model, drafter: Path, requests: Sequence[Request], users: int) -> float:
    """Accepted length by decoding."""
    pair = load_draft(model.target, drafter)
    engine = pair.engine(requests, batch_size=users, schedule="fixed", strict=True)
    return merge_stats(engine.run(requests)).accepted_length


@dataclass
class Serving:
    """A learning engine under closed-loop traffic, without HTTP.

    Attributes:
        engine: at work.
        learner: its learner; None serves without.
        traffic: requests to come.
        users: requests in flight.
        asked: of every request sent, by its number.
        outputs: of those that have ended.
        across: numbers of those that were running at a swap.
        tokens: committed.
    """

    engine: Engine
    learner: Learner | None
    traffic: Iterator[Request]
    users: int
    asked: dict[int, Request] = field(default_factory=dict)
    outputs: dict[int, Output] = field(default_factory=dict)
    across: set[int] = field(default_factory=set)
    tokens: int = 0
    _orders: SimpleQueue[Callable[[Engine], None]] = field(default_factory=SimpleQueue)

    def start(self) -> None:
        """Begin to learn."""
        if self.learner is not None:
            self.engine.watch(self.learner.collector.note)
            self.engine.collect(self.learner.collector)
            self.learner.start(self._orders.put)

    def step(self) -> list[Output]:
        """One step of the engine, and whatever has been ordered before it."""
        drafter = self.engine.drafter
        try:
            while True:
                self._orders.get_nowait()(self.engine)
        except Empty:
            pass
        open_ = set(self.asked) - set(self.outputs)
        if self.engine.drafter is not drafter:
            self.across |= open_
        for _ in range(self.users - len(open_)):
            request = next(self.traffic)
            if self.learner is not None:
                request = self.learner.collector.admit(request)
            self.asked[self.engine.add(request)] = request
        ended = []
        for event in self.engine.step():
            self.tokens += len(event.pieces)
            if event.output is not None:
                self.outputs[event.request_id] = event.output
                ended.append(event.output)
        return ended

    def finish(self) -> None:
        """Let all answers end."""
        while self.engine.has_work:
            for event in self.engine.step():
                if event.output is not None:
                    self.outputs[event.request_id] = event.output


def opened(model: Model, args: argparse.Namespace) -> Engine:
    """The engine of a server."""
    return model.open_engine(max_requests=args.users, max_length=args.max_length, schedule="fixed")


def drift(
    model: Model, before: Path, directory: Path, args: argparse.Namespace
) -> tuple[Serving, Learner, list[dict[str, Any]]]:
    """Serve drifted traffic; the accepted length of each window of answers."""
    pair = load_draft(model.target, before)
    found = resume(pair, str(directory), "drafter")
    plan = found.plan()
    assert plan is not None
    found.write_plan(
        replace(
            plan,
            max_length=args.max_length,
            steps=args.learn_steps,
            anchors=args.anchors,
            fresh_tokens=args.window * args.answer_tokens,
        )
    )
    engine = opened(pair, args)
    learner = Learner(found, engine, trains=False)
    learner.collector.most = args.users
    serving = Serving(engine, learner, domain_traffic(model, args, args.after), args.users)
    serving.start()
    trainer = Trainer(found)
    curve: list[dict[str, Any]] = []
    for window in range(args.windows):
        ended = list[Output]()
        while len(ended) < args.window:
            ended += serving.step()
        learner.flush()
        seconds = time.process_time()
        while trainer.advance():
            pass
        state = trainer.state
        learner.flush()
        curve.append(
            {
                "answers": (window + 1) * args.window,
                "accepted_length": merge_stats(ended).accepted_length,
                "drafter": state.generation,
                "steps": state.steps,
                "samples": learner.progress.samples,
                "trainer_cpu_s": time.process_time() - seconds,
            }
        )
        say(f"window {window + 1}: {curve[-1]}")
    serving.finish()
    learner.stop()
    return serving, learner, curve


def identity(model: Model, serving: Serving, others: int) -> dict[str, Any]:
    """Answers of requests that saw a swap, and of others, beside plain decoding."""
    rest = [number for number in serving.outputs if number not in serving.across]
    chosen = sorted(serving.across & set(serving.outputs)) + rest[:: max(len(rest) // others, 1)]
    requests = [replace(serving.asked[number], learn=False) for number in chosen]
    plain = Model(model.target).engine(requests, batch_size=serving.users)
    expected = plain.run(requests)
    parted = differences(
        model.target, requests, expected, [serving.outputs[number] for number in chosen]
    )
    return {
        "across_a_swap": len(serving.across & set(serving.outputs)),
        "compared": len(chosen),
        "identical": len(chosen) - len(parted),
        "differences": parted,
        "ok": all(each["tolerated"] for each in parted),
    }


def throughput(
    model: Model, before: Path, directory: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second with the trainer's process beside the engine, and without learning."""
    pair = load_draft(model.target, before)
    found = resume(pair, str(directory), "drafter", args.share)
    engine = opened(pair, args)
    learner = Learner(found, engine)
    traffic = domain_traffic(model, args, args.after)
    learning = Serving(engine, learner, traffic, args.users)
    plain = Serving(opened(pair, args), None, traffic, args.users)
    learning.start()
    warm = time.perf_counter() + args.warm_s  # the trainer's process loads and begins
    while time.perf_counter() < warm:
        learning.step()
        plain.step()
    pid, begun = learner.trainer_pid, replace(learner.progress)
    if pid is None:
        raise SystemExit("The trainer does not run; its log says why.")
    try:
        speeds, shares = _by_turns(learning, plain, pid, args)
    finally:
        os.kill(pid, signal.SIGCONT)
    ended = replace(learner.progress)
    learner.stop()
    costs = [1 - a / b for a, b in zip(speeds[True], speeds[False], strict=True)]
    cost = 1 - statistics.fmean(speeds[True]) / statistics.fmean(speeds[False])
    return {
        "learning": speeds[True],
        "not_learning": speeds[False],
        "cost": cost,
        "costs": costs,
        "standard_error": statistics.stdev(costs) / len(costs) ** 0.5 if len(costs) > 1 else None,
        "trainer_share": statistics.fmean(shares),
        "steps": ended.state.steps - begun.state.steps,
        "swaps": ended.swaps - begun.swaps,
        "reached": cost <= COST,
    }


def _by_turns(
    learning: Serving, plain: Serving, pid: int, args: argparse.Namespace
) -> tuple[dict[bool, list[float]], list[float]]:
    """Tokens a second of both sides, and the trainer's share of a core where it works.

    What it owes in rests passes while it is stopped, so its share here is above the one asked for,
    and so is what it costs.
    """
    speeds = {True: list[float](), False: list[float]()}
    shares = list[float]()
    for turn in range(2 * max(round(args.throughput_s / args.turn_s / 2), 1)):
        learns = turn % 4 in (0, 3)
        os.kill(pid, signal.SIGCONT if learns else signal.SIGSTOP)
        side = learning if learns else plain
        started, tokens, worked = time.perf_counter(), side.tokens, cpu_s(pid)
        while (spent := time.perf_counter() - started) < args.turn_s:
            side.step()
        speeds[learns].append((side.tokens - tokens) / spent)
        shares += [(cpu_s(pid) - worked) / spent] if learns else []
        say(f"{'learning' if learns else 'not learning'}: {speeds[learns][-1]:.1f} tokens/s")
    return speeds, shares


def cpu_s(pid: int) -> float:
    """Seconds of the processor that a process has taken (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(model: Model, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything in turn, or what it costs alone where the folder has what was learned."""
    found = dict[str, Any]()
    first = folder / args.before / f"drafter-{args.seed}"
    if not (folder / "learned").is_dir():
        domains = (args.before, args.after)
        drafters = {domain: trained(model, args, domain, folder) for domain in domains}
        say("both drafters are trained")
        found = recovery(model, drafters, folder, args)
        first = drafters[args.before]
    if args.throughput_s:
        found["throughput"] = throughput(model, first, folder / "learned", args)
    return found


def recovery(
    model: Model, drafters: dict[str, Path], folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """How far acceptance recovers, and whether outputs stay."""
    first, reference = drafters[args.before], drafters[args.after]
    serving, _, curve = drift(model, first, folder / "learned", args)
    params = SamplingParams(max_new_tokens=args.answer_tokens, seed=args.seed)
    asked = domain_requests(model, args.data, args.after, args.prompts, params)
    directory = LearningDirectory(folder / "learned")
    state = directory.state()
    learned = directory.drafter(state.generation)
    lengths = {
        name: held_out_length(model, place, asked, args.users)
        for name, place in (("before", first), ("learned", learned), ("trained", reference))
    }
    say(f"held-out accepted lengths: {lengths}")
    gap = lengths["trained"] - lengths["before"]
    ratio = lengths["learned"] / lengths["trained"]
    return {
        "curve": curve,
        "held_out": lengths,
        "of_trained": ratio,
        "of_trained_before": lengths["before"] / lengths["trained"],
        "gap_closed": (lengths["learned"] - lengths["before"]) / gap if gap else None,
        "recovered": ratio >= RECOVERED,
        "swaps": state.newest,
        "rejected": state.rejected,
        "rollbacks": state.rollbacks,
        "steps": state.steps,
        "identity": identity(model, serving, args.others),
    }


def main() -> None:
    """Show that learning while serving recovers from drift, exactly and at little cost."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_machine_options(parser)
    parser.add_argument("--model", default="bundled", help="target directory")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--before", choices=DOMAINS, default="code", help="the drafter's domain")
    parser.add_argument("--after", choices=DOMAINS, default="gsm8k", help="the traffic's domain")
    parser.add_argument("--steps", type=int, default=200, help="of the two drafters' training")
    parser.add_argument("--learn-steps", type=int, default=40, help="before a candidate is judged")
    parser.add_argument("--rows", type=int, default=8, help="samples per step")
    parser.add_argument("--anchors", type=int, default=24, help="blocks per sample")
    parser.add_argument("--draft-layers", type=int, default=1)
    parser.add_argument("--train-prompts", type=int, default=100, help="of the two trainings")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a request")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--window", type=int, default=32, help="answers between trainings")
    parser.add_argument("--users", type=int, default=8, help="requests in flight")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts")
    parser.add_argument("--others", type=int, default=24, help="answers compared that saw no swap")
    parser.add_argument("--throughput-s", type=float, default=120.0, help="0 leaves it out")
    parser.add_argument("--turn-s", type=float, default=5.0, help="of each turn")
    parser.add_argument("--warm-s", type=float, default=10.0, help="before the first turn")
    parser.add_argument("--share", type=float, default=DEFAULT_SHARE, help="of the trainer")
    parser.add_argument(
        "--folder", type=Path, help="keep everything here; throughput alone is measured again"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(str(model_path(args.model)), "none", device="cpu", dtype="float32", offline=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(model, args, args.folder or Path(folder))
    found["minutes"] = (time.perf_counter() - started) / 60
    del args.folder
    emit("learning", environment(model.target.dtype), {"settings": settings_of(args), **found})


if __name__ == "__main__":
    main()
