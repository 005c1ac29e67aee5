from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dspark.drafters.checkpoints.registry import write_config
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.errors import CompatibilityError, RecipeError
from dspark.training.drafters.new_drafter import drafter_config, eagle3_config
from dspark.training.recipe import DrafterRecipe, TargetRecipe, load_recipe, recipe_names

MINIMAL = """
kind: drafter
target: some/where
samples: {paths: [a.jsonl]}
run: {output_dir: out, steps: 10}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipes_are_valid(name):
    assert isinstance(load_recipe(name), TargetRecipe | DrafterRecipe)


def test_defaults_are_the_papers(minimal):
    recipe = load_recipe(str(minimal))
    assert isinstance(recipe, DrafterRecipe)
    assert (recipe.loss.ce, recipe.loss.tv, recipe.loss.confidence) == (0.1, 0.9, 1.0)
    assert (recipe.drafter.num_layers, recipe.drafter.block_size) == (5, 7)
    assert recipe.drafter.markov_rank == 256


def test_overrides_reach_nested_keys(minimal):
    recipe = load_recipe(str(minimal), ["run.steps=3", "samples.paths=[x, y]", "loss.ce=1.0"])
    assert recipe.run.steps == 3
    assert recipe.samples.paths == ("x", "y")
    assert recipe.loss.ce == 1.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.stepz=3", "run.stepz"),
        ("speed=3", "speed"),
        ("run.row_tokens=64", "no key 'run.row_tokens'"),
        ("run.epochs=2", "run: a run has either steps or epochs, but both are given"),
        ("run.steps=null", "run: a run has either steps or epochs, but neither is given"),
        ("run.evaluate_every=5", "run.evaluate_every has no effect without evaluation"),
        ("evaluation={heldout: 4}", "evaluation has no effect without run.evaluate_every"),
        ("evaluation={limit: 4}", "either prompts or heldout samples, but neither is given"),
        ("optimiser.decay_fraction=0.2", "has no effect beside schedule cosine"),
        ("run.steps=none", "run.steps"),
        ("run.steps=0", "run.steps"),
        ("optimiser.learning_rate=-1", "learning_rate"),
        ("run.steps", "not of the form key=value"),
        ("target.deeper=1", "goes below a value"),
        ("kind=painter", "painter"),
    ],
)
def test_what_does_not_fit_is_named(minimal, override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(minimal), [override])


@pytest.mark.parametrize(
    ("algorithm", "override", "said"),
    [
        ("dflash", "drafter.markov_rank=64", "recipe for dflash has no key 'drafter.markov_rank'"),
        ("dflash", "drafter.confidence_head=true", "drafter.confidence_head"),
        ("dflash", "loss.confidence=1", "loss.confidence"),
        ("eagle3", "drafter.num_layers=2", "recipe for eagle3 has no key 'drafter.num_layers'"),
        ("eagle3", "drafter.block_size=7", "drafter.block_size"),
        ("eagle3", "samples.num_anchors=8", "samples.num_anchors"),
        ("eagle3", "loss.decay=4", "loss.decay"),
        ("eagle3", "run.compile=true", "run.compile is for dspark and dflash"),
        ("mtp", "run.compile=true", "run.compile is for dspark and dflash"),
        ("mtp", "drafter.ttt_length=2", "recipe for mtp has no key 'drafter.ttt_length'"),
        ("mtp", "drafter.target_layer_ids=[1]", "drafter.target_layer_ids"),
        ("mtp", "loss.step_loss_decay=0.5", "no key 'loss.step_loss_decay'"),
        ("dspark", "drafter.ttt_length=2", "recipe for dspark has no key 'drafter.ttt_length'"),
        ("medusa", "run.steps=1", "algorithm is 'medusa', but .* dspark, dflash, eagle3, mtp"),
        ("[mtp]", "run.steps=1", "algorithm is"),
    ],
)
def test_what_contradicts_the_algorithm_is_named(minimal, algorithm, override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(minimal), [f"algorithm={algorithm}", override])


@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_layers_are_named_in_one_way(minimal, algorithm):
    both = ["drafter.num_taps=3", "drafter.target_layer_ids=[0, 1, 2]", f"algorithm={algorithm}"]
    with pytest.raises(
        RecipeError, match=r"drafter: num_taps \(3\) has no effect beside target_la"
    ):
        load_recipe(str(minimal), both)
    assert load_recipe(str(minimal), both[1:]).drafter.taps(12) == (0, 1, 2)
    assert load_recipe(str(minimal), both[::2]).drafter.taps(12) == (1, 5, 9)
    assert len(load_recipe(str(minimal), both[2:]).drafter.taps(12)) == 5


def test_missing_recipe_lists_the_bundled_ones():
    with pytest.raises(RecipeError, match="bundled_target"):
        load_recipe("nonsense")


def test_invalid_yaml_and_a_bare_list(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="no mapping"):
        load_recipe(str(path))


def test_a_recipe_extends_another_key_by_key(minimal, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("extends: r\nloss: {ce: 0.5}\nrun: {steps: 4}\n")
    last = tmp_path / "last.yaml"
    last.write_text("extends: own\nrun: {seed: 7}\nsamples: {paths: [b.jsonl, c.jsonl]}\n")
    recipe = load_recipe(str(last), ["run.rows=2"])
    assert (recipe.loss.ce, recipe.loss.tv) == (0.5, 0.9)
    assert (recipe.run.steps, recipe.run.seed, recipe.run.rows) == (4, 7, 2)
    assert (recipe.samples.paths, recipe.run.output_dir) == (("b.jsonl", "c.jsonl"), "out")
    own.write_text("extends: last\n")
    with pytest.raises(RecipeError, match=r"extends itself, by way of .*; remove one"):
        load_recipe(str(last))
    own.write_text("extends: gone\n")
    with pytest.raises(RecipeError, match="no recipe 'gone'"):
        load_recipe(str(last))


@dataclass
class Shapes:
    """A target of which only the configuration is there."""

    config: Any
    tokenizer: Any = None

    num_layers = property(lambda self: self.config.num_hidden_layers)
    hidden_size = property(lambda self: self.config.hidden_size)
    vocab_size = property(lambda self: self.config.vocab_size)
    max_context = property(lambda self: self.config.max_position_embeddings)


def qwen3(hidden, heads, intermediate, layers):
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


TARGETS = {
    "qwen3_4b": lambda: qwen3(2560, 32, 9728, 36),
    "qwen3_8b": lambda: qwen3(4096, 32, 12288, 36),
    "qwen3_14b": lambda: qwen3(5120, 40, 17408, 40),
    "gemma4_12b": lambda: AutoConfig.for_model(
        "gemma4_text",
        vocab_size=262144,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=30.0,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 8,
    ),
}
ALGORITHMS = ("dspark", "dflash", "eagle3")


def published(algorithm, target):
    """A published recipe, and the configuration that it gives a drafter of its target."""
    recipe, shapes = load_recipe(f"{algorithm}_{target}"), Shapes(TARGETS[target]())
    if algorithm == "eagle3":
        return recipe, eagle3_config(shapes, recipe)
    return recipe, drafter_config(shapes, recipe.drafter)


def empty(config):
    with torch.device("meta"):
        return (Eagle3Drafter if isinstance(config, Eagle3Config) else DSparkDrafter)(config)


@pytest.mark.parametrize(
    ("algorithm", "millions"),
    [("dspark", (615, 1126, 1860)), ("dflash", (537, 1049, 1783)), ("eagle3", (149, 302, 498))],
)
def test_published_recipes_build_the_published_drafters(algorithm, millions):
    for target, wanted in zip(("qwen3_4b", "qwen3_8b", "qwen3_14b"), millions, strict=True):
        recipe, config = published(algorithm, target)
        count = sum(p.numel() for p in empty(config).parameters() if p.requires_grad)
        assert round(count / 1e6) == wanted
        taps = {"qwen3_14b": (1, 10, 19, 28, 37)}.get(target, (1, 9, 17, 25, 33))
        assert config.target_layer_ids == taps
        assert config.backbone.rope_theta == 1e6
        assert recipe.target == f"Qwen/Qwen3-{target.rpartition('_')[2].upper()}"
        if algorithm != "eagle3":
            assert (config.mask_token_id, config.block_size) == (151669, 7)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gemma4_recipes_build_drafters_of_gemma4_layers(algorithm):
    recipe, config = published(algorithm, "gemma4_12b")
    backbone = config.backbone
    assert (backbone.head_dim, backbone.num_heads, backbone.num_kv_heads) == (512, 16, 1)
    assert (backbone.rotary_fraction, backbone.rope_theta) == (0.25, 1e6)
    assert backbone.value_from_key
    assert backbone.attention_scale == 1.0
    assert config.target_layer_ids == (5, 17, 29, 41, 46)
    assert recipe.run.compile is False
    data = write_config(empty(config), "deepspec", "bfloat16")
    assert data["architectures"][0].startswith("Gemma4")
    assert data["global_head_dim"] == 512
    if algorithm != "eagle3":
        assert config.mask_token_id == 4


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_published_settings(algorithm, target):
    recipe, config = published(algorithm, target)
    run, optimiser = recipe.run, recipe.optimiser
    assert (run.rows, run.epochs, run.dtype, run.save_every) == (512, 10, "bfloat16", 3000)
    assert (run.seed, run.log_every) == (0 if algorithm == "eagle3" else 42, 10)
    assert (optimiser.name, optimiser.learning_rate) == ("adamw", 6e-4)
    assert (optimiser.betas, optimiser.eps, optimiser.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert (optimiser.warmup_fraction, optimiser.clip, optimiser.schedule) == (0.04, 1.0, "cosine")
    assert (recipe.samples.max_length, recipe.samples.min_supervised) == (4096, 14)
    assert recipe.algorithm == algorithm
    if algorithm == "eagle3":
        assert (config.ttt_length, recipe.loss.step_loss_decay) == (7, 0.8)
        return
    assert recipe.samples.num_anchors == 512
    assert (config.backbone.num_layers, recipe.loss.decay) == (5, 4.0)
    heads = (config.markov_rank, config.confidence_head)
    assert heads == ((256, True) if algorithm == "dspark" else (0, False))
    if algorithm == "dspark":
        assert (recipe.loss.ce, recipe.loss.tv, recipe.loss.confidence) == (0.1, 0.9, 1.0)
        assert config.confidence_head_with_markov
        assert not recipe.loss.detach_confidence


def test_gemma4_layers_are_for_gemma4():
    recipe = load_recipe("dspark_qwen3_4b", ["drafter.layers=gemma4"])
    with pytest.raises(CompatibilityError, match="but the target is a qwen3 model; set it to qwe"):
        drafter_config(Shapes(TARGETS["qwen3_4b"]()), recipe.drafter)
