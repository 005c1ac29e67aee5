import gzip
import json

import pytest
import torch
from rich.console import Console

import dspark
from dspark.data.features.encoder import target_features
from dspark.data.samples import Sample
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.errors import CompatibilityError, DataError, RecipeError
from dspark.targets.target import Target
from dspark.training.drafters.new_drafter import find_mask_token, load_frozen_target
from dspark.training.drafters.objectives import DrafterObjective, Eagle3Objective
from dspark.training.drafters.samples import OnlineSamples, commonest_tokens
from dspark.training.recipe import load_recipe
from dspark.training.run import run_recipe
from tests.helpers.samples import write_samples
from tests.helpers.targets import tiny_llama

QUIET = Console(quiet=True)
RECIPE = """
kind: drafter
target: {target}
samples: {{root: {root}, paths: [s.jsonl.gz], max_length: 32, min_supervised: 4}}
optimiser: {{name: muon, learning_rate: 0.01, matrix_learning_rate: 0.01}}
run: {{output_dir: {root}/run, steps: 30, rows: 4, save_every: 10, log_every: 1}}
"""
ANCHORS = ["samples.num_anchors=8", "drafter.mask_token_id=39"]
ALGORITHMS = {
    "dspark": [
        "drafter={num_layers: 1, block_size: 4, markov_rank: 8, target_layer_ids: [0, 2]}",
        "loss.ce_first_steps=5",
        *ANCHORS,
    ],
    "dflash": ["drafter={num_layers: 1, block_size: 4, target_layer_ids: [0, 2]}", *ANCHORS],
    "eagle3": ["drafter={ttt_length: 3, target_layer_ids: [0, 2]}"],
    "mtp": [],
}


OTHERS = {  # what the published layout has no place for: written attached, to the run's directory
    "dspark reduced": ("dspark", ["drafter.draft_vocab_size=24"]),
    "dflash 1 + n": ("dflash", ["drafter.sample_from_anchor=false"]),
    "dspark both": (
        "dspark", ["drafter.sample_from_anchor=false", "drafter.draft_vocab_size=24"]
    ),
    "eagle3 reduced": ("eagle3", ["drafter.draft_vocab_size=24"]),
    "mtp of a projection": ("eagle3", ["drafter={ttt_length: 3, target_layer_ids: [3], "
                                      "input_projection: true}"]),
    "mtp reduced": ("mtp", ["drafter.draft_vocab_size=24"]),
}  # fmt: skip


def overrides_of(algorithm):
    return [f"algorithm={algorithm}", *ALGORITHMS[algorithm]]


@pytest.fixture
def recipe(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "target")
    write_samples(tmp_path / "s.jsonl.gz", 40)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(target=tmp_path / "target", root=tmp_path))
    return path


def log_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", [*ALGORITHMS, *OTHERS])
def test_training_writes_a_drafter_that_serves(recipe, tmp_path, kind):
    algorithm, others = OTHERS.get(kind, (kind, []))
    overrides = [*overrides_of(algorithm), *others]
    result = run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    most = {"dspark": 4, "dflash": 4, "eagle3": 3, "mtp": 1}[algorithm]
    most -= "drafter.sample_from_anchor=false" in others
    assert (tmp_path / "run" / "dspark").exists() is bool(others)
    assert 1 <= result.metrics["accepted_length"] <= 1 + most
    assert result.tokens_per_s > 0
    assert load_drafter(tmp_path / "run").block_size == most
    plain = dspark.load(tmp_path / "target", device="cpu").engine
    served = dspark.load(tmp_path / "target", draft=tmp_path / "run", device="cpu")
    requests = [dspark.Request((1, 2, 3, 4), dspark.SamplingParams(max_new_tokens=20))]
    drafted = served.engine(requests).run(requests)[0]
    assert drafted.token_ids == plain(requests).run(requests)[0].token_ids
    assert drafted.stats.drafted > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_are_the_algorithms(recipe, tmp_path, algorithm):
    run_recipe(str(recipe), overrides_of(algorithm), device="cpu", console=QUIET)
    for entry in log_of(tmp_path):
        if algorithm == "dspark":  # five steps of cross-entropy alone, then all losses
            ce, tv = (1.0, 0.0) if entry["step"] <= 5 else (0.1, 0.9)
            total = ce * entry["ce"] + tv * entry["tv"] + entry["confidence"]
        elif algorithm == "dflash":
            total = entry["ce"]
        else:
            passes = 3 if algorithm == "eagle3" else 1
            total = sum(0.8**t * entry[f"ce_{t + 1}"] for t in range(passes))
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_a_reduced_vocabulary_is_what_answers_hold_most_often(recipe, tmp_path):
    answer = (False, True, True, True, True)
    samples = [Sample((9, 5, 5, 3, 7), answer), Sample((9, 3, 5, 8, 7), answer)]
    assert commonest_tokens(samples, 3).tolist() == [3, 5, 7]  # 9 is no answer's
    assert commonest_tokens(samples, 6).tolist() == [0, 1, 3, 5, 7, 8]
    overrides = [*overrides_of("eagle3"), "drafter.draft_vocab_size=24", "run.steps=1"]
    run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    settings = load_recipe(str(recipe), overrides)
    tokens = OnlineSamples(settings, load_frozen_target(settings, "cpu", "float32")).draft_tokens
    assert torch.equal(load_drafter(tmp_path / "run").t2d.nonzero().flatten(), tokens)
    too_many = [*overrides, "drafter.draft_vocab_size=40"]
    with pytest.raises(CompatibilityError, match="draft_vocab_size is 40"):
        Eagle3Objective(load_recipe(str(recipe), too_many), Target.from_model(tiny_llama()))


