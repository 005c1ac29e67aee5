"""Requests that end before drafting is tried again: decoded plainly, at no cost for the drafter."""

from __future__ import annotations

import pytest

from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams


class Pause:
    """Protection that lets nobody draft for so many rounds, and then everybody."""

    refreshes = False

    def __init__(self, left):
        self.left = left

    def rest(self, _requests):
        return float(self.left)

    def allows(self, _requests, *, tries):
        return tries and not self.left

    def depth(self, _requests):
        return None

    def learn(self, _seen):
        self.pass_plain(1, 1)

    def pass_plain(self, _requests, rounds):
        self.left = max(self.left - rounds, 0)


def paused_engine(target, drafter, left, *, records=None, prefix_reuse=False, max_requests=4):
    schedule = Scheduler(Schedule("auto"), num_drafts=drafter.block_size)
    schedule._protection = Pause(left)
    return Engine(
        target,
        drafter,
        max_requests=max_requests,
        max_length=96,
        schedule=schedule,
        prefix_reuse=prefix_reuse,
        watch=None if records is None else records.append,
        strict=True,
    )


def request(first, prompt, answer):
    return Request(tuple(range(first, first + prompt)), SamplingParams(answer, ignore_eos=True))


def finish(engine):
    outputs = {}
    while engine.has_work:
        outputs |= {e.request_id: e.output for e in engine.step() if e.output}
    return outputs


def plainly(target, requests):
    return [output.token_ids for output in Engine(target, max_length=96).run(requests)]


@pytest.fixture
def observed(tiny, target, monkeypatch):
    """A drafter, and the tables of every part of text that it has observed, with rows."""
    drafter, seen = tiny.make_drafter(target), []
    observe = drafter.observe

    def spy(cache, batch, features_TF, next_T):
        seen.extend((segment.table, segment.length) for segment in batch.segments)
        return observe(cache, batch, features_TF, next_T)

    monkeypatch.setattr(drafter, "observe", spy)
    return drafter, seen


def test_who_ends_before_the_next_try_is_plain_and_who_does_not_is_ready_for_it(target, observed):
    drafter, seen = observed
    records, requests = [], [request(3, 6, 8), request(20, 5, 40)]
    engine = paused_engine(target, drafter, 12, records=records)
    short, long = (engine.add(each) for each in requests)
    events = engine.step()
    running = {active.request_id: active for active in engine.roster.running}
    assert [running[number].plain for number in (short, long)] == [True, False]
    table = running[long].table
    outputs = finish(engine)
    assert not any(event.output for event in events)
    assert [outputs[n].token_ids for n in (short, long)] == plainly(target, requests)
    drafted = [{i for i, d in zip(r.request_ids, r.drafts, strict=True) if d} for r in records]
    assert not any(drafted[:12])
    assert drafted[12:14] == [{long}, {long}]
    assert {id(of) for of, _ in seen} == {id(table)}
    assert seen[0][1] >= 5 + 11  # its prompt and all that was decoded meanwhile, at once


@pytest.mark.parametrize(("left", "captures"), [(12, False), (0, True)])
def test_nothing_is_captured_where_nobody_could_draft(
    target, observed, monkeypatch, left, captures
):
    drafter, seen = observed
    forward, taps = target.forward, []

    def spy(*args, **options):
        taps.append(options["taps"])
        return forward(*args, **options)

    monkeypatch.setattr(target, "forward", spy)
    requests = [request(3, 6, 8), request(20, 5, 7)]
    engine = paused_engine(target, drafter, left)
    for each in requests:
        engine.add(each)
    outputs = finish(engine)
    assert [outputs[n].token_ids for n in sorted(outputs)] == plainly(target, requests)
    assert bool(seen) is captures
    assert any(taps[: len(taps) // 2]) is captures


def test_a_try_waits_until_all_that_run_can_draft(target, observed):
    drafter, _ = observed
    records = []
    engine = paused_engine(target, drafter, 0, records=records)
    plain, other = engine.add(request(3, 6, 9)), engine.add(request(20, 5, 30))
    engine.step()
    next(r for r in engine.roster.running if r.request_id == plain).decode_plainly()
    engine.roster.running.sort(key=lambda r: r.plain)
    finish(engine)
    together = [record for record in records if plain in record.request_ids]
    alone = [record for record in records if record.request_ids == (other,)]
    assert len(together) == 9
    assert not any(any(record.drafts) for record in together)
    assert all(any(record.drafts) for record in alone[:2])


@pytest.mark.parametrize(("left", "pages"), [(60, 1), (0, 2)])
def test_a_shared_prompt_is_read_for_the_drafter_and_a_plain_answer_is_not_shared(
    target, observed, left, pages
):
    drafter, _ = observed
    engine = paused_engine(target, drafter, left, prefix_reuse=True)
    asked = request(3, 20, 30)
    number = engine.add(asked)
    tokens = [*asked.prompt_ids, *finish(engine)[number].token_ids]
    pool = engine.memory.pool
    found = pool.match([*tokens, 0])
    assert len(found) == pages
    pool.release(found)


@pytest.mark.parametrize("cache_tokens", [None, 112])
@pytest.mark.parametrize("kind", ["make_drafter", "make_eagle3"])
def test_rounds_that_are_slept_through_keep_the_same_rows(tiny, target, kind, cache_tokens):
    """Requests join, end and give way meanwhile; each row is observed once, in its place."""

    def play(sleeps):
        drafter, seen, slept = getattr(tiny, kind)(target), {}, []
        schedule = Scheduler(Schedule("auto"), num_drafts=drafter.block_size)
        schedule._protection = Pause(26)
        asleep = schedule.sleeps
        schedule.sleeps = lambda company: sleeps and (slept.append(asleep(company)) or slept[-1])
        engine = Engine(
            target,
            drafter,
            max_requests=4,
            max_length=96,
            cache_tokens=cache_tokens,
            schedule=schedule,
            strict=True,
        )
        observe = drafter.observe

        def spy(cache, batch, features_TF, next_T):
            tables = {id(r.table): r.request_id for r in engine.roster.running}
            for segment, begin in zip(batch.segments, batch.offsets, strict=False):
                for i in range(segment.length):
                    row = (int(next_T[begin + i]), features_TF[begin + i].sum().item())
                    place = (tables[id(segment.table)], segment.start + i)
                    seen.setdefault(place, []).append(row)
            return observe(cache, batch, features_TF, next_T)

        drafter.observe = spy
        engine.add(request(3, 6, 60))
        outputs, joins = {}, {3: request(20, 5, 50), 9: request(9, 40, 40)}
        for number in range(400):
            if number in joins:
                engine.add(joins[number])
            if not engine.has_work:
                break
            outputs |= {e.request_id: e.output.token_ids for e in engine.step() if e.output}
        return seen, outputs, sum(slept)

    (seen, outputs, slept), (wanted, others, none) = play(True), play(False)
    assert slept > 0 == none
    assert outputs == others
    assert len(outputs) == 3
    assert seen.keys() == wanted.keys()
    for place, rows in seen.items():
        assert [token for token, _ in rows] == [token for token, _ in wanted[place]]
        assert [x for _, x in rows] == pytest.approx([x for _, x in wanted[place]], abs=1e-3)
