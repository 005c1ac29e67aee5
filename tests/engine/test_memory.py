"""Pages run short, are shared and given back; no output knows of it."""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from dspark.attention.paged_cache import PAGE_SIZE, PagedCache
from dspark.engine.engine import Engine
from dspark.engine.kv import memory
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import RequestError, UsageError
from dspark.request import Request, SamplingParams

KINDS = ("dspark", "eagle3", "mtp", "right", "plain")


@pytest.fixture(scope="module")
def exact(tiny):
    """fp64: no rounding hides behind another batch."""
    return tiny.make_target(dtype=torch.float64)


def drafter_of(kind, target, tiny):
    if kind == "plain":
        return None
    if kind == "right":
        return tiny.TargetDrafter(target, spoil=5)
    if kind == "dspark":
        return tiny.make_drafter(target)
    return tiny.make_eagle3(target, mtp=kind == "mtp", num_layers=1 if kind == "mtp" else 2)


def counted(outputs):
    return [(o.token_ids, o.stats.rounds, o.stats.accepted) for o in outputs]


def requests_of(tiny, prompts, **params):
    return tiny.make_requests(prompts, **{"max_new_tokens": 20, "ignore_eos": True, **params})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_read_in_parts_change_nothing(exact, tiny, kind, temperature):
    prompts = tiny.make_prompts(7, 64, longest=50)
    requests = requests_of(tiny, prompts, temperature=temperature)
    drafter = drafter_of(kind, exact, tiny)
    whole = counted(tiny.decode(exact, drafter, requests, max_requests=4, step_tokens=10_000))
    for budget in (1, 7, 40):
        parts = tiny.decode(exact, drafter, requests, max_requests=4, step_tokens=budget)
        assert counted(parts) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_giving_way_changes_nothing(exact, tiny, kind, temperature):
    prompts = tiny.make_prompts(6, 64, longest=30)
    requests = requests_of(tiny, prompts, temperature=temperature, max_new_tokens=50)
    drafter = drafter_of(kind, exact, tiny)
    roomy = counted(tiny.decode(exact, drafter, requests, max_requests=6))
    for reuse in (True, False):
        engine = Engine(
            exact,
            drafter,
            max_requests=6,
            max_length=tiny.max_context,
            cache_tokens=13 * PAGE_SIZE,
            prefix_reuse=reuse,
        )
        assert counted(engine.run(requests)) == roomy
        assert engine.roster.preemptions > 0
        assert engine.memory.pool.in_use == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("roomy", [True, False])
