"""The loop on a made-up engine whose every step takes a second: all figures are known."""

from dataclasses import dataclass, field

import pytest

from dspark.engine.engine import Clock
from dspark.engine.model import Model
from dspark.engine.requests.sequence import Event, Piece
from dspark.errors import RequestError
from dspark.evaluation.load.closed_loop import closed_loop, closed_loops, warm_up
from dspark.request import Output, Request, SamplingParams, Stats


@dataclass
class Seconds:
    """An engine that gives every request in flight `gain` tokens a second.

    A request's prompt is its number; `lengths` says how many tokens its answer has.
    """

    lengths: list[int]
    gain: int = 1
    time: float = 100.0
    fails: int = -1
    clock: Clock = field(default_factory=lambda: Clock(steps=7, verify_ms=70.0))
    running: dict[int, list[int]] = field(default_factory=dict)
    added: list[tuple[float, int]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    busiest: list[int] = field(default_factory=list)

    def now(self):
        return self.time

    def add(self, request):
        number = 1000 + request.prompt_ids[0]
        self.running[number] = []
        self.added.append((self.time - 100.0, request.prompt_ids[0]))
        return number

    def step(self):
        self.time += 1.0
        self.clock.steps += 1
        self.clock.verify_ms += 3.0
        self.busiest.append(len(self.running))
        events = []
        for number, tokens in list(self.running.items()):
            new = min(self.gain, self.lengths[number - 1000] - len(tokens))
            tokens.extend([5] * new)
            output = None
            if len(tokens) == self.lengths[number - 1000]:
                reason = "error" if number - 1000 == self.fails else "length"
                output = Output(
                    "", "", tuple(tokens), reason, Stats(rounds=2, tokens=4, verified=6)
                )
                del self.running[number]
            events.append(Event(number, (Piece("", 5, False),) * new, output))
        return events

    def cancel(self, number):
        self.cancelled.append(number - 1000)


def supply(index):
    return Request((index,))


def test_everyone_is_busy_to_the_last_counted_answer():
    engine = Seconds([3, 5, 6, 2, 9])
    run = closed_loop(engine, supply, users=2, count=3, now=engine.now)
    # 0: seconds 0 to 3; 1: 0 to 5; 2: 3 to 9; beside it 3 (5 to 7) and 4, which is cut at 9.
    assert engine.added == [(0, 0), (0, 1), (3, 2), (5, 3), (7, 4)]
    assert set(engine.busiest) == {2}
    assert engine.cancelled == [4]
    assert (run.seconds, run.tokens, run.tokens_per_s) == (9.0, 18, 2.0)
    times = [(a.sent_s, a.first_s, a.end_s) for a in run.answers]
    assert times == [(0, 1, 3), (0, 1, 5), (3, 4, 9)]
    assert [len(a.output.token_ids) for a in run.answers] == [3, 5, 6]
    assert [a.ttft_ms for a in run.answers] == [1e3, 1e3, 1e3]
    assert run.user_speeds == [1.0, 1.0, 1.0]


def test_nothing_is_sent_when_the_last_counted_answer_has_come():
    engine = Seconds([2, 4])
    run = closed_loop(engine, supply, users=1, count=2, now=engine.now)
    assert [index for _, index in engine.added] == [0, 1]
    assert engine.cancelled == []
    assert (run.seconds, run.tokens) == (6.0, 6)


def test_speed_counts_what_comes_after_the_first_tokens():
    engine = Seconds([5, 3, 9], gain=3)
    run = closed_loop(engine, supply, users=1, count=2, now=engine.now)
    # 0: 3 tokens at second 1, 2 at second 2; 1: all at once, so that it has no speed.
    assert [a.tokens_per_s for a in run.answers] == [2.0, None]
    assert run.user_speeds == [2.0]
    assert run.tokens == 8


def test_answers_stand_in_the_order_of_sending():
    engine = Seconds([9, 2, 2, 2, 2, 2])
    run = closed_loop(engine, supply, users=2, count=4, now=engine.now)
    assert [a.end_s for a in run.answers] == [9, 2, 4, 6]
    # A counted answer that takes long keeps the load up: request 4 and 5 fill in.
    assert [index for _, index in engine.added] == [0, 1, 2, 3, 4, 5]
    assert set(engine.busiest) == {2}


def test_the_clock_counts_this_run_only():
    engine = Seconds([2, 4])
    run = closed_loop(engine, supply, users=1, count=2, now=engine.now)
    assert (run.clock.steps, run.clock.verify_ms) == (6, 18.0)
    assert run.stats.verified == 12


def test_a_failed_request_is_no_fast_request():
    engine = Seconds([3, 2, 5], fails=1)
    with pytest.raises(RequestError, match="Request 1 failed under load"):
        closed_loop(engine, supply, users=2, count=2, now=engine.now)


@pytest.mark.parametrize("users", [1, 3])
def test_a_real_engine_gives_its_answers_and_is_left_idle(tiny, target, users):
    model = Model(target, tiny.make_drafter(target))
    pool = [
        Request((5 + i, 7, 9), SamplingParams(4 + 3 * i, temperature=i % 2, seed=i))
        for i in range(6)
    ]
    engine = model.engine(pool, batch_size=users, verifier="coupled", schedule="fixed")
    warm_up(engine, pool[:2], 2)
    assert not engine.has_work
    run = closed_loop(engine, lambda i: pool[i % 6], users=users, count=5)
    assert not engine.has_work
    alone = [Model(target).engine([r], verifier="coupled").run([r])[0] for r in pool[:5]]
    assert [a.output.token_ids[:1] for a in run.answers] == [o.token_ids[:1] for o in alone]
    lengths = [len(a.output.token_ids) for a in run.answers]
    assert lengths == [4 + 3 * i for i in range(5)]
    greedy = (0, 2, 4)
    assert all(run.answers[i].output.token_ids == alone[i].token_ids for i in greedy)
    assert run.tokens >= sum(lengths)
    assert run.clock.steps > 0
    assert run.stats.tokens == sum(lengths) - 5


def test_engines_step_in_turn_each_on_its_own_clock():
    """Whoever has spent less time is next; what others take is on nobody's clock but theirs."""
    steps, clock = [], [0.0]

    @dataclass
    class Slow(Seconds):
        name: str = ""
        step_s: float = 1.0

        def step(self):
            steps.append(self.name)
            clock[0] += self.step_s
            return super().step()

    fast = Slow([4] * 9, name="f", gain=2)
    slow = Slow([4] * 9, name="s", step_s=2.5)
    alone = closed_loop(Seconds([4] * 9, gain=2), supply, users=2, count=3, now=fast.now)
    runs = closed_loops([fast, slow], supply, users=2, count=3, now=lambda: clock[0])
    assert "".join(steps) == "fsffsfssssss"
    assert [run.seconds for run in runs] == [4.0, 20.0]
    assert [run.tokens for run in runs] == [alone.tokens, 16]
    assert [a.end_s for a in runs[1].answers] == [10.0, 10.0, 20.0]
