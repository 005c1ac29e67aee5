"""Fits from a model to a served drafter: whole, cut in every stage, refused."""

import contextlib
import json
import resource
import shutil
from dataclasses import asdict, replace

import pytest

import dspark.fitting.run as fitting
from dspark.cli.main import main
from dspark.data.files.atomic import only_run
from dspark.data.files.json_lines import read_json_lines
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine.loading import load
from dspark.errors import DSparkError, UsageError
from dspark.fitting import answers, stages, training
from dspark.fitting.answers import FitOptions
from dspark.fitting.progress import STAGES
from dspark.fitting.run import dry_run, fit
from dspark.training.checkpoints import saved_steps

KEYS = {
    "stages", "prompts", "answers", "anchors", "accepted_length", "speedup", "ece", "output_dir",
}  # fmt: skip


class Killed(BaseException):
    """Nothing in the package catches it."""


class Silent:
    """A watcher that shows nothing."""

    def begin(self, stage, planned_s):
        pass

    def advance(self, done, total, left_s):
        pass

    def end(self, stage, seconds, *, skipped):
        pass

    def say(self, sentence):
        pass


class Killer(Silent):
    """Kills a run at the n-th progress of a stage."""

    without_progress = ("attach",)

    def __init__(self, stage, at=1):
        self.stage, self.left, self.running, self.said = stage, at, "", []

    def begin(self, stage, planned_s):
        self.running = stage
        if stage == self.stage and stage in self.without_progress:
            raise Killed

    def advance(self, done, total, left_s):
        if self.running == self.stage:
            self.left -= 1
            if not self.left:
                raise Killed

    def say(self, sentence):
        self.said.append(sentence)


@pytest.fixture
def target(model_files, tmp_path):
    return shutil.copytree(model_files, tmp_path / "model")


@pytest.fixture
def fast(monkeypatch, speeds):
    """No measuring; a forward that is worth keeping."""
    slow = asdict(replace(speeds, row_s=0.018))
    decoding = {name: slow.pop(name) for name in [*slow] if name.startswith(("batch", "single"))}
    monkeypatch.setattr(fitting, "generation_speeds", lambda *_, **__: decoding)
    monkeypatch.setattr(fitting, "training_speeds", lambda *_, **__: slow)


@pytest.fixture(params=["eagle3", "dspark"])
def algorithm(request, monkeypatch):
    """What is trained: a drafter of one draft a round, or of blocks, with confidences."""
    drafts = {"eagle3": 1, "dspark": 3}[request.param]
    monkeypatch.setattr(fitting, "choose_block_size", lambda _: drafts)
    if request.param == "eagle3":
        monkeypatch.setattr(Killer, "without_progress", ("attach", "calibration"))
    return request.param


def wish(target, tmp_path, **changes):
    given = {"budget_s": 6.0, "out": tmp_path / "out"} | changes
    return FitOptions(str(target), **given)


def loader(target, loads=None):
    def act():
        if loads is not None:
            loads.append(target)
        return load(target, "none")

    return act


def stage_names(result):
    return [stage["name"] for stage in result["stages"]]


def asked(path):
    return {json.dumps(record.get("turns") or record.get("prompt")) for _, record in
            read_json_lines(path)}  # fmt: skip


def test_a_run_that_is_killed_in_every_stage_goes_on_to_the_same_end(
    target, tmp_path, fast, algorithm
):
    """What was finished is not done again; what was begun goes on; the drafter is attached."""
    out, wanted = tmp_path / "fit", None
    for stage in STAGES[1:]:
        wanted = wish(target, tmp_path, out=out)
        with pytest.raises(Killed):
            fit(wanted, loader(target), Killer(stage, at=1))
        state = json.loads((out / "fit.json").read_text())
        assert state["done"] == list(STAGES[: STAGES.index(stage)])
        with only_run(out):  # the lock is free again
            pass
    result = fit(wanted, loader(target), Silent())
    assert set(result) >= KEYS
    assert stage_names(result) == list(STAGES)
    assert [s["skipped"] for s in result["stages"]] == [True] * 8 + [False]
    assert result["answers"] > 0
    assert any((out / "features").glob("shard-*"))
    assert result["anchors"] > 0
    assert result["accepted_length"]["t0"] >= 1
    assert result["speedup"]["t1"] > 0
    drafter = load(target, out).drafter
    assert isinstance(drafter, DSparkDrafter) == (algorithm == "dspark")
    assert drafter.config.backbone.query_key_norms == (algorithm == "dspark"), "Llama's layer"
    assert drafter.block_size == {"eagle3": 1, "dspark": 3}[algorithm]
    again = fit(wanted, loader(target), Silent())
    assert all(stage["skipped"] for stage in again["stages"])
    assert again["domains"] == result["domains"]
    parts = [asked(out / "prompts" / f"{name}.jsonl") for name in
             ("train", "calibration", "heldout")]  # fmt: skip
    assert len(set.union(*parts)) == sum(map(len, parts))  # no prompt is in two of them