def test_training_goes_on_with_other_samples_and_the_tokens_that_it_knew(recipe, tmp_path):
    overrides = [*overrides_of("eagle3"), "drafter.draft_vocab_size=24", "run.steps=1"]
    run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    known = load_drafter(tmp_path / "run").t2d
    write_samples(tmp_path / "s.jsonl.gz", 12)
    again = [*overrides, f"run.output_dir={tmp_path}/more"]
    other = load_recipe(str(recipe), again)
    chosen = OnlineSamples(other, load_frozen_target(other, "cpu", "float32")).draft_tokens
    assert not torch.equal(chosen, known.nonzero().flatten())  # the new samples' own differ
    run_recipe(str(recipe), [*again, f"initial={tmp_path}/run"], device="cpu", console=QUIET)
    assert torch.equal(load_drafter(tmp_path / "more").t2d, known)


def test_what_a_recipe_says_is_what_is_built(recipe, tmp_path):
    for algorithm in ALGORITHMS:
        output = f"run.output_dir={tmp_path}/{algorithm}"
        overrides = [*overrides_of(algorithm), output, "run.steps=1"]
        run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    dspark_, dflash, eagle3, mtp = (load_drafter(tmp_path / name) for name in ALGORITHMS)
    assert (dspark_.config.mask_token_id, dspark_.config.markov_rank) == (39, 8)
    assert dspark_.confidence_head is not None
    assert (dflash.markov_head, dflash.confidence_head) == (None, None)
    assert (eagle3.taps, eagle3.config.ttt_length) == ((0, 2), 3)
    assert (mtp.taps, mtp.config.ttt_length) == ((3,), 1)


