"""500 requests over every parameter, mixed freely: each is reproducible alone by its seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from dspark.scheduling.protection import Protection
from dspark.scheduling.step_times import StepTimes

PER_SETTING, LENGTH = 100, 40


def lagged(drafter):
    """A schedule whose lengths hang on the load: each request costs as much as eight rows."""
    points = tuple(
        CostPoint(tokens, requests, 4.0 + 0.1 * tokens, 0.4)
        for requests in (1, 2, 4, 8)
        for tokens in sorted({requests, 2 * requests, 3 * requests, 6 * requests})
    )
    costs = CostTable(points, MachineKey("test", 1, "float64", "tiny", "tiny"))
    schedule = Schedule("lagged")
    return Scheduler(schedule, "coupled", drafter.block_size, Calibration(), costs)


SETTINGS = {
    "token, fixed, dspark": ("token", lambda _: Schedule("fixed")),
    "block, threshold, markov": ("block", lambda _: Schedule("threshold", 0.5)),
    "block, fixed, eagle3": ("block", lambda _: Schedule("fixed")),
    "token, off, dspark": ("token", lambda _: Schedule("off")),
    "coupled, lagged, markov": ("coupled", lagged),
}


@dataclass(frozen=True)
class Hashed:
    """Forbids some tokens, others after every prefix; and from `fails` tokens on goes wrong."""

    vocab: int
    salt: int
    fails: int

    def allowed(self, output_ids):
        if len(output_ids) >= self.fails:
            raise RuntimeError("no more")
        mixed = (self.salt * 31 + sum(output_ids) * 7 + len(output_ids)) % 1009
        return np.arange(mixed, mixed + self.vocab) * 37 % 11 > 3


def some_request(dice: random.Random, vocab: int) -> Request:
    """Every parameter is at work in some requests, and left alone in others."""

    def often(share, value, otherwise):
        return value() if dice.random() < share else otherwise

    letters = "abcdefghijklmnopqrstuvwxyz \n"
    params = SamplingParams(
        max_new_tokens=dice.randint(1, 14),
        temperature=often(0.75, lambda: dice.choice((0.3, 0.8, 1.0, 1.7)), 0.0),
        top_k=often(0.3, lambda: dice.randint(1, 50), 0),
        top_p=often(0.3, lambda: dice.uniform(0.3, 1.0), 1.0),
        min_p=often(0.2, lambda: dice.uniform(0.0, 0.3), 0.0),
        repetition_penalty=often(0.2, lambda: dice.uniform(0.6, 1.8), 1.0),
        presence_penalty=often(0.2, lambda: dice.uniform(-1.0, 2.0), 0.0),
        frequency_penalty=often(0.2, lambda: dice.uniform(-0.5, 2.0), 0.0),
        logit_bias=often(
            0.3,
            lambda: {
                dice.randrange(vocab): dice.choice((-float("inf"), -5.0, 2.0, 6.0))
                for _ in range(dice.randint(1, 6))
            },
            {},
        ),
        stop=often(0.3, lambda: tuple(dice.choice(letters) for _ in range(3)), ()),
        stop_token_ids=often(
            0.3, lambda: tuple(dice.randrange(vocab) for _ in range(vocab // 12)), ()
        ),
        ignore_eos=dice.random() < 0.5,
        seed=dice.randint(-(2**63), 2**63 - 1),
        n=often(0.1, lambda: dice.randint(2, 3), 1),
        logprobs=often(0.3, lambda: dice.randint(0, 20), None),
    )
    prompt = tuple(dice.randrange(vocab) for _ in range(dice.randint(1, 12)))
    mask = often(
        0.25, lambda: Hashed(vocab, dice.randrange(1000), dice.choice((4, 99, 99, 99))), None
    )
    return Request(prompt, params, mask, timeout_s=often(0.1, lambda: dice.uniform(1, 9), None))


def mixed(engine, requests, dice, now):
    """Join in bursts, be cancelled now and then; (outputs, numbers of those cancelled)."""
    waiting, outputs, alive, cancelled = list(enumerate(requests)), {}, {}, set()
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), dice.choice((0, 0, 1, 2, 5)))):
            place, request = waiting.pop(0)
            first = engine.add(request, live=dice.random() < 0.3)
            alive |= {first + i: (place, i) for i in range(request.params.n)}
        if alive and dice.random() < 0.06:
            number = dice.choice(sorted(alive))
            cancelled.add(alive[number])
            outputs[alive.pop(number)] = engine.cancel(number)
        now[0] += 0.25
        for event in engine.step():
            if event.output is not None:
                outputs[alive.pop(event.request_id)] = event.output
    assert not alive
    return outputs, cancelled


@pytest.fixture(scope="module")
def exact(tiny, tokenizer):
    return tiny.make_target(vocab=len(tokenizer), tokenizer=tokenizer, dtype=torch.float64, seed=3)


def drafter_of(tiny, target, name):
    kind = name.rpartition(" ")[2]
    if kind == "markov":
        return tiny.MarkovDrafter(target.vocab_size)
    return (tiny.make_drafter if kind == "dspark" else tiny.make_eagle3)(target)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_of_many_is_what_it_is_alone(tiny, exact, name, monkeypatch):
    # Whether drafting pays on this machine is not what this is about.
    monkeypatch.setattr(Protection, "allows", lambda *_, **__: True)
    monkeypatch.setattr(StepTimes, "learn", lambda *_: None)
    verifier, make_schedule = SETTINGS[name]
    dice = random.Random(name)
    drafter = drafter_of(tiny, exact, name)
    requests = [some_request(dice, exact.vocab_size) for _ in range(PER_SETTING)]
    now = [0.0]

    def engine(**options):
        schedule = make_schedule(drafter)
        return Engine(
            exact, drafter, max_length=LENGTH, verifier=verifier, schedule=schedule, **options
        )

    crowd = engine(max_requests=7, now=lambda: now[0])
    outputs, cancelled = mixed(crowd, requests, dice, now)
    assert crowd.memory.pool.in_use == 0
    single = engine(max_requests=1, now=lambda: 0.0)
    reasons = Counter()
    for place, request in enumerate(requests):
        for i, sample in enumerate(request.samples()):
            [alone] = tiny.collect(single, [sample])
            compare(outputs[place, i], alone, cut=(place, i) in cancelled)
            reasons[outputs[place, i].finish_reason] += 1
    assert set(reasons) == {"stop", "length", "timeout", "cancelled", "error"}
    assert reasons["stop"] + reasons["length"] > 0.6 * PER_SETTING
    if "off" not in name:
        assert sum(output.stats.accepted for output in outputs.values()) > 20


def compare(output, alone, *, cut):
    """Equal, or the beginning of it where it was cut short."""
    count = len(output.token_ids)
    assert output.token_ids == alone.token_ids[:count]
    if cut or output.finish_reason == "timeout":
        assert output.finish_reason in ("cancelled", "timeout")
        assert alone.text.startswith(output.text.rstrip("\ufffd"))
    else:
        assert (output.finish_reason, output.text) == (alone.finish_reason, alone.text)
        assert (output.error, count) == (alone.error, len(alone.token_ids))
    assert (output.logprobs is None) == (alone.logprobs is None)
    for mine, theirs in zip(output.logprobs or (), alone.logprobs or (), strict=False):
        assert mine.token_id == theirs.token_id
        assert mine.logprob == pytest.approx(theirs.logprob, rel=1e-9, abs=1e-9)
    assert output.logprobs is None or len(output.logprobs) == count