def test_without_out_the_drafter_is_attached_once(target, tmp_path, fast, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "asked.jsonl"
    lines = [{"prompt": f"name {i} rivers", "category": "ab"[i % 2]} for i in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    wanted = wish(target, tmp_path, out=None, prompts=(str(prompts),), budget_s=5.0)
    result = fit(wanted, loader(target), Silent())
    assert result["output_dir"] == "fit-model"
    assert result["attached"] == str(target / "dspark")
    assert set(result["domains"]) == {"a", "b", "all"}
    assert result["commands"]["dspark"] == f"dspark serve {target}"
    assert load(str(target)).name == str(target)
    second = fitting._attach_to(wanted)
    assert second is None  # another run would not replace it


def test_a_dry_run_starts_nothing(target, tmp_path, fast):
    plan = dry_run(wish(target, tmp_path), loader(target), Silent().say)
    assert plan.steps > 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"too small .* give --budget \S+ or more"):
        dry_run(wish(target, tmp_path, budget_s=0.01), loader(target), Silent().say)


def test_two_runs_on_one_folder_and_another_wish_are_refused(target, tmp_path, fast):
    wanted, loads = wish(target, tmp_path), []
    with only_run(wanted.folder), pytest.raises(UsageError, match="in use by another run"):
        fit(wanted, loader(target, loads), Silent())
    assert loads == []
    with pytest.raises(Killed):
        fit(wanted, loader(target), Killer("prompts"))
    with pytest.raises(UsageError, match="holds a run with budget '6s', but this one has '9s'"):
        fit(wish(target, tmp_path, budget_s=9.0), loader(target), Silent())


@contextlib.contextmanager
def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


STAGE_FUNCTIONS = {
    "prompts": (answers, "write_prompts"),
    "answers": (answers, "write_answers"),
    "features": (training, "write_features"),
    "training": (training, "train"),
    "calibration": (stages, "calibrate_pair"),
    "costs": (stages, "measure_costs"),
    "evaluation": (stages, "evaluate_pair"),
    "attach": (stages, "attach"),
}


def test_a_full_disk_in_any_stage_is_one_sentence(target, tmp_path, fast, monkeypatch, algorithm):
    """And with room again the run goes on."""
    wanted = wish(target, tmp_path)
    for stage, (module, name) in STAGE_FUNCTIONS.items():
        if (algorithm, stage) == ("eagle3", "calibration"):  # which writes nothing
            continue
        act = getattr(module, name)

        def full(*given, act=act):
            with full_disk():
                return act(*given)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            if stage == "attach":
                patch.setattr(module, name, lambda run, _, full=full: full(run, target))
            with pytest.raises((DSparkError, OSError)) as error:
                fit(wanted, loader(target), Silent())
        sentence = str(error.value)
        assert "File too large" in sentence, (stage, sentence)
        assert isinstance(error.value, DSparkError) or error.value.filename, stage
        assert json.loads((wanted.folder / "fit.json").read_text())["done"] == list(
            STAGES[: STAGES.index(stage)]
        )
    assert fit(wanted, loader(target), Silent())["attached"] is None


def test_a_signal_in_training_says_how_to_go_on(target, tmp_path, fast):
    import os
    import signal

    class Signal(Killer):
        def advance(self, done, total, left_s):
            if self.running == "training" and done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    wanted = wish(target, tmp_path, budget_s=40.0)
    with pytest.raises(DSparkError, match=r"Stopped by SIGTERM.*go on with the same command"):
        fit(wanted, loader(target), Signal("training"))
    assert saved_steps(wanted.folder / "training")


def test_a_model_without_a_template_is_fitted_and_this_is_said(target, tmp_path, fast):
    (target / "chat_template.jinja").unlink()
    watcher = Killer("none")
    result = fit(wish(target, tmp_path), loader(target), watcher)
    assert any("no chat template" in sentence for sentence in watcher.said)
    assert result["answers"] > 0


def test_the_command_fits_the_bundled_model(tmp_path, capsys):
    words = ["fit", "bundled", "--budget", "25s", "--out", str(tmp_path / "fit"), "--json"]
    status = main(words)
    captured = capsys.readouterr()
    if status == 2 and "too small" in captured.err:
        pytest.skip("this machine is too busy for a fit in 25 s")
    result = json.loads(captured.out.splitlines()[-1])
    assert set(result) >= KEYS
    assert result["seconds"] < 50
    assert result["accepted_length"]["t0"] >= 1
    assert result["commands"]["dspark"] == f"dspark serve bundled --draft {tmp_path / 'fit'}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budget", "soon"], "must be a time such as"),
        (["--dtype", "float16"], "in which nothing is trained"),
    ],
)
def test_bad_options(target, capsys, words, sentence):
    assert main(["fit", str(target), *words]) == 2
    assert sentence in capsys.readouterr().err
