"""The EAGLE authors' layout, which is read only, and SGLang's (release 0.5.23), written only.

The authors', and that of those who followed them, is a flat configuration of a Llama layer,
captured layers counted from 1, and mostly a reduced vocabulary. Tensors of the layer are called
`midlayer` (`eagle3.KIND` renames them).

SGLang's DSPARK reads the published layout, its DFLASH (1 + n slots, no heads) a `dflash_config`,
its EAGLE3 a Llama layer with an `eagle_config`, whose captured layers are counted from 0. What it
would read otherwise than it is meant, or stop at, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.base import Layout
from dspark.drafters.checkpoints.fields import Reader, is_gemma4, present, refuse_parts
from dspark.drafters.checkpoints.published import (
    LLAMA_EAGLE3,
    PROJECTED_LAYER,
    RESIDUAL,
    dspark_to_json,
    eagle3_from_json,
    eagle3_to_json,
)
from dspark.drafters.deepseek_v4 import DeepseekV4Drafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.errors import CheckpointError, CompatibilityError

AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
# Variants of the layer that are not built here: all must be false.
FLAGS = ("norm_before_fc", "fc_norm", "norm_output")
_LENGTH = 7
_DFLASH = "DFlashDraftModel"


def llama_eagle3_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
    """Read a flat configuration of a Llama layer, as `eagle3_from_json` does.

    Captured layers stand in `target_layer_ids`, or, counted from 1, in
    `eagle_aux_hidden_state_layer_ids`, at the top or in `eagle_config`. What such files leave out:
    the target's layers, taken as the fewest that these allow, and the drafts of a round, taken as
    7.

    Raises:
        CheckpointError: also where it names no captured layers.
    """
    nested = data.get("eagle_config")
    own = {**(nested if isinstance(nested, Mapping) else {}), **data}
    read = Reader(own, where)
    for flag in FLAGS:
        read.only(flag, False)
    read.only("model_type", "llama")
    if data.get("sliding_window") is not None and data.get("use_sliding_window", True):
        raise CompatibilityError(
            f"{where} has sliding_window {data['sliding_window']!r}, which is not supported for "
            "Eagle3 yet; use a drafter with full attention."
        )
    if data.get("target_layer_ids") is None and own.get(AUX_LAYERS) is None:
        raise CheckpointError(
            f"{where} does not say which layers the drafter reads; add target_layer_ids, which for "
            "a target of n layers usually are [1, n/2 - 1, n - 4]."
        )
    flat = llama_shapes(data)
    for name in ("eagle_config", AUX_LAYERS):
        flat.pop(name, None)
    if own.get(RESIDUAL) is not None:
        flat[RESIDUAL] = own[RESIDUAL]
    if "target_layer_ids" not in flat:
        flat["target_layer_ids"] = [i - 1 for i in read.integers(AUX_LAYERS)]
    taps = Reader(flat, where).integers("target_layer_ids")
    least = {"num_target_layers": max([0, *taps]) + 1, "ttt_length": _LENGTH}
    return eagle3_from_json(least | flat, where)


def llama_shapes(data: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama configuration with what it may leave out: it follows from its other shapes."""
    width, heads = data.get("hidden_size"), data.get("num_attention_heads")
    flat = {key: value for key, value in data.items() if value is not None}
    if type(width) is int and type(heads) is int and heads > 0:
        flat = {"head_dim": width // heads, "num_key_value_heads": heads} | flat
    return {"model_type": "llama"} | flat


LAYOUT = Layout(readers={LLAMA_EAGLE3: llama_eagle3_from_json})


def beyond_sglang(drafter: DSparkDrafter | Eagle3Drafter) -> list[str]:
    """What of a drafter SGLang has no place for; empty where it runs."""
    if isinstance(drafter, DeepseekV4Drafter):
        return ["DeepSeek-V4's layers"]
    config, backbone = drafter.config, drafter.config.backbone
    taps, last = config.target_layer_ids, config.num_target_layers - 1
    wrong = {
        "Gemma4's layers": is_gemma4(backbone),
        "sliding windows": bool(backbone.sliding_layers),
        f"target_layer_ids with the target's last layer ({last})": taps[-1] == last,
    }
    if isinstance(drafter, Eagle3Drafter):
        wrong |= {
            "Qwen3's layer in Eagle3": backbone.query_key_norms,
            "norm_before_residual true": backbone.norm_before_residual,
            PROJECTED_LAYER: backbone.input_projection,
            f"{backbone.num_layers} layers": backbone.num_layers > 1,
            "attention_bias true": backbone.attention_bias,
            "all drafts in one pass (P-EAGLE)": drafter.config.mask_token_id is not None,
        }
    else:
        own, plain = drafter.config, drafter.config.markov_rank == 0
        wrong |= {
            "a learned mask embedding": own.mask_token_id is None,
            "a reduced vocabulary": own.draft_vocab_size is not None,
            "target_layer_ids with the embedding's output (-1)": taps[0] < 0,
            "markov_rank 0 with sample_from_anchor true": plain and own.sample_from_anchor,
            "a confidence head without a Markov head": plain and own.confidence_head,
        }
    return present(wrong)


def sglang_options(drafter: DSparkDrafter | Eagle3Drafter) -> str:
    """How SGLang's server drafts with it: method and number of drafts."""
    drafts = drafter.block_size
    if isinstance(drafter, Eagle3Drafter):
        return (
            f"--speculative-algorithm EAGLE3 --speculative-num-steps {drafts} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {drafts + 1}"
        )
    if drafter.config.markov_rank == 0:
        slots = drafter.config.block_size
        return f"--speculative-algorithm DFLASH --speculative-dflash-block-size {slots}"
    return f"--speculative-algorithm DSPARK --speculative-dspark-block-size {drafts}"


def _refuse(drafter: DSparkDrafter | Eagle3Drafter) -> None:
    refuse_parts(beyond_sglang(drafter), "which SGLang does not run; serve it with dspark.")


def _write_dspark(drafter: DSparkDrafter, dtype: str) -> dict[str, Any]:
    _refuse(drafter)
    data, config = dspark_to_json(drafter.config, dtype), drafter.config
    if config.markov_rank > 0:
        return data
    own = {name: data[name] for name in ("block_size", "mask_token_id", "target_layer_ids")}
    return data | {"architectures": [_DFLASH], "dflash_config": own}


def _write_eagle3(drafter: Eagle3Drafter, dtype: str) -> dict[str, Any]:
    _refuse(drafter)
    data, config = eagle3_to_json(drafter.config, dtype), drafter.config
    return data | {
        "architectures": [LLAMA_EAGLE3],
        # Without it SGLang looks for an attribute that a Llama configuration has not.
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "eagle_config": {AUX_LAYERS: list(config.target_layer_ids)},
    }


SGLANG = Layout(writers={DSparkDrafter: _write_dspark, Eagle3Drafter: _write_eagle3})
