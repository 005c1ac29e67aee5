"""Learning while serving: what is gathered and kept, what is made of it, and what is served."""

import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dspark
from dspark.data.features.cache import FeatureCache
from dspark.data.features.encoder import target_features
from dspark.data.features.manifest import Origin
from dspark.data.samples import Sample
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.errors import UsageError
from dspark.request import Request, SamplingParams
from dspark.scheduling.calibration import Rounds, TemperatureScaling
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.survival import confidence
from dspark.serving.context import Settings
from dspark.serving.learning import learner as learners
from dspark.serving.learning import trainer as trainers
from dspark.serving.learning.collector import SEGMENTS, Harvest, SampleRing, TrafficCollector
from dspark.serving.learning.directory import (
    MOST_ROUND_FILES,
    LearningDirectory,
    Outcome,
    Plan,
    State,
    read_rounds,
)
from dspark.serving.learning.learner import Learner, resume
from dspark.serving.learning.trainer import Trainer, refreshed
from dspark.serving.server import Server

TEXTS = ("What does `tar` do?", "Tom has 3 apples.", "Hi, a table for two.", "List files.")


@pytest.fixture(scope="module")
def pair() -> Model:
    return dspark.load("bundled", dtype="float32", weights="plain")


@pytest.fixture
def fresh(pair: Model) -> Model:
    """The pair, whose drafter and calibration a test may replace."""
    return Model(
        pair.target,
        pair.drafter,
        name=pair.name,
        directory=pair.directory,
        calibration=pair.calibration,
    )


def requests(model: Model, count: int, tokens: int = 14, **how: Any) -> list[Request]:
    return [
        Request(
            model.encode(f"{TEXTS[i % 4]} {i}", raw=False),
            SamplingParams(tokens, ignore_eos=True),
            learn=True,
            **how,
        )
        for i in range(count)
    ]


def gathered(model: Model, asked: list[Request], **options: Any) -> tuple[list[Harvest], Engine]:
    """What a collector gathers of requests, and the engine."""
    harvests: list[Harvest] = []
    engine = model.open_engine(max_length=160, schedule="fixed", **options)
    collector = TrafficCollector("block", engine.num_drafts, 8, harvests.append, features=True)
    engine.collect(collector)
    engine.watch(collector.note)
    engine.run([collector.admit(request) for request in asked])
    return harvests, engine