@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
def test_resumed_drafter_training_is_exact(recipe, tmp_path, monkeypatch, algorithm):
    overrides = [*overrides_of(algorithm), f"run.output_dir={tmp_path}/whole"]
    run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    overrides[-1] = f"run.output_dir={tmp_path}/cut"
    objective = DrafterObjective if algorithm == "dspark" else Eagle3Objective
    real = objective.loss

    def die_at_step_25(self, step, part, parts):
        if step == 25:
            raise KeyboardInterrupt
        return real(self, step, part, parts)

    monkeypatch.setattr(objective, "loss", die_at_step_25)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    monkeypatch.undo()
    run_recipe(str(recipe), overrides, device="cpu", resume=True, console=QUIET)
    whole = load_drafter(tmp_path / "whole").state_dict()
    cut = load_drafter(tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def objective_of(recipe, algorithm, *overrides):
    settings = load_recipe(str(recipe), [*overrides_of(algorithm), *overrides])
    kind = DrafterObjective if algorithm in ("dspark", "dflash") else Eagle3Objective
    return kind(settings, load_frozen_target(settings, "cpu", "float32"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_is_the_same_however_it_is_divided(recipe, algorithm):
    objective = objective_of(recipe, algorithm)
    names = [name for name, _ in objective.module.named_parameters()]
    found = []
    for parts in (1, 2, 4):
        objective.tokens_seen = 0
        objective.module.zero_grad()
        losses = []
        for part in range(parts):
            loss, _ = objective.loss(7, part, parts)
            (loss / parts).backward()
            losses.append(loss.item())
        grads = {n: p.grad.clone() for n, p in objective.module.named_parameters()}
        found.append((sum(losses) / parts, objective.tokens_seen, grads))
    for loss, tokens, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert tokens == found[0][1] > 0
        for name in names:
            torch.testing.assert_close(grads[name], found[0][2][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "weights", "total"),
    [
        ("dspark", "{ce: 0, tv: 0, kl: 0.5, lk: 0.2}", {"kl": 0.5, "lk": 0.2, "confidence": 1}),
        ("dflash", "{ce: 0.1, tv: 0.3}", {"ce": 0.1, "tv": 0.3}),
        ("dspark", "{ce: 0, tv: 0, lk_hybrid: 1, lk_eta: 0.001}", {"kl": 1, "confidence": 1}),
        ("dspark", "{ce: 0, tv: 0, lk_hybrid: 1, lk_eta: 900}", {"tv": 0.5, "confidence": 1}),
    ],
)
def test_other_losses_are_what_a_recipe_says(recipe, algorithm, weights, total):
    loss, metrics = objective_of(recipe, algorithm, f"loss={weights}").loss(3, 0, 1)
    assert loss.item() == pytest.approx(sum(w * metrics[n] for n, w in total.items()), rel=2e-3)


def test_an_autoregressive_drafter_may_learn_from_other_terms(recipe):
    for algorithm in ("eagle3", "mtp"):
        objective = objective_of(recipe, algorithm, "loss={soft_ce: 0, tv: 0.5, lk: 0.1}")
        loss, metrics = objective.loss(3, 0, 1)
        assert metrics["ce_1"] == 0
        assert 0 < loss.item() < 6
        loss.backward()
        assert all(p.grad.any() for p in objective.module.parameters())


@pytest.mark.parametrize(
    ("algorithm", "override", "said"),
    [
        ("dspark", "loss={ce: 0, tv: 0}", "all 0, which trains nothing"),
        ("dflash", "loss={ce: 0}", "all 0, which trains nothing"),
        ("mtp", "loss={soft_ce: 0}", "all 0, which trains nothing"),
        ("dspark", "loss.lk_eta=2", "lk_eta .* has no effect if lk_hybrid is 0"),
        ("dspark", "loss={confidence: 0}", "untrained"),
        (
            "dspark",
            "loss={confidence: 0, detach_confidence: true}",
            "detach_confidence has no effect",
        ),
        ("dspark", "loss={ce: 1, tv: 0, ce_first_steps: 5}", "ce_first_steps .* beside ce alone"),
        ("dflash", "loss.confidence=1", "no key 'loss.confidence'"),
        ("eagle3", "loss.ce=1", "no key 'loss.ce'"),
        ("mtp", "loss.step_loss_decay=1", "no key 'loss.step_loss_decay'"),
    ],
)
def test_losses_that_mean_nothing_are_refused(recipe, algorithm, override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(recipe), [f"algorithm={algorithm}", override])


def test_a_confidence_weight_needs_the_head(recipe):
    off = "drafter.confidence_head=false"
    assert load_recipe(str(recipe), [off]).drafter.confidence_head is False
    with pytest.raises(RecipeError, match=r"loss\.confidence has no effect if"):
        load_recipe(str(recipe), [off, "loss.confidence=1"])


def test_an_eagle3_drafter_can_be_attached(recipe, tmp_path):
    overrides = [*overrides_of("eagle3"), "layout=attached", "run.steps=2"]
    run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    assert load_drafter(tmp_path / "target").taps == (0, 2)


def test_features_are_the_models_own_layer_outputs():
    model = tiny_llama().eval()
    samples = [Sample((1, 2, 3, 4, 5), (True,) * 5), Sample((6, 7, 8), (True,) * 3)]
    with torch.no_grad():
        wanted = [
            model(input_ids=torch.tensor([s.input_ids]), output_hidden_states=True).hidden_states
            for s in samples
        ]
    target = Target.from_model(model)
    features, hidden = target_features(target, samples, (-1, 0, 2))
    own = [torch.cat([states[0], states[1], states[3]], dim=-1)[0] for states in wanted]
    last = [states[-1][0] for states in wanted]
    torch.testing.assert_close(features, torch.cat(own), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden, torch.cat(last), atol=1e-5, rtol=0)


def test_without_a_tokenizer_the_mask_is_learned_and_saved_attached(recipe, tmp_path):
    assert find_mask_token(Target.from_model(tiny_llama())) is None
    overrides = [*overrides_of("dspark")[:-1], "run.steps=2"]
    run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    drafter = load_drafter(tmp_path / "run")
    assert drafter.mask_embedding is not None


def test_rows_must_divide_over_the_processes(recipe, monkeypatch):
    monkeypatch.setattr("dspark.training.run.start_parallel", lambda _: (0, 3))
    with pytest.raises(RecipeError, match=r"rows is 4, .* multiple of the 3 parts"):
        run_recipe(str(recipe), [], device="cpu", console=QUIET)


@pytest.mark.parametrize(
    ("override", "error", "said"),
    [
        ("samples.max_length=65", RecipeError, "context holds 64"),
        ("samples.min_supervised=30", DataError, "0 usable samples"),
        ("samples.paths=[gone.jsonl]", DataError, "does not exist"),
    ],
)
def test_bad_samples_are_refused(recipe, override, error, said):
    with pytest.raises(error, match=said):
        run_recipe(str(recipe), [override], device="cpu", console=QUIET)


def test_samples_of_another_vocabulary_are_refused(recipe, tmp_path):
    with gzip.open(tmp_path / "s.jsonl.gz", "at") as file:
        file.write(json.dumps({"input_ids": [99] * 20, "prompt_len": 1}) + "\n")
    with pytest.raises(DataError, match="token 99"):
        run_recipe(str(recipe), [], device="cpu", console=QUIET)
