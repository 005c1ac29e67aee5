"""Questions through the engine: the reference's trace, dialogues, interrupted runs."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dspark.data.conversations import Prompt
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.engine.model import Model
from dspark.errors import CompatibilityError, DataError
from dspark.evaluation.evaluate import evaluate, settings_of
from dspark.evaluation.metrics import RoundCounts, figures
from dspark.evaluation.records import RunRecords, load_runs
from dspark.evaluation.report.results import report_of
from dspark.evaluation.tasks import Task
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ("the cat sat", "on the mat", "and the dog", "sat", "the mat and the cat", "a dog")


class IdModel(Model):
    """Takes token ids, written as text: the golden target has no tokenizer."""

    def encode(self, prompt, *, raw=True, thinking=None):
        return tuple(map(int, prompt.split()))


def settings(model, **options):
    return settings_of(model, "tiny", "drafter", "here", **({"max_new_tokens": 24} | options))


def task_of(*texts, name="task", later=()):
    prompts = [Prompt(({"role": "user", "content": text},), text, later) for text in texts]
    return Task.of(name, name, prompts, "here")


@pytest.fixture(scope="module")
def model(target, tiny):
    """Its drafter knows the target's own next tokens whenever the last token's number is even."""
    drafter = tiny.KnowingDrafter(target, pleased=lambda tokens: tokens[-1] % 2 == 0)
    return Model(target, drafter)


@pytest.mark.parametrize("folder", ["dspark_vanilla", "eagle3"])
def test_golden_rounds_are_the_references(folder):
    golden = json.loads((GOLDEN / folder / "decode.json").read_text())["T=0.0 threshold=0.0"]
    target = Target.load(GOLDEN / "dspark_vanilla" / "target")
    drafter = load_drafter(GOLDEN / folder / "draft")
    drafter.bind(target.parts(), num_target_layers=target.num_layers)
    new = golden["num_output_tokens"]
    prompt = " ".join(map(str, golden["output_ids"][:-new]))
    task = Task.of("golden", "golden", [Prompt(None, prompt)], "here")
    model = IdModel(target, drafter)
    run = evaluate(model, settings(model, max_new_tokens=new), [task])
    (turn,) = run.of_task("golden")[0].turns
    # The reference drafts past the limit on tokens; rounds without room for a block are left out.
    found = figures(RoundCounts.of(run.of_task("golden"), drafter.block_size), "golden")
    whole = found["whole_rounds"]
    assert whole > 10
    assert list(turn.kept[:whole]) == golden["accepted_draft_lengths"][:whole]
    assert list(turn.verified[:whole]) == golden["proposal_lengths"][:whole]
    lengths = golden["acceptance_lengths"][:whole]
    assert found["accepted_length"] == pytest.approx(sum(lengths) / whole)


def test_rounds_are_those_that_the_engine_counts(model):
    run = evaluate(model, settings(model), [task_of(*TEXTS)])
    engine = model.engine([Request((5,), SamplingParams(24))] * 6, schedule="fixed", max_length=64)
    for record, text in zip(run.of_task("task"), TEXTS, strict=True):
        ids = model.encode([{"role": "user", "content": text}])
        (output,) = engine.run([Request(ids, SamplingParams(24))])
        (turn,) = record.turns
        stats = output.stats
        assert (turn.tokens, turn.room, turn.cut) == (24, 24, False)
        assert len(turn.kept) == stats.rounds
        assert (sum(turn.kept), sum(turn.verified)) == (stats.accepted, stats.verified)
        assert (turn.drafted, turn.text) == (stats.drafted, output.text)
        assert turn.tokens == 1 + sum(kept + 1 for kept in turn.kept)
    found = report_of([run])["runs"][0]["tasks"]["task"]
    assert found["tokens_per_round"] == pytest.approx(found["tokens"] / found["rounds"])
    assert 1.2 < found["accepted_length"] < 4.9  # neither all nor nothing is kept
    assert found["timings"]["requests_per_step"] > 1


def test_an_answer_that_ends_within_its_drafts_is_cut(model, monkeypatch):
    plain = evaluate(model, settings(model), [task_of(TEXTS[0])]).of_task("task")[0].turns[0]
    start = next(n for n, kept in enumerate(plain.kept) if kept >= 3)
    at = 1 + sum(kept + 1 for kept in plain.kept[:start]) + 1  # the second draft of that round
    ids = model.encode([{"role": "user", "content": TEXTS[0]}])
    (output,) = model.engine([Request(ids, SamplingParams(24))], schedule="fixed").run(
        [Request(ids, SamplingParams(24))]
    )
    stop = output.token_ids[at]
    assert stop not in output.token_ids[:at]
    monkeypatch.setattr(model.target, "eos_token_ids", frozenset({stop}))
    cut = evaluate(model, settings(model), [task_of(TEXTS[0])]).of_task("task")[0].turns[0]
    assert (cut.tokens, cut.cut, cut.finish_reason) == (at + 1, True, "stop")
    assert cut.kept == (*plain.kept[:start], 2)


def test_later_turns_follow_the_models_own_answers(model):
    later = ("and the dog", "on the cat")
    run = evaluate(model, settings(model, max_new_tokens=8), [task_of(TEXTS[0], later=later)])
    (record,) = run.of_task("task")
    messages = [{"role": "user", "content": TEXTS[0]}]
    for turn, text in zip(record.turns, (*later, ""), strict=True):
        ids = model.encode(messages)
        (output,) = model.engine([Request(ids, SamplingParams(8))], schedule="off").run(
            [Request(ids, SamplingParams(8))]
        )
        assert turn.text == output.text
        messages += [
            {"role": "assistant", "content": output.text},
            {"role": "user", "content": text},
        ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_answers_as_single_requests_do(model, temperature):
    task = task_of(*TEXTS)
    first, second = (
        evaluate(model, settings(model, temperature=temperature, batch_size=size), [task])
        for size in (1, 4)
    )
    for one, other in zip(first.of_task("task"), second.of_task("task"), strict=True):
        assert one.turns == other.turns
    texts = {record.turns[0].text for record in first.of_task("task")}
    assert len(texts) > 3  # every prompt has its own seed


def without_timings(value):
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k != "timings"}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


class Killed(BaseException):
    pass


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(model, tmp_path):
    tasks = [task_of(*TEXTS), task_of(*TEXTS[:2], name="talk", later=("the dog",))]
    options = {"temperature": 1.0, "batch_size": 2}
    whole = evaluate(model, settings(model, **options), tasks, tmp_path / "whole")
    finished = []

    def kill(_task, record):
        finished.append(record)
        if len(finished) == 3:
            raise Killed

    with pytest.raises(Killed):
        evaluate(model, settings(model, **options), tasks, tmp_path / "parts", progress=kill)
    (path,) = (tmp_path / "parts").iterdir()
    with path.open("a") as file:
        file.write('{"record": {"task": "ta')  # a line that was being written
    torn = path.read_bytes()
    (half,) = load_runs([tmp_path / "parts"])  # a report leaves the file as it is
    assert (len(half.records), path.read_bytes()) == (3, torn)
    asked = []
    evaluate(
        model, settings(model, **options), tasks, tmp_path / "parts",
        progress=lambda task, record: asked.append((task.name, record)),
    )  # fmt: skip
    assert len(asked) == 8  # those that were finished are told of, too
    assert len(finished) == 3
    (parts,) = load_runs([tmp_path / "parts"])
    assert len(parts.plans) == 2
    assert without_timings(report_of([parts])) == without_timings(report_of([whole]))


def test_a_full_disk_leaves_the_records_whole(model, tmp_path, monkeypatch):
    evaluate(model, settings(model), [task_of(*TEXTS[:2])], tmp_path)
    (path,) = tmp_path.iterdir()
    whole, write = path.read_bytes(), os.write
    room = iter([20])

    def little_room(descriptor, data):
        if (size := next(room, None)) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:size])

    monkeypatch.setattr(os, "write", little_room)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        evaluate(model, settings(model), [task_of(*TEXTS)], tmp_path)
    assert path.read_bytes() == whole
    monkeypatch.setattr(os, "write", write)
    evaluate(model, settings(model), [task_of(*TEXTS)], tmp_path)
    assert len(load_runs([tmp_path])[0].of_task("task")) == len(TEXTS)


def test_two_runs_of_one_seed_are_the_same_but_for_timings(model, tmp_path):
    reports = [
        report_of([evaluate(model, settings(model, temperature=1.0, seed=seed), [task_of(*TEXTS)])])
        for seed in (7, 7, 8)
    ]
    same, again, other = map(without_timings, reports)
    assert same == again
    assert same != other


def test_another_setting_has_a_file_of_its_own(model, tmp_path):
    evaluate(model, settings(model), [task_of("the cat")], tmp_path)
    evaluate(model, settings(model, max_new_tokens=12), [task_of("the cat")], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert sorted(run.settings.max_new_tokens for run in load_runs([tmp_path])) == [12, 24]


def test_fewer_prompts_report_those_alone(model, tmp_path):
    evaluate(model, settings(model), [task_of(*TEXTS)], tmp_path)
    run = evaluate(model, settings(model), [task_of(*TEXTS[:2])], tmp_path)
    assert report_of([run])["runs"][0]["tasks"]["task"]["prompts"] == 2
    (reread,) = load_runs([tmp_path])
    assert without_timings(report_of([reread])) == without_timings(report_of([run]))


def test_damaged_records_are_named(model, tmp_path):
    evaluate(model, settings(model), [task_of(*TEXTS[:2])], tmp_path)
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], '{"record": 5}\n', *lines[2:]]))
    with pytest.raises(DataError, match=r"is damaged .*remove it"):
        evaluate(model, settings(model), [task_of("the cat")], tmp_path)
    path.write_text(lines[0][:30])  # killed at its very beginning: begins again
    assert evaluate(model, settings(model), [task_of("the cat")], tmp_path).records
    path.write_text("".join(lines[:1]))
    with pytest.raises(DataError, match="holds no evaluation"):
        report_of([RunRecords.load(path)])
    with pytest.raises(DataError, match="holds no evaluation"):
        load_runs([tmp_path / "none"])


def test_prompts_over_the_context_are_counted_and_listed(model):
    long = "the cat sat on the mat and " * 60
    tasks = [task_of("the cat", long), task_of("a dog", name="talk", later=(long,))]
    run = evaluate(model, settings(model), tasks)
    report = report_of([run])["runs"][0]
    assert [report["tasks"][name]["skipped"] for name in ("task", "talk")] == [1, 1]
    assert [report["tasks"][name]["prompts"] for name in ("task", "talk")] == [1, 1]
    first, second = report["skipped"]
    assert "tokens, but the context holds 160" in first["why"]
    assert second["why"].startswith("turn 2 has ")
    assert report["unfinished"] == 0
    # What comes after them is asked all the same; and a task of nothing else has no figures.
    lost = report_of([evaluate(model, settings(model), [task_of(long)])])["runs"][0]
    assert lost["tasks"]["task"]["accepted_length"] is None
    assert lost["macro"]["accepted_length"] is None


def test_plain_decoding_gains_one_token_a_round(target):
    model = Model(target)
    run = evaluate(model, settings(model, schedule="off"), [task_of(*TEXTS[:2])])
    found = report_of([run])["runs"][0]["tasks"]["task"]
    assert (found["accepted_length"], found["drafted"], found["rounds"]) == (1, 0, 46)
    assert found["timings"]["tokens_per_s"] > 0


def test_thinking_is_refused_where_the_template_has_none(model):
    with pytest.raises(CompatibilityError, match="has no thinking mode"):
        evaluate(model, settings(model, thinking=True), [task_of("the cat")])


def test_drafters_are_compared_prompt_by_prompt(model, target, tiny):
    always = Model(target, tiny.KnowingDrafter(target))
    task = task_of(*TEXTS)
    base = settings(model)
    sometimes = evaluate(model, replace(base, drafter="sometimes"), [task])
    knowing = evaluate(always, replace(base, drafter="always"), [task.chosen(4, 0)])
    (pair,) = report_of([sometimes, knowing])["comparisons"]
    assert (pair["a"], pair["b"], pair["tasks"]["task"]["prompts"]) == ("always", "sometimes", 4)
    low, high = pair["macro"]["ci95"]
    assert 1 <= low < pair["macro"]["ratio"] < high
    assert pair["same_answers"] == 1
    longer = evaluate(always, replace(base, drafter="always", max_new_tokens=12), [task])
    assert len(report_of([sometimes, knowing, longer])["comparisons"]) == 1
