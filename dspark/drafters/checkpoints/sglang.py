"""The layout of drafters for SGLang (release 0.5.23), with embedding and head.

Its DSPARK reads the published layout, its DFLASH (1 + n slots, no heads) a `dflash_config`, its
EAGLE3 a Llama layer with an `eagle_config`, whose captured layers are counted from 0. What it would
read otherwise than it is meant, or stop at, is refused.
"""

from __future__ import annotations

from typing import Any

from dspark.drafters.checkpoints.eagle import AUX_LAYERS
from dspark.drafters.checkpoints.fields import is_gemma4
from dspark.drafters.checkpoints.published import LLAMA_EAGLE3, dspark_to_json, eagle3_to_json
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.plugins import Layout
from dspark.errors import CompatibilityError

_DFLASH = "DFlashDraftModel"


def beyond_sglang(drafter: DSparkDrafter | Eagle3Drafter) -> list[str]:
    """What of a drafter SGLang has no place for; empty where it runs."""
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
    return [name for name, there in wrong.items() if there]


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
    if found := beyond_sglang(drafter):
        raise CompatibilityError(
            f"The drafter has {' and '.join(found)}, which SGLang does not run; serve it with "
            "dspark."
        )


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


LAYOUT = Layout(writers={DSparkDrafter: _write_dspark, Eagle3Drafter: _write_eagle3})