def test_rows_are_those_that_the_target_computes_for_the_whole_text(pair: Model) -> None:
    """Also after shared prefixes, and where requests are read again for lack of pages."""
    asked = requests(pair, 4, 40)
    harvests, engine = gathered(pair, asked, max_requests=4, cache_tokens=208, step_tokens=32)
    assert engine.roster.preemptions > 0
    assert engine.memory.pool.hit_tokens == 0, "a prompt to learn from is read whole"
    assert len(harvests) == 4
    for harvest in harvests:
        sample = harvest.sample
        assert sample is not None
        prompt = sample.loss_mask.index(True)
        assert sample.input_ids[:prompt] in {request.prompt_ids for request in asked}
        assert len(sample.input_ids) == prompt + 40
        assert pair.drafter is not None
        features, hidden = target_features(pair.target, [sample], pair.drafter.taps)
        torch.testing.assert_close(harvest.features_LF[:-1], features[:-1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(harvest.hidden_LH[:-1], hidden[:-1], rtol=1e-3, atol=1e-3)
        assert not harvest.features_LF[-1].any()
        for outcome in harvest.outcomes:
            assert 0 <= outcome.accepted <= outcome.verified <= len(outcome.logits_K)
    assert all(harvest.outcomes for harvest in harvests)


def test_only_what_consents_and_follows_the_models_own_law_is_gathered(pair: Model) -> None:
    plain = requests(pair, 2)
    others = [
        replace(plain[0], learn=False),
        replace(plain[1], params=replace(plain[1].params, presence_penalty=0.5)),
    ]
    assert gathered(pair, others)[0] == []


def ring_of(path: Path, max_bytes: int) -> SampleRing:
    return SampleRing(path, Origin("t", "f", 2, 4, (0, 1), "float32"), 64, max_bytes)


def test_the_ring_keeps_the_latest_samples_within_its_bytes(tmp_path: Path) -> None:
    def sample(i: int) -> tuple[Sample, torch.Tensor, torch.Tensor]:
        ids = tuple(range(i, i + 16))
        rows = torch.full((16, 8), float(i % 100)), torch.full((16, 4), float(i % 100))
        return Sample(ids, (False,) * 4 + (True,) * 12), *rows

    limit = 40_000
    ring = ring_of(tmp_path / "ring", limit)
    for i in range(300):
        assert ring.add(*sample(i))
        if i == 150:  # a restart goes on
            ring.close()
            ring = ring_of(tmp_path / "ring", limit)
    ring.commit()
    assert ring.bytes <= limit + limit // SEGMENTS
    cache = FeatureCache(tmp_path / "ring")
    kept = [i for i in range(300) if sample(i)[0] in cache]
    assert 50 < len(kept) < 200
    assert kept == list(range(300 - len(kept), 300))
    stored = cache.rows(sample(299)[0], torch.device("cpu"))
    assert (stored.features_RPH == 99.0).all()
    ring.close()


def recorded(seed: int, count: int, temperature: float) -> list[Outcome]:
    """Rounds of two drafts whose logits are off by a factor."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0.5, 1.5, (count, 2))
    stays = generator.random((count, 2)) < confidence(logits / temperature)
    accepted = np.where(stays[:, 0], 1 + stays[:, 1], 0)
    return [
        Outcome(row, int(n), 2, "token", "sampled", 0)
        for row, n in zip(logits, accepted, strict=True)
    ]


def test_rounds_are_kept_in_order_and_in_number(tmp_path: Path) -> None:
    directory = LearningDirectory(tmp_path)
    for number in range(MOST_ROUND_FILES + 3):
        outcome = recorded(0, 1, 1.0)[0]
        directory.append_rounds([replace(outcome, accepted=0, generation=number % 2)])
    assert len(directory.round_files()) == MOST_ROUND_FILES
    assert directory.newest_rounds() == MOST_ROUND_FILES + 2
    ((verifier, kind, rounds),) = read_rounds(directory, 1, 10)
    assert (verifier, kind, len(rounds.accepted_N)) == ("token", "sampled", 10)


def test_a_calibration_is_refreshed_only_where_it_is_better_on_later_rounds() -> None:
    rows = recorded(1, 2000, 3.0)
    rounds = Rounds.of(
        [row.logits_K for row in rows], [row.accepted for row in rows], [2] * len(rows)
    )
    better, used = refreshed(Calibration(), [("token", "sampled", rounds)])
    (entry,) = better.entries
    assert used == 2000
    assert all(a.ece < b.ece for a, b in zip(entry.after, entry.before, strict=True))
    assert entry.scaling.temperatures[0] == pytest.approx(3.0, rel=0.4)
    assert refreshed(better, [("token", "sampled", rounds)]) == (better, 0)
    worse = replace(entry, scaling=TemperatureScaling((0.3, 0.3)))
    again, used = refreshed(Calibration((worse,)), [("token", "sampled", rounds)])
    assert (again.entries[0].scaling, used) == (entry.scaling, 2000)
    few = Rounds.of(rounds.logits_NK[:50], rounds.accepted_N[:50], rounds.verified_N[:50])
    assert refreshed(Calibration(), [("token", "sampled", few)]) == (Calibration(), 0)


@pytest.mark.parametrize(("share", "rest_s"), [(0.2, 4.0), (0.5, 1.0), (1.0, 0.0)])
def test_a_trainer_takes_its_share_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, rest_s: float
) -> None:
    """It rests after each second of work; one that is driven by calls does not."""
    clock = {"worked": 0.0, "slept": 0.0}
    monkeypatch.setattr(time, "process_time", lambda: clock["worked"])
    monkeypatch.setattr(time, "monotonic", lambda: clock["worked"] + clock["slept"])
    monkeypatch.setattr(time, "sleep", lambda s: clock.update(slept=clock["slept"] + s))
    directory = LearningDirectory(tmp_path)
    directory.write_plan(Plan("calibration", "t", "f", "d", "float32", 2, 64, share=share))
    trainer, driven = Trainer(directory, os.getppid()), Trainer(directory)
    for seconds in range(1, 4):
        clock["worked"] += 1.0
        driven.pulse()
        trainer.pulse()
        assert clock["slept"] == pytest.approx(rest_s * seconds)


def test_the_trainers_process_calibrates_and_ends_with_its_server(tmp_path: Path) -> None:
    directory = LearningDirectory(tmp_path)
    directory.write_plan(Plan("calibration", "t", "f", "d", "float32", 2, 64))
    directory.append_rounds(recorded(1, 2000, 3.0))
    server = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-m', "
        "'dspark.serving.learning.trainer', sys.argv[1]]); print(p.pid, flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", server, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        trainer = Path("/proc") / parent.stdout.readline().strip()
        wait_until(lambda: directory.state().calibrations == 1)
        assert directory.state().serves == (0, 1)
        assert Calibration.load(directory.drafter(0) / "calibration.json").entries
        assert os.getpriority(os.PRIO_PROCESS, int(trainer.name)) == 19
        assert "libtorch" not in (trainer / "maps").read_text(), "it needs little memory"
    wait_until(lambda: not trainer.exists())


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples are enough, every other one held out."""
    turns = itertools.count()
    monkeypatch.setattr(learners, "sample_key", lambda _: bytes([next(turns) % 2]))
    monkeypatch.setattr(trainers, "FRESH_HELD_OUT", 2)
    monkeypatch.setattr(learners, "ROUNDS_PER_FILE", 8)
    monkeypatch.setattr(learners, "_HELD_OUT_OF", 2)


def learned(model: Model, path: Path, count: int = 8) -> Learner:
    """A learner, stopped after it has written what requests brought."""
    directory = resume(model, str(path), "drafter")
    plan = directory.plan()
    assert plan is not None
    directory.write_plan(replace(plan, max_length=160, steps=2, rows=2, anchors=4, fresh_tokens=64))
    engine = model.open_engine(max_requests=8, max_length=160, schedule="fixed")
    learner = Learner(directory, engine, trains=False)
    learner.collector.most = 8
    engine.collect(learner.collector)
    engine.watch(learner.collector.note)
    learner.start(lambda _: None)
    engine.run([learner.collector.admit(request) for request in requests(model, count)])
    learner.stop()
    return learner


def test_a_candidate_serves_where_it_gains_and_is_taken_back_where_it_falls(
    fresh: Model, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learned(fresh, tmp_path)
    assert learner.progress.samples == 8
    trainer = Trainer(learner.directory)
    lengths = iter((2.0, 2.01, 2.0, 2.5))
    assert trainer._at_work().length(trainer._drafter(0)) > 1.5
    monkeypatch.setattr(trainer._at_work(), "length", lambda _: next(lengths))
    assert trainer.train()
    assert trainer.state == State(steps=2, rejected=1, held_out_length=2.0)
    assert not trainer.train(), "nothing new has come"
    trainer._trained_on.clear()
    assert trainer.train()
    assert trainer.state.serves == (1, 0)
    assert (trainer.state.previous, trainer.state.held_out_length) == (0, 2.5)
    assert learner.directory.state() == trainer.state
    first, second = (trainer._at_work().load(learner.directory.drafter(n)) for n in (0, 1))
    assert not torch.equal(first.fc.weight, second.fc.weight)

    # A server that starts again serves it, and a trainer that starts again goes on.
    again = Model(fresh.target, fresh.drafter, name=fresh.name, calibration=fresh.calibration)
    resume(again, str(tmp_path), "drafter")
    assert again.drafter is not fresh.drafter
    assert torch.equal(again.drafter.fc.weight, second.fc.weight)
    trainer = Trainer(learner.directory)
    falling = iter((2.0, 2.5))
    monkeypatch.setattr(trainer._at_work(), "length", lambda _: next(falling))
    assert trainer.look_back()
    assert (trainer.state.generation, trainer.state.rollbacks) == (0, 1)


def test_training_on_the_traffic_lowers_its_loss(fresh: Model, tmp_path: Path, small: None) -> None:
    learner = learned(fresh, tmp_path)
    trainer = Trainer(learner.directory)
    training = trainer._at_work()
    training.plan = replace(training.plan, steps=8, rows=2)
    drafter = trainer._drafter(0)
    with torch.no_grad():  # it has forgotten much
        drafter.fc.weight.mul_(0.2)
    before = training.length(drafter)
    assert training.length(training.train(drafter, 1)) > before * 1.02


def test_what_a_trainer_brings_is_swapped_in_while_answers_run(
    fresh: Model, tmp_path: Path, small: None
) -> None:
    learner = learned(fresh, tmp_path)
    directory = learner.directory
    plan = directory.plan()
    assert plan is not None
    trainer = Trainer(directory)
    trainer._put(trainer._at_work().train(trainer._drafter(0), 1), 1)
    engine = fresh.open_engine(max_requests=4, max_length=160, schedule="fixed")
    asked = [replace(request, learn=False) for request in requests(fresh, 4)]
    expected = [output.token_ids for output in engine.run(asked)]
    old = engine.drafter
    learner = Learner(directory, engine, trains=False)
    orders: list[Any] = []
    learner.start(orders.append)
    ids = [engine.add(request) for request in asked]
    outputs = {}
    for step in range(200):
        if step == 3:
            directory.write_state(State(generation=1, newest=1, previous=0))
            learner.flush()
            orders.pop()(engine)
            assert engine.drafter is not old
            assert learner.collector.generation == 1
            assert learner.progress.swaps == 1
        outputs |= {e.request_id: e.output for e in engine.step() if e.output is not None}
        if not engine.has_work:
            break
    learner.stop()
    assert [outputs[i].token_ids for i in ids] == expected


def test_a_directory_of_another_pair_is_refused(fresh: Model, tmp_path: Path) -> None:
    directory = resume(fresh, str(tmp_path), "calibration")
    plan = directory.plan()
    assert plan is not None
    assert tmp_path.stat().st_mode & 0o077 == 0
    directory.write_plan(replace(plan, drafter_fingerprint="another"))
    with pytest.raises(UsageError, match="another drafter"):
        resume(fresh, str(tmp_path), "calibration")


@pytest.mark.parametrize("mode", ["calibration", "drafter"])
def test_drafters_that_cannot_learn_are_refused(pair: Model, tmp_path: Path, mode: Any) -> None:
    with pytest.raises(UsageError, match="--learn"):
        resume(dspark.engine.loading.load_draft(pair.target, "ngram"), str(tmp_path), mode)


@pytest.fixture
def serving(
    fresh: Model, tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, Learner]]:
    """A server that learns calibration."""
    directory = resume(fresh, str(tmp_path), "calibration")
    made: list[Learner] = []

    def service(engine: Engine) -> Any:
        from dspark.serving.service import EngineService

        made.append(Learner(directory, engine, trains=False))
        return EngineService(engine, learner=made[0])

    monkeypatch.setattr("tests.serving.conftest.EngineService", service)
    with kit.serve(fresh, Settings("bundled", drain_s=5.0)) as live:
        yield live, made[0]


def test_a_request_consents_by_store(
    serving: tuple[Any, Learner], caplog: pytest.LogCaptureFixture
) -> None:
    live, learner = serving
    assert isinstance(live.server, Server)
    caplog.set_level(logging.DEBUG)
    refused = (
        live.chat(max_tokens=24),
        live.chat(max_tokens=24, store=False),
        live.post("/v1/responses", {"input": "Hi", "max_output_tokens": 24, "store": True}),
    )
    assert {reply.status for reply in refused} == {200}
    assert "store" in refused[2].headers["warning"]
    learner.flush()
    assert learner._outcomes == []
    taken = live.chat(max_tokens=24, store=True)
    text = live.post("/v1/completions", {"prompt": "tar", "max_tokens": 24, "store": True})
    assert "warning" not in taken.headers
    assert "warning" not in text.headers
    live.wait_until(lambda now: now.running == 0)
    learner.flush()
    assert len(learner._outcomes) >= 4
    figures = live.figures()
    assert figures["dspark_learning_trainer_up",] == 0
    assert figures["dspark_learning_drafter",] == 0
    answer = json.loads(taken.body)["choices"][0]["message"]["content"]
    assert answer not in caplog.text
