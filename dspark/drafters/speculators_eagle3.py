"""The config.json of the speculators library for Eagle3, and `Eagle3Config`, each as the other.

FORMAT_FACTS.md G: as its DSpark files, with the captured layers under a name of their own. That
library's variants of the layer are flags, all false for the layer of the published stack. Its
positions start at 1, which is the same: the rotary embedding sees differences only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.eagle3 import Eagle3Config
from dspark.drafters.json_reader import Reader
from dspark.drafters.published_eagle3 import (
    AUX_LAYERS,
    FLAGS,
    RESIDUAL,
    eagle3_from_json,
    eagle3_to_json,
    llama_shapes,
)
from dspark.drafters.speculators import (
    LAYER_DEFAULTS,
    TARGET_ARCHITECTURES,
    TARGET_NAME,
    nested_fields,
    proposal_fields,
    refuse_gemma4,
    verifier_fields,
)
from dspark.errors import CheckpointError

EAGLE3 = "eagle3"


def speculators_eagle3_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
    """Read a configuration of `speculators_model_type` eagle3.

    Without `num_target_layers`, which that library does not write, the target is taken to have no
    more layers than are captured.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an option that is not supported.
    """
    layers = data.get("transformer_layer_config")
    if not isinstance(layers, Mapping):
        raise CheckpointError(f"{where} has transformer_layer_config {layers!r}, not an object.")
    read = Reader(data, where)
    for flag in FLAGS:
        read.only(flag, False)
    llama = layers.get("model_type") == "llama"
    if not llama:
        Reader(layers, f"transformer_layer_config of {where}").only("model_type", "qwen3")
    if data.get("target_hidden_size") is not None:
        read.only("target_hidden_size", layers.get("hidden_size"))
    taps = read.integers(AUX_LAYERS)
    if not taps:
        raise CheckpointError(f"{where} has no {AUX_LAYERS}.")
    try:
        tokens = data["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{where} has no speculative_tokens in speculators_config.proposal_methods, which say "
            "how many drafts a round has."
        ) from error
    own = ("num_target_layers", "step_loss_decay", "draft_vocab_size", RESIDUAL)
    flat: dict[str, Any] = {
        **LAYER_DEFAULTS,
        **(llama_shapes(layers) if llama else layers),
        "num_target_layers": max([1, *taps]),
        **{name: data[name] for name in own if data.get(name) is not None},
        "target_layer_ids": [i - 1 for i in taps],
        "ttt_length": tokens,
        **verifier_fields(data),
    }
    return eagle3_from_json(flat, where)


def speculators_eagle3_to_json(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """The configuration of a drafter whose weights are stored as `dtype`.

    Raises:
        CompatibilityError: the drafter's layer is Gemma4's.
    """
    refuse_gemma4(config.backbone)
    flat = eagle3_to_json(config, dtype)
    name, architectures = flat.pop(TARGET_NAME, None), flat.pop(TARGET_ARCHITECTURES, [])
    top: dict[str, Any] = {
        "architectures": ["Eagle3Speculator"],
        AUX_LAYERS: [i + 1 for i in config.target_layer_ids],
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "dtype": dtype,
        **dict.fromkeys(FLAGS, False),
        RESIDUAL: config.backbone.norm_before_residual,
        "num_target_layers": config.num_target_layers,
        "speculators_config": proposal_fields(EAGLE3, config.ttt_length, name, architectures),
        "speculators_model_type": EAGLE3,
        "step_loss_decay": config.step_loss_decay,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": nested_fields(flat, config.extra),
    }
    return dict(sorted(top.items()))
