"""Function-preserving inflation: a small Qwen3 target and its drafters in larger shapes.

The trained numbers sit inside larger matrices so that logits, features and confidences stay what
they were, while a forward costs what a model of the larger shape costs; `placement` says how.

Run as a script it writes the inflated pair, drafter attached, for any other command to use.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.common import DTYPES, add_options, emit, environment, model_path
from benchmarks.placement import QWEN3_06B, Placement, Shape, Weights
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.drafters.config import DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.errors import CompatibilityError
from dspark.targets.target import Target

AnyConfig = DSparkConfig | Eagle3Config
AnyDrafter = DSparkDrafter | Eagle3Drafter
ConfigT = TypeVar("ConfigT", DSparkConfig, Eagle3Config)


def layer_places(old: int, new: int) -> tuple[int, ...]:
    """Where each of the old layers stands among the new ones: evenly spread, the last one last."""
    return tuple((i + 1) * new // old - 1 for i in range(old))


@torch.no_grad()
def inflate_target(
    model: Any, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A larger model with the same logits.

    Args:
        model: a Qwen3ForCausalLM.
        shape: sizes of the result.
        dtype: of the result.
        seed: of the random numbers that change nothing.

    Returns:
        A Qwen3ForCausalLM. The output of layer i is that of layer `layer_places(..)[i]`, zero in
        the new channels.

    Raises:
        CompatibilityError: the model is of another kind, or does not fit.
    """
    data = model.config.to_dict()
    if data["model_type"] != "qwen3" or data["attention_bias"] or data["use_sliding_window"]:
        raise CompatibilityError(
            f"Only a qwen3 model without attention_bias and sliding window can be inflated, not "
            f"this {data['model_type']!r}."
        )
    place = Placement(Shape.of_target(model.config), shape)
    config = Qwen3Config.from_dict(data | _changed_fields(place, model.config.rms_norm_eps))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        large = AutoModelForCausalLM.from_config(config, dtype=dtype)
    large.generation_config = model.generation_config
    old, new, width = model.state_dict(), large.state_dict(), place.old.hidden_size
    places = layer_places(place.old.num_layers, shape.num_layers)
    for layer in range(shape.num_layers):
        Placement.silence(_under(new, f"model.layers.{layer}."))
    for i, layer in enumerate(places):
        place.layer(_under(old, f"model.layers.{i}."), _under(new, f"model.layers.{layer}."))
    place.width_norm(old["model.norm.weight"], new["model.norm.weight"])
    new["lm_head.weight"][:, :width] = old["lm_head.weight"]
    new["model.embed_tokens.weight"].zero_()[:, :width] = old["model.embed_tokens.weight"]
    return large.eval()


def _changed_fields(place: Placement, rms_norm_eps: float) -> dict[str, Any]:
    """What differs in the configuration of the larger target."""
    shape = place.new
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "layer_types": ["full_attention"] * shape.num_layers,
        "rms_norm_eps": rms_norm_eps * place.width_scale**2,
    }


