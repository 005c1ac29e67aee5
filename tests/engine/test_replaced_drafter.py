"""Another drafter from one round to the next: outputs, draft context, pages."""

from typing import Any

import numpy as np
import pytest
import torch

from dspark.engine.engine import Engine
from dspark.engine.requests.admission import Roster
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import UsageError
from dspark.request import Output, Request
from dspark.scheduling.calibration import Rounds
from dspark.scheduling.calibration_file import Calibration, calibrate
from dspark.targets.target import Target


def decoded(
    engine: Engine, requests: list[Request], swaps: dict[int, Any]
) -> tuple[list[Output], list[tuple[tuple[int, ...], ...]]]:
    """Outputs, and the drafts of each round after the last swap; drafters come in before steps."""
    drafts: list[tuple[tuple[int, ...], ...]] = []
    ids = [engine.add(request) for request in requests]
    outputs, step = {}, 0
    while engine.has_work:
        if step in swaps:
            engine.replace_drafter(swaps[step])
            drafts.clear()
            engine.watch(lambda record: drafts.append(record.drafts))
        for event in engine.step():
            if event.output is not None:
                outputs[event.request_id] = event.output
        step += 1
    return [outputs[i] for i in ids], drafts


@pytest.mark.parametrize("kind", ["dspark", "eagle3", "trees"])
def test_greedy_outputs_are_plain_decodings_across_swaps(tiny: Any, kind: str) -> None:
    dtype = torch.float64
    target = tiny.make_target(dtype=dtype)
    make = tiny.make_eagle3 if kind == "eagle3" else tiny.make_drafter
    drafters = [make(target, seed=seed).to(dtype) for seed in (1, 2, 3)]
    requests = tiny.make_requests(tiny.make_prompts(6, 64), max_new_tokens=24)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    engine = Engine(
        target,
        drafters[0],
        max_requests=4,
        max_length=tiny.max_context,
        tree_nodes=6 if kind == "trees" else None,
        strict=True,
    )
    outputs, _ = decoded(engine, requests, {4: drafters[1], 9: drafters[2]})
    assert tiny.token_ids(outputs) == plain
    engine.memory.check()


def test_reproducible_outputs_are_plain_decodings_across_a_swap(tiny: Any) -> None:
    target = tiny.make_target(dtype=torch.float64)
    drafters = [tiny.make_drafter(target, seed=seed).double() for seed in (1, 2)]
    requests = tiny.make_requests(tiny.make_prompts(4, 64), max_new_tokens=24, temperature=1.0)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    engine = Engine(
        target, drafters[0], max_requests=4, max_length=tiny.max_context, verifier="coupled"
    )
    assert tiny.token_ids(decoded(engine, requests, {5: drafters[1]})[0]) == plain


def after_swap(tiny: Any, target: Target) -> tuple[Any, Any]:
    """Drafts of all rounds after a swap, and those of an engine that had the new drafter always.

    Every block is verified whole and greedily, so that both draft from the same anchors where they
    come to the same one.
    """
    old, new = (tiny.make_drafter(target, seed=seed) for seed in (1, 2))
    request = tiny.make_requests([list(range(40))], max_new_tokens=30)
    options = {"max_length": tiny.max_context, "schedule": Schedule("fixed")}
    _, seen = decoded(Engine(target, old, **options), request, {4: new})
    _, always = decoded(Engine(target, new, **options), request, {0: new})
    # Tokens follow from the target alone: what is left of both runs is aligned at the end.
    return seen[-3:], always[-3:]


def test_the_draft_context_is_the_new_drafters(tiny: Any, target: Target) -> None:
    seen, always = after_swap(tiny, target)
    assert seen == always


def test_a_stale_draft_context_shows(
    tiny: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Roster, "read_again", lambda _: None)
    seen, always = after_swap(tiny, target)
    assert seen != always


def test_prefixes_of_the_old_drafter_are_not_found(tiny: Any, target: Target) -> None:
    old, new = (tiny.make_drafter(target, seed=seed) for seed in (1, 2))
    engine = Engine(target, old, max_length=tiny.max_context)
    (request,) = tiny.make_requests([list(range(48))], max_new_tokens=4)
    engine.run([request])
    assert engine.memory.pool.kept > 0
    engine.replace_drafter(new)
    assert engine.memory.pool.kept == 0
    engine.run([request])
    assert engine.memory.pool.hit_tokens == 0


def test_a_drafter_of_another_shape_is_refused(tiny: Any, target: Target) -> None:
    engine = Engine(target, tiny.make_drafter(target), max_length=tiny.max_context)
    with pytest.raises(UsageError, match="block_size"):
        engine.replace_drafter(tiny.make_drafter(target, block_size=4))
    with pytest.raises(UsageError, match="where one drafts"):
        Engine(target, None, max_length=tiny.max_context).replace_drafter(tiny.ngram(target))


@pytest.mark.parametrize("nodes", [None, 6])
def test_another_calibration_is_that_of_trees_too(
    tiny: Any, target: Target, nodes: int | None
) -> None:
    """Survivals of all rounds are those of an engine that began with the later calibration."""
    drafter = tiny.make_drafter(target)
    rounds = np.random.default_rng(0).normal(size=(300, drafter.block_size))
    kept, whole = np.arange(300) % 3, np.full(300, drafter.block_size)
    entry = calibrate(Rounds.of(rounds, kept, whole), "block", "sampled")
    requests = tiny.make_requests(tiny.make_prompts(2, 64), max_new_tokens=10, temperature=1.0)

    def survivals(first: Calibration, then: Calibration) -> Any:
        scheduler = Scheduler(Schedule("fixed"), "block", drafter.block_size, first)
        engine = Engine(
            target, drafter, schedule=scheduler, tree_nodes=nodes, max_length=tiny.max_context
        )
        scheduler.recalibrate(then)
        records = list[Any]()
        engine.watch(records.append)
        engine.run(requests)
        return [r.survival_RK.tolist() for r in records if r.survival_RK is not None]

    none, fitted = Calibration(), Calibration((entry,))
    assert survivals(none, fitted) == survivals(fitted, fitted) != survivals(none, none)
