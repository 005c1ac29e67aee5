"""Runs of whole recipes: measurement, warm start, compilation, budget."""

import gzip
import io
import json
import re

import pytest
import torch
from rich.console import Console

from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.engine.model import Model
from dspark.errors import CompatibilityError, RecipeError, TrainingError
from dspark.evaluation.check.live import accepted, render
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target
from dspark.training.run import Judge, plan_recipe, run_recipe
from tests.helpers.checkpoints import save_speculators
from tests.helpers.samples import write_samples
from tests.helpers.targets import tiny_llama

QUIET = Console(quiet=True)
JUDGE = Judge(
    decode=lambda target, drafter, requests: accepted(Model(target), drafter, requests),
    encode=lambda target, prompts: render(Model(target), prompts),
)
RECIPE = """
kind: drafter
target: {root}/target
drafter: {{num_layers: 1, block_size: 4, markov_rank: 8, target_layer_ids: [0, 2],
  mask_token_id: 39}}
samples: {{root: {root}, paths: [s.jsonl.gz], max_length: 32, min_supervised: 4, num_anchors: 8}}
optimiser: {{name: muon, learning_rate: 0.01, matrix_learning_rate: 0.01}}
run: {{output_dir: {root}/run, steps: 12, rows: 4, save_every: 6, log_every: 1}}
"""
EAGLE3 = ["algorithm=eagle3", "drafter={ttt_length: 3, target_layer_ids: [0, 2]}"]
MEASURED = ["run.evaluate_every=6", "evaluation={heldout: 6, limit: 5, max_new_tokens: 12}"]


@pytest.fixture
def recipe(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "target")
    write_samples(tmp_path / "s.jsonl.gz", 40)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(root=tmp_path))
    return path


def run(recipe, *overrides, resume=False, judge=JUDGE):
    if "algorithm=eagle3" in overrides:  # whose recipes know no anchors
        recipe.write_text(recipe.read_text().replace(", num_anchors: 8", ""))
    return run_recipe(
        str(recipe), overrides, device="cpu", console=QUIET, resume=resume, judge=judge
    )


def log_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
def test_the_real_accepted_length_is_the_engines_of_the_best_drafter(recipe, tmp_path, algorithm):
    result = run(recipe, *(EAGLE3 if algorithm == "eagle3" else []), *MEASURED)
    log = {entry["step"]: entry for entry in log_of(tmp_path)}
    lengths = {s: e["real_accepted_length"] for s, e in log.items() if "real_accepted_length" in e}
    assert list(lengths) == [6, 12]
    assert result.metrics["real_accepted_length"] == lengths[12]
    best = max(lengths, key=lengths.get)
    target = Target.load(tmp_path / "target", device="cpu")
    drafter = load_drafter(tmp_path / "run" / "best").float()
    drafter.bind(target.parts())
    with gzip.open(tmp_path / "s.jsonl.gz", "rt") as file:
        lines = file.read().splitlines()[-6:][:5]
    for temperature in (0.0, 1.0):
        requests = [
            Request(
                tuple(json.loads(line)["input_ids"][:3]),
                SamplingParams(12, temperature=temperature, seed=seed),
            )
            for seed, line in enumerate(lines)
        ]
        length = accepted(Model(target), drafter, requests).accepted_length
        # The checkpoint is bfloat16; what was measured was not.
        logged = log[best][f"real_accepted_length_t{temperature:g}"]
        assert logged == pytest.approx(length, rel=0.1)
    both = [log[best][f"real_accepted_length_t{t}"] for t in (0, 1)]
    assert lengths[best] == pytest.approx(sum(both) / 2)


def test_held_out_samples_are_not_trained_on(recipe, tmp_path):
    def seen(*overrides):
        output = f"run.output_dir={tmp_path}/{len(overrides)}"
        return run(recipe, *overrides, output, "run.epochs=1", "run.steps=null").steps

    assert seen() == 10
    assert seen(*MEASURED) == 8
    with pytest.raises(RecipeError, match=r"heldout is 40, but there are 40 usable samples"):
        seen("run.evaluate_every=6", "evaluation.heldout=40")


