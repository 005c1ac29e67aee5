import gzip
import json

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import dspark
from dspark.data.samples import Sample
from dspark.drafters.checkpoint import load_drafter
from dspark.errors import DataError, RecipeError
from dspark.targets.target import Target
from dspark.training.drafter import DrafterObjective, find_mask_token, target_features
from dspark.training.run import run_recipe

QUIET = Console(quiet=True)
RECIPE = """
kind: drafter
target: {target}
drafter: {{num_layers: 1, block_size: 4, markov_rank: 8, target_layer_ids: [0, 2]}}
loss: {{ce_first_steps: 5}}
samples: {{root: {root}, paths: [s.jsonl.gz], max_length: 32, min_supervised: 4, num_anchors: 8}}
optimiser: {{name: muon, learning_rate: 0.01, matrix_learning_rate: 0.01}}
run: {{output_dir: {root}/run, steps: 30, rows: 4, save_every: 10, log_every: 1}}
"""


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def recipe(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "target")
    generator = torch.Generator().manual_seed(1)
    with gzip.open(tmp_path / "s.jsonl.gz", "wt") as file:
        for i in range(40):
            ids = torch.randint(0, 40, (12 + i % 12,), generator=generator).tolist()
            file.write(json.dumps({"input_ids": ids, "prompt_len": 3}) + "\n")
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(target=tmp_path / "target", root=tmp_path))
    return path


def log_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


def test_training_writes_a_drafter_that_serves(recipe, tmp_path):
    overrides = ["drafter.mask_token_id=39"]
    result = run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    log = log_of(tmp_path)
    for entry in log:  # five steps of cross-entropy alone, then METHOD.md 3
        ce, tv = (1.0, 0.0) if entry["step"] <= 5 else (0.1, 0.9)
        total = ce * entry["ce"] + tv * entry["tv"] + entry["confidence"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert 1 <= result.metrics["accepted_length"] <= 5
    assert result.tokens_per_s > 0
    assert load_drafter(tmp_path / "run").config.mask_token_id == 39
    plain = dspark.load(tmp_path / "target", device="cpu").engine
    served = dspark.load(tmp_path / "target", draft=tmp_path / "run", device="cpu")
    requests = [dspark.Request((1, 2, 3, 4), dspark.SamplingParams(max_new_tokens=20))]
    drafted = served.engine(requests).run(requests)[0]
    assert drafted.token_ids == plain(requests).run(requests)[0].token_ids
    assert drafted.stats.drafted > 0


def test_resumed_drafter_training_is_exact(recipe, tmp_path, monkeypatch):
    overrides = ["drafter.mask_token_id=39", f"run.output_dir={tmp_path}/whole"]
    run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    overrides[1] = f"run.output_dir={tmp_path}/cut"
    real = DrafterObjective.loss

    def die_at_step_25(self, step, rank, ranks):
        if step == 25:
            raise KeyboardInterrupt
        return real(self, step, rank, ranks)

    monkeypatch.setattr(DrafterObjective, "loss", die_at_step_25)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(str(recipe), overrides, device="cpu", console=QUIET)
    monkeypatch.undo()
    run_recipe(str(recipe), overrides, device="cpu", resume=True, console=QUIET)
    whole = load_drafter(tmp_path / "whole").state_dict()
    cut = load_drafter(tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


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
    for row, states in enumerate(wanted):
        length = len(samples[row].input_ids)
        own = torch.cat([states[0], states[1], states[3]], dim=-1)[0]
        torch.testing.assert_close(features[row, :length], own, atol=1e-5, rtol=0)
        torch.testing.assert_close(hidden[row, :length], states[-1][0], atol=1e-5, rtol=0)
        assert features[row, length:].abs().sum() == 0


def test_without_a_tokenizer_the_mask_is_learned_and_saved_attached(recipe, tmp_path):
    assert find_mask_token(Target.from_model(tiny_llama())) is None
    run_recipe(str(recipe), ["run.steps=2"], device="cpu", console=QUIET)
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
