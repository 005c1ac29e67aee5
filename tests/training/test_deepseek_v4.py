"""Training DeepSeek-V4's stages on a tiny target of that family."""

import json

import pytest
import torch
from rich.console import Console

from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.deepseek_v4 import DeepseekV4Config, DeepseekV4Drafter
from dspark.errors import CompatibilityError
from dspark.targets.target import Target
from dspark.training.drafters.new_drafter import drafter_config
from dspark.training.drafters.warm_start import start_from, start_from_last_layers
from dspark.training.run import run_recipe
from dspark.training.settings import DSparkSettings
from tests.helpers.deepseek_v4 import SHAPE
from tests.helpers.samples import write_samples
from tests.helpers.state_models import new_model
from tests.helpers.targets import tiny_llama

SMALL = SHAPE | {"vocab_size": 40, "hc_sinkhorn_iters": 2, "mlp_layer_types": ["moe"] * 4}
RECIPE = """
kind: drafter
target: {root}/target
drafter: {{layers: deepseek_v4, num_layers: 2, block_size: 4, markov_rank: 8,
  target_layer_ids: [1, 3], mask_token_id: 39, initial_layers: target}}
samples: {{root: {root}, paths: [s.jsonl.gz], max_length: 32, min_supervised: 4, num_anchors: 4}}
optimiser: {{name: muon, learning_rate: 0.01}}
run: {{output_dir: {root}/run, steps: 10, rows: 4, save_every: 6, log_every: 1}}
"""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_a_run_learns_and_its_drafter_loads(tmp_path):
    new_model("deepseek_v4", **SMALL).save_pretrained(tmp_path / "target")
    write_samples(tmp_path / "s.jsonl.gz", 40)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    run_recipe(str(recipe), [], device="cpu", console=Console(quiet=True))
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    drafter = load_drafter(tmp_path / "run")
    assert type(drafter) is DeepseekV4Drafter
    assert (drafter.config.backbone.num_layers, drafter.taps) == (2, (1, 3))
    another = DeepseekV4Drafter(drafter.config)
    assert start_from(another, str(tmp_path / "run")) == []
    assert all(torch.equal(x, another.state_dict()[n]) for n, x in drafter.state_dict().items())


def test_stages_may_start_as_the_targets_last_layers():
    target = Target.from_model(new_model("deepseek_v4", **SMALL))
    settings = DSparkSettings(
        layers="deepseek_v4", num_layers=2, target_layer_ids=(1, 3), mask_token_id=39
    )
    config = drafter_config(target, settings)
    assert isinstance(config, DeepseekV4Config)
    source = torch.Generator().manual_seed(1)
    drafter = DeepseekV4Drafter.from_target(target.parts(), config, generator=source)
    start_from_last_layers(drafter, target)
    for layer, last in zip(drafter.layers, list(target.layers)[-2:], strict=True):
        theirs = last.state_dict()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name


def test_these_layers_are_for_this_family():
    settings = DSparkSettings(layers="deepseek_v4", num_layers=2, target_layer_ids=(0, 2))
    with pytest.raises(CompatibilityError, match="the target is a llama model"):
        drafter_config(Target.from_model(tiny_llama()), settings)