def test_measuring_changes_nothing_of_the_run(recipe, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    judge = Judge(JUDGE.decode, lambda target, prompts: [(1, 2, 3)] * len(prompts))
    evaluation = f"evaluation={{prompts: {prompts}, temperatures: [1.0], max_new_tokens: 8}}"
    run(recipe, "run.evaluate_every=3", evaluation, judge=judge)
    measured = load_drafter(tmp_path / "run").state_dict()
    entry = log_of(tmp_path)[-1]
    assert entry["real_accepted_length"] == entry["real_accepted_length_t1"]
    run(recipe, f"run.output_dir={tmp_path}/plain")
    plain = load_drafter(tmp_path / "plain").state_dict()
    assert all(torch.equal(measured[name], plain[name]) for name in plain)


def test_a_measurement_needs_somebody_who_measures(recipe):
    with pytest.raises(RecipeError, match=r"hand run_recipe a judge"):
        run(recipe, *MEASURED, judge=None)


def test_an_attached_run_keeps_its_best_beside_itself(recipe, tmp_path):
    run(recipe, *MEASURED, "layout=attached")
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert (tmp_path / "target" / "dspark" / "model.safetensors").is_file()


def test_the_average_is_measured_and_exported(recipe, tmp_path):
    run(recipe, *MEASURED, "optimiser.ema=0.5")
    averaged = load_drafter(tmp_path / "run").state_dict()
    run(recipe, f"run.output_dir={tmp_path}/plain")
    plain = load_drafter(tmp_path / "plain").state_dict()
    assert not torch.equal(averaged["fc.weight"], plain["fc.weight"])


@pytest.mark.parametrize("layout", ["published", "attached", "speculators"])
def test_a_warm_start_takes_the_weights_of_any_layout(recipe, tmp_path, layout):
    run(recipe)
    first = tmp_path / "run"
    if layout != "published":
        drafter = load_drafter(first)
        first = tmp_path / layout
        first.mkdir()
        if layout == "attached":
            save_attached(drafter, first)
        else:
            save_speculators(drafter, first)
    frozen = "optimiser={learning_rate: 1.0e-12, matrix_learning_rate: 1.0e-12}"
    again = f"run.output_dir={tmp_path}/again"
    run(recipe, f"initial={first}", again, frozen, "run.steps=1")
    mine, theirs = (load_drafter(p).state_dict() for p in (tmp_path / "again", first))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_warm_start_from_fewer_heads_leaves_the_others_new(recipe, tmp_path):
    said = Console(file=io.StringIO(), record=True)
    run(recipe, "drafter.markov_rank=0", "drafter.confidence_head_with_markov=false")
    run_recipe(
        str(recipe),
        [f"initial={tmp_path}/run", f"run.output_dir={tmp_path}/again", "run.steps=1",
         "drafter.confidence_head_with_markov=false"],
        device="cpu",
        console=said,
    )  # fmt: skip
    text = said.export_text()
    assert "new are markov_head.markov_w1.weight, markov_head.markov_w2.weight." in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["drafter.markov_rank=4"], r"markov_w1.weight of shape \[40, 8\], but .* \[40, 4\]"),
        (["drafter.num_layers=2"], None),
        (["drafter.target_layer_ids=[1, 2]"], r"reads target_layer_ids \[0, 2\]"),
        (["drafter.markov_rank=0", "drafter.confidence_head_with_markov=false"], "shape|lacks"),
        (EAGLE3, "a drafter of another kind"),
    ],
)
def test_a_warm_start_that_does_not_fit_is_refused_by_name(recipe, tmp_path, overrides, said):
    run(recipe)
    overrides = [*overrides, f"initial={tmp_path}/run", f"run.output_dir={tmp_path}/again"]
    if said is None:  # further layers are new
        run(recipe, *overrides)
        return
    with pytest.raises(CompatibilityError, match=said):
        run(recipe, *overrides)


def test_a_compiled_run_takes_the_same_steps(recipe, tmp_path, monkeypatch):
    compiled = []

    def compile_eagerly(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr("dspark.training.run.torch.compile", compile_eagerly)
    run(recipe, "run.compile=true")
    assert len(compiled) == 1


def test_where_compiling_fails_the_run_goes_on_plainly_and_says_so_once(
    recipe, tmp_path, monkeypatch
):
    from torch._dynamo.exc import TorchDynamoException

    def broken(function, **options):
        def call(*args):
            raise TorchDynamoException("no compiler is here")

        return call

    monkeypatch.setattr("dspark.training.run.torch.compile", broken)
    said = Console(file=io.StringIO(), record=True)
    run_recipe(str(recipe), ["run.compile=true"], device="cpu", console=said)
    assert said.export_text().count("torch.compile failed (no compiler is here)") == 1
    losses = [entry["loss"] for entry in log_of(tmp_path)]
    run(recipe, f"run.output_dir={tmp_path}/plain")
    lines = (tmp_path / "plain" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses


def test_the_budget_counts_what_the_run_will_hold(recipe, tmp_path):
    console = Console(file=io.StringIO(), record=True)
    overrides = ["run.dtype=bfloat16", "optimiser.name=adamw", "optimiser.ema=0.9"]
    budget = plan_recipe(str(recipe), overrides, device="cpu", console=console, judge=JUDGE)
    assert not (tmp_path / "run").exists()
    run(recipe, *overrides)
    drafter = load_drafter(tmp_path / "run")
    count = sum(p.numel() for p in drafter.parameters())
    assert budget.parameters == count
    assert budget.steps == budget.steps_left == 12
    lengths = [12 + i % 12 for i in range(40)]
    assert budget.tokens_per_step == pytest.approx(4 * sum(lengths) / 40)
    memory = budget.memory_bytes
    assert (memory["weights"], memory["masters"]) == (2 * count, 4 * count)
    assert (memory["optimiser"], memory["average"]) == (8 * count, 4 * count)
    assert memory["features"] == pytest.approx(budget.tokens_per_step * 3 * 32 * 2, abs=1)
    assert memory["measured"] > 1e8
    folder = tmp_path / "run" / "checkpoints" / "step_00000012"
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert budget.checkpoint_bytes == 16 * count
    tensors = 5 * len(list(drafter.parameters()))  # each has a header of its own
    assert budget.checkpoint_bytes <= written < budget.checkpoint_bytes + 4096 * tensors
    assert budget.seconds_per_step > 0
    [line] = [s for s in console.export_text().splitlines() if s]
    assert re.search(
        r"Budget: 10\.6 k parameters to train; 12 of 12 steps of 68\.4 tokens, 821 in", line
    )
    assert " s per step, " in line


def test_a_disk_too_small_for_the_checkpoints_is_refused(recipe, monkeypatch):
    from dspark.training import budget

    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: full)
    with pytest.raises(TrainingError, match=r"need .*, but the disk of .* has 1 kB free"):
        run(recipe)