@torch.no_grad()
def inflate_drafter(
    drafter: DSparkDrafter, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> DSparkDrafter:
    """The drafter of an inflated target, with the same drafts and confidences.

    Args:
        drafter: of the small target, with any head; it need not be bound.
        shape: sizes of the inflated target; the drafter keeps its number of layers.
        dtype: of the result.
        seed: of the random numbers that change nothing.

    Returns:
        A drafter, not yet bound.

    Raises:
        CompatibilityError: it does not fit.
    """
    config = drafter.config
    place = _drafter_place(config, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        large = DSparkDrafter(_drafter_config(config, place, shape.num_layers)).to(dtype)
    old, new = drafter.state_dict(), large.state_dict()
    for i in range(place.old.num_layers):
        place.layer(_under(old, f"layers.{i}."), _under(new, f"layers.{i}."))
    place.width_norm(old["hidden_norm.weight"], new["hidden_norm.weight"])
    for name in (n for n in old if n.startswith(("markov_head.", "confidence_head."))):
        _place_head(config, name, old[name], new[name])
    if drafter.mask_embedding is not None:
        large.mask_embedding = nn.Embedding(1, shape.hidden_size, dtype=dtype)
        large.mask_embedding.weight.copy_(_widened(drafter.mask_embedding.weight, shape))
    _place_ends(drafter, large, place)
    return large.eval()


@torch.no_grad()
def inflate_eagle3(
    drafter: Eagle3Drafter, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Eagle3Drafter:
    """As `inflate_drafter`, for an Eagle3 or MTP drafter, which has a single layer.

    Raises:
        CompatibilityError: it does not fit, or has a reduced vocabulary.
    """
    config = drafter.config
    if config.draft_vocab_size is not None:
        raise CompatibilityError("A drafter with a reduced vocabulary cannot be inflated.")
    place = _drafter_place(config, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        large = Eagle3Drafter(_drafter_config(config, place, shape.num_layers)).to(dtype)
    old, new = (_under(model.state_dict(), "layers.0.") for model in (drafter, large))
    place.layer(old, new, parts=2)
    place.width_norm(old["hidden_norm.weight"], new["hidden_norm.weight"])
    _place_ends(drafter, large, place)
    return large.eval()


def _drafter_place(config: AnyConfig, shape: Shape) -> Placement:
    if config.backbone.attention_bias:
        raise CompatibilityError("A drafter with attention_bias cannot be inflated.")
    small = Shape.of_drafter(config.backbone)
    return Placement(small, replace(shape, num_layers=small.num_layers))


def _place_ends(drafter: AnyDrafter, large: AnyDrafter, place: Placement) -> None:
    """What features come in by, and states go out by; tables where the drafter has its own."""
    width, taps = place.old.hidden_size, drafter.config.backbone.num_taps
    place.width_norm(drafter.norm.weight, large.norm.weight)
    large.fc.weight[width:] = 0.0
    by_tap = large.fc.weight.unflatten(1, (taps, place.new.hidden_size))
    by_tap[:width, :, :width] = drafter.fc.weight.unflatten(1, (taps, width))
    for name in ("own_embedding_VH", "own_head_VH"):
        table = getattr(drafter, name)
        widened = None if table is None else _widened(table, place.new).to(large.fc.weight.dtype)
        setattr(large, name, widened)


def _drafter_config(config: ConfigT, place: Placement, num_layers: int) -> ConfigT:
    new, places = place.new, layer_places(config.num_target_layers, num_layers)
    backbone = replace(
        config.backbone,
        hidden_size=new.hidden_size,
        intermediate_size=new.intermediate_size,
        num_heads=new.num_heads,
        num_kv_heads=new.num_kv_heads,
        head_dim=new.head_dim,
        rms_norm_eps=config.backbone.rms_norm_eps * place.width_scale**2,
    )
    taps = tuple(-1 if tap < 0 else places[tap] for tap in config.target_layer_ids)
    return replace(config, backbone=backbone, target_layer_ids=taps, num_target_layers=num_layers)


def _place_head(config: DSparkConfig, name: str, old: Tensor, new: Tensor) -> None:
    """Markov and confidence weights; those that read the state have its columns widened."""
    if old.shape == new.shape:
        new.copy_(old)
        return
    width, rank = config.backbone.hidden_size, config.markov_rank
    before = 2 * rank if "joint_proj" in name else 0  # the RNN head reads [s; e; h]
    after = old.shape[1] - before - width  # the others [h; e]
    new[:, :before] = old[:, :before]
    new[:, before : before + width] = old[:, before : before + width]
    if after:
        new[:, -after:] = old[:, -after:]


def _widened(table_NH: Tensor, shape: Shape) -> Tensor:
    return nn.functional.pad(table_NH, (0, shape.hidden_size - table_NH.shape[1]))


def _under(state: Weights, prefix: str) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def largest_deviation(small: Target, large: Target, length: int = 64) -> float:
    """Largest difference of logits over a pseudo-random prompt."""
    ids = [(11 + 17 * i * i) % small.vocab_size for i in range(length)]
    batch = RaggedBatch.fresh([ids], small.device)
    logits = [model.forward(batch, logit_rows="all").logits_NV for model in (small, large)]
    assert logits[0] is not None
    assert logits[1] is not None
    return float((logits[0].float() - logits[1].float()).abs().max())


def main() -> None:
    """Write the inflated pair to a directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_options(parser)
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--shape", type=Shape.parse, default=QWEN3_06B, help=Shape.parse.__doc__)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source, dtype = model_path(args.model), DTYPES[args.dtype or "bfloat16"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    large = inflate_target(model, args.shape, dtype=dtype, seed=args.seed)
    drafter = inflate_drafter(load_drafter(source), args.shape, dtype=dtype, seed=args.seed)
    large.save_pretrained(args.output)
    small = Target.load(source, dtype="float32", offline=True)
    small.tokenizer.save_pretrained(args.output)
    save_attached(drafter, args.output, dtype=dtype)
    deviation = largest_deviation(small, Target.from_model(large))
    emit("inflate", environment(dtype), {"shape": args.shape.numbers, "logit_deviation": deviation})


if __name__ == "__main__":
    main()