def test_a_shared_prefix_is_read_once_and_drafts_stay_as_good(
    exact, tiny, kind, temperature, roomy
):
    system = tiny.make_prompts(1, 64, seed=5, longest=1)[0] * 50
    tails = tiny.make_prompts(6, 64, seed=6, longest=9)
    requests = requests_of(tiny, [[*system, *tail] for tail in tails], temperature=temperature)
    drafter = drafter_of(kind, exact, tiny)
    apart = tiny.decode(exact, drafter, requests, max_requests=3, prefix_reuse=False)
    engine = Engine(
        exact,
        drafter,
        max_requests=3,
        max_length=tiny.max_context,
        cache_tokens=None if roomy else 2 * tiny.max_context,
    )
    rows, forward = [], exact.forward

    def counting(batch, *args, **options):
        rows.append(len(batch.input_ids_T))
        return forward(batch, *args, **options)

    engine.target.forward = counting
    try:
        together = engine.run(requests)
    finally:
        del engine.target.forward
    assert counted(together) == counted(apart)
    assert engine.memory.pool.hit_tokens == 5 * (len(system) // PAGE_SIZE * PAGE_SIZE)
    prompts = sum(len(r.prompt_ids) for r in requests)
    if kind == "plain":
        generated = sum(len(o.token_ids) for o in together)
        assert sum(rows) == prompts - engine.memory.pool.hit_tokens + generated - len(requests)


@pytest.mark.parametrize("why_not", [None, "a small cache", "rows token by token, as on a GPU"])
def test_a_prefix_is_copied_into_one_piece_where_that_pays(exact, tiny, monkeypatch, why_not):
    system = list(range(3, 3 + 2 * PAGE_SIZE))
    if why_not and "token" in why_not:
        by_token = partial(PagedCache, exact.cache_shapes, dtype=exact.dtype, by_token=True)
        monkeypatch.setattr(exact, "new_cache", by_token, raising=False)
    tokens = 2 * tiny.max_context if why_not == "a small cache" else None
    engine = Engine(exact, None, max_requests=3, max_length=tiny.max_context, cache_tokens=tokens)
    for request in requests_of(tiny, [[*system, 40], [*system, 41], [*system, 42]]):
        engine.add(request)
        engine.step()
    assert engine.memory.pool.hit_tokens == 2 * len(system)
    tables = [request.table for request in engine.roster.running]
    pieces = [len(table.runs(0, len(system) + 1)) for table in tables]
    assert pieces == ([1, 2, 2] if why_not else [1, 1, 1])
    pages = [page for table in tables for page in table.pages]
    assert (len(set(pages)) == len(pages)) == (why_not is None)
    engine.memory.check(engine.roster.running)
    first, *others = (engine.memory.cache.heads(0, table, 0, len(system)) for table in tables)
    for keys, values in others:
        assert torch.equal(keys, first[0])
        assert torch.equal(values, first[1])


@pytest.mark.parametrize("kind", ["dspark", "eagle3", "mtp"])
def test_another_turn_finds_the_answer_of_the_last(exact, tiny, kind):
    """Pages of an ended request hold its output too, in the target's cache and the drafter's."""
    drafter = drafter_of(kind, exact, tiny)
    engine = Engine(exact, drafter, max_requests=2, max_length=tiny.max_context)
    prompt = tiny.make_prompts(1, 64, seed=8, longest=1)[0] * 10
    first = engine.run(requests_of(tiny, [prompt], max_new_tokens=40))[0]
    second = [*prompt, *first.token_ids, 5, 6, 7]
    asked = requests_of(tiny, [second])
    again = engine.run(asked)
    assert engine.memory.pool.hit_tokens >= 2 * PAGE_SIZE
    assert counted(again) == counted(tiny.decode(exact, drafter, asked))


def test_drafts_get_worse_where_the_context_is_not_shared(exact, tiny, monkeypatch):
    """A control: were the drafter's rows missing after a hit, the test above would see it."""
    drafter = drafter_of("eagle3", exact, tiny)
    prompt = tiny.make_prompts(1, 64, seed=5, longest=1)[0] * 40
    requests = requests_of(tiny, [prompt, [*prompt, 9]], max_new_tokens=40)
    apart = tiny.decode(exact, drafter, requests, max_requests=1, prefix_reuse=False)
    engine = Engine(exact, drafter, max_requests=1, max_length=tiny.max_context)
    context = engine.memory.context
    join = context.join

    def forgetful(table, tokens, length):
        rows_T = torch.tensor(table.rows(0, length))
        for layer, shape in enumerate(context.cache.shapes):
            zeros = torch.zeros(length, shape.kv_heads, shape.key_dim, dtype=torch.float64)
            context.cache.write(layer, rows_T, zeros, zeros[..., : shape.value_dim])
        join(table, tokens, length)

    monkeypatch.setattr(context, "join", forgetful)
    spoiled = engine.run(requests)
    assert [o.token_ids for o in spoiled] == [o.token_ids for o in apart]
    assert counted(spoiled)[1] != counted(apart)[1]


def test_a_long_prompt_holds_nobody_up_for_longer_than_a_budget(exact, tiny):
    engine = Engine(exact, None, max_requests=3, max_length=tiny.max_context, step_tokens=16)
    short, long = tiny.make_prompts(1, 64)[0][:4], [1, 2, 3, 4] * 20
    first = engine.add(requests_of(tiny, [short], max_new_tokens=30)[0])
    engine.step()
    engine.add(requests_of(tiny, [long])[0])
    late = engine.add(requests_of(tiny, [[9, *short]])[0])
    seen = []
    for _ in range(6):
        seen.append({event.request_id for event in engine.step()})
    assert all(first in step for step in seen)
    assert late in seen[0]
    assert engine.clock.prefills == 1 + 6


def test_a_request_that_the_cache_cannot_hold_is_refused_and_no_other_disturbed(exact, tiny):
    engine = Engine(exact, None, max_requests=4, max_length=96, cache_tokens=4 * PAGE_SIZE)
    fine = engine.add(requests_of(tiny, [[1, 2, 3]])[0])
    with pytest.raises(RequestError, match="may reach 90 tokens, but the cache holds 64 rows"):
        engine.add(requests_of(tiny, [[1] * 60], max_new_tokens=30)[0])
    done = [e.output for e in itertools.chain(*(engine.step() for _ in range(21))) if e.output]
    assert [len(o.token_ids) for o in done] == [20]
    assert fine == 0


@pytest.mark.parametrize("name", ["step_tokens", "cache_tokens", "max_requests"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_that_cannot_be_are_refused(exact, name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        Engine(exact, None, **{name: value})


def test_cancelling_gives_everything_back_at_once(exact, tiny):
    drafter = drafter_of("dspark", exact, tiny)
    engine = Engine(exact, drafter, max_requests=2, max_length=96, prefix_reuse=False)
    numbers = [engine.add(r) for r in requests_of(tiny, tiny.make_prompts(4, 64))]
    engine.step()
    engine.step()
    for number in numbers:
        assert engine.cancel(number).finish_reason == "cancelled"
    assert engine.memory.pool.in_use == 0
    assert not engine.has_work
    engine.memory.check()


@pytest.mark.parametrize("schedule", ["fixed", "off"])
def test_nothing_leaks_when_requests_come_end_and_are_cancelled(exact, tiny, schedule):
    """Small pool, shared beginnings, a third cancelled at random moments."""
    engine = Engine(
        exact,
        drafter_of("eagle3", exact, tiny),
        max_requests=5,
        max_length=tiny.max_context,
        cache_tokens=16 * PAGE_SIZE,
        schedule=Schedule(schedule),
    )
    generator = torch.Generator().manual_seed(3)
    start = [1, 2, 3, 4, 5] * 8

    def number(top):
        return int(torch.randint(top, (), generator=generator))

    waiting = 120
    alive, ended = [], 0
    while waiting or engine.has_work:
        if waiting and number(2):
            prompt = [*start[: number(40)], *(number(64) for _ in range(1 + number(20)))]
            alive.append(engine.add(Request(tuple(prompt), SamplingParams(1 + number(25)))))
            waiting -= 1
        if alive and number(6) == 0:
            ended += engine.cancel(alive.pop(number(len(alive)))) is not None
        for event in engine.step():
            if event.output is not None:
                ended += 1
                alive.remove(event.request_id)
        running = engine.roster.running
        engine.memory.check(running)
    assert ended == 120
    assert engine.memory.pool.in_use == 0


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_is_taken_as_it_is_used(tiny, target):
    before = resident_bytes()
    engine = Engine(target, tiny.make_drafter(target), max_requests=4, cache_tokens=1 << 20)
    assert engine.memory.bytes > 300 << 20
    request = Request((7, 20, 31), SamplingParams(20, ignore_eos=True))
    [output] = engine.run([request] * 1)
    assert resident_bytes() - before < engine.memory.bytes / 4
    [wanted] = tiny.decode(target, None, [request])
    assert output.token_ids == wanted.token_ids


def test_the_cache_has_its_share_of_the_free_memory(target, monkeypatch):
    row_bytes = Engine(target, cache_tokens=PAGE_SIZE).memory.bytes // PAGE_SIZE
    free = 400 * PAGE_SIZE * row_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)

    def pages(**options):
        return Engine(target, max_requests=1000, **options).memory.tokens // PAGE_SIZE

    assert pages() == 200
    assert pages(memory_share=0.25) == 100
    assert pages(memory_share=1.0) == 400
    assert pages(memory_share=0.25, cache_tokens=30 * PAGE_SIZE) == 30
    whole = Engine(target, max_requests=2, memory_share=1.0).memory.tokens
    assert whole < 400 * PAGE_SIZE  # no more than the requests can use
    for wrong in (0, -0.1, 1.5):
        with pytest.raises(UsageError, match="memory_share is"):
            pages(memory_share=wrong)


@pytest.mark.parametrize(
    ("files", "free"),
    [({}, 1000 * 1024), ({"max": "max\n", "current": "5\n"}, 1000 * 1024),
     ({"max": "500\n", "current": "200\n"}, 300), ({"max": "100", "current": "200"}, 0)],
)  # fmt: skip
def test_a_control_groups_limit_counts(tmp_path, monkeypatch, files, free):
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_available_bytes", lambda: 1000 * 1024)
    assert memory.free_bytes(torch.device("cpu")) == free
