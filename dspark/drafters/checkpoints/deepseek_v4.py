"""DeepSeek-V4's draft module: `mtp.*` inside a target's checkpoint, or in a directory by itself.

A target's config.json has the drafter's fields as `dspark_*` beside its own, and its shards hold
the stages as `mtp.0.` to `mtp.2.`, in 8 and 4 bits (`checkpoints.block_scales`). V4.1 nests its
text model's fields, calls the Markov tables `embed` and `head`, counts captured layers by their
inputs, and has draft experts of its own. A drafter by itself has the same configuration under the
drafter's architecture; its tensors are named like these or like the module's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.base import Layout
from dspark.drafters.checkpoints.block_scales import BLOCK, dequantised, to_fp4, to_fp8
from dspark.drafters.checkpoints.fields import Reader, present, refuse_parts
from dspark.drafters.checkpoints.files import INSIDE as PREFIX
from dspark.drafters.deepseek_v4 import STAGES, DeepseekV4Config, DeepseekV4Drafter
from dspark.drafters.deepseek_v4_layers import SAME_INTEGERS, SAME_NUMBERS, DeepseekV4Layers
from dspark.errors import CheckpointError, CompatibilityError

ARCHITECTURE, V41_ARCHITECTURE = "DeepseekV4DSparkModel", "DSparkV41DraftModel"
_MARK, _V41, _QUANTIZATION = "dspark_block_size", "deepseek_v41", "quantization_config"
_USUAL_STAGES = 3
# Fields that may have one value only.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "attention_bias": False,
}

# Names within a stage, ours for theirs.
_PARTS: dict[str, str] = {
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    **{
        f"hc_{theirs}_{part}": f"{theirs}_hc.{part}"
        for theirs in ("attn", "ffn")
        for part in ("fn", "base", "scale")
    },
}
# Those of the first and of the last stage.
_FIRST: dict[str, str] = {
    "main_proj.weight": "fc.weight",
    "main_norm.weight": "hidden_norm.weight",
}
_LAST: dict[str, str] = {
    "norm.weight": "norm.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
    "markov_head.markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_head.markov_w2.weight",
    "confidence_head.proj.weight": "confidence_head.proj.weight",
}
_LAST_V41: dict[str, str] = {
    "markov_head.embed.weight": "markov_head.markov_w1.weight",
    "markov_head.head.weight": "markov_head.markov_w2.weight",
}
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.w([123])\.weight")
_STAGE = re.compile(r"mtp\.(\d+)\.(.+)")
# Routes image tokens, of which there are none in a draft.
_IMAGES = "ffn.gate.bias_vl"
_EIGHT_BITS = re.compile(r"attn\.w\w+\.weight|ffn\.shared_experts\.w\d\.weight|main_proj\.weight")


def holds_drafter(data: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a target with a draft module, or a draft module alone."""
    return _MARK in _flat(data)


def architecture(data: Mapping[str, Any]) -> str:
    """The architecture of the drafter that such a config.json describes."""
    return V41_ARCHITECTURE if _is_v41(data) else ARCHITECTURE


def from_json(data: Mapping[str, Any], where: str) -> DeepseekV4Config:
    """Read the configuration of a target with a draft module, or of a drafter by itself.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an option that is not supported.
    """
    v41 = _is_v41(data)
    data = _flat(data)
    read = Reader(data, where)
    for name, value in _ONLY.items():
        read.only(name, value)
    taps = tuple(tap - v41 for tap in read.integers("dspark_target_layer_ids"))
    rank = read.integer("dspark_markov_rank", minimum=0)
    confidence = read.boolean("enable_confidence_head", default=True)
    mask = data.get("dspark_noise_token_id")
    if mask is not None:
        mask = read.integer("dspark_noise_token_id", minimum=0)
    return DeepseekV4Config(
        backbone=_layers(read, taps=len(taps), v41=v41),
        vocab_size=read.integer("vocab_size"),
        block_size=read.integer(_MARK),
        mask_token_id=mask,
        target_layer_ids=taps,
        num_target_layers=read.integer("num_hidden_layers"),
        markov_rank=rank,
        markov_head_type=str(data.get("markov_head_type", "vanilla")),
        confidence_head=confidence,
        confidence_head_with_markov=confidence
        and read.boolean("confidence_head_with_markov", default=rank > 0),
        sample_from_anchor=read.boolean("sample_from_anchor", default=True),
        draft_vocab_size=data.get("draft_vocab_size") and read.integer("draft_vocab_size"),
        max_position_embeddings=read.integer("max_position_embeddings", default=1048576),
        extra=data,
    )


def _layers(read: Reader, *, taps: int, v41: bool) -> DeepseekV4Layers:
    """Read the stages; V4.1's may have other numbers of experts than the target's layers."""
    stages = _stages(read)

    def experts(name: str) -> int:
        own = f"dspark_{name}"
        return read.integer(own if v41 and read.data.get(own) else name)

    same: dict[str, Any] = {name: read.integer(name) for name in SAME_INTEGERS}
    same |= {name: read.number(name) for name in SAME_NUMBERS}
    # Transformers writes a share of the head in place of qk_rope_head_dim.
    rope_head_dim = read.integer("head_dim") * (read.data.get("partial_rotary_factor") or 64 / 512)
    return DeepseekV4Layers(
        **same,
        intermediate_size=read.integer("moe_intermediate_size"),
        num_layers=stages,
        num_heads=read.integer("num_attention_heads"),
        num_kv_heads=read.integer("num_key_value_heads", default=1),
        num_taps=taps,
        rope_theta=_theta(read),
        sliding_layers=tuple(range(stages)),
        rope_head_dim=read.integer("qk_rope_head_dim", default=round(rope_head_dim)),
        num_experts=experts("n_routed_experts"),
        experts_per_token=experts("num_experts_per_tok"),
        carried_mix=v41,
    )


def to_json(config: DeepseekV4Config, dtype: str) -> dict[str, Any]:
    """The configuration of a drafter by itself, whose weights are stored as `dtype`."""
    layers, carried = config.backbone, config.backbone.carried_mix
    own = "dspark_" if carried else ""
    usual = {
        "confidence_head_with_markov": config.confidence_head_with_markov
        == (config.markov_rank > 0),
        "draft_vocab_size": config.draft_vocab_size is None,
        "markov_head_type": config.markov_head_type == "vanilla",
        "sample_from_anchor": config.sample_from_anchor,
    }
    unusual = {name: getattr(config, name) for name, is_usual in usual.items() if not is_usual}
    return (
        dict(config.extra)
        | unusual
        | {name: getattr(layers, name) for name in (*SAME_INTEGERS, *SAME_NUMBERS)}
        | {
            "architectures": [V41_ARCHITECTURE if carried else ARCHITECTURE],
            "dtype": dtype,
            _MARK: config.block_size,
            "dspark_markov_rank": config.markov_rank,
            "dspark_noise_token_id": config.mask_token_id,
            "dspark_target_layer_ids": [tap + carried for tap in config.target_layer_ids],
            "enable_confidence_head": config.confidence_head,
            "max_position_embeddings": config.max_position_embeddings,
            "model_type": _V41 if carried else "deepseek_v4",
            "moe_intermediate_size": layers.intermediate_size,
            STAGES: layers.num_layers,
            f"{own}n_routed_experts": layers.num_experts,
            "num_attention_heads": layers.num_heads,
            f"{own}num_experts_per_tok": layers.experts_per_token,
            "num_hidden_layers": config.num_target_layers,
            "num_key_value_heads": 1,
            "qk_rope_head_dim": layers.rope_head_dim,
            "rope_theta": layers.rope_theta,
            "vocab_size": config.vocab_size,
        }
    )


def _refuse_beyond(config: DeepseekV4Config) -> None:
    """Refuse what engines would silently read as something else."""
    beyond = {
        "a learned mask embedding": config.mask_token_id is None,
        "sample_from_anchor false": not config.sample_from_anchor,
        f"draft_vocab_size {config.draft_vocab_size}": config.draft_vocab_size is not None,
        f"a {config.markov_head_type} Markov head": config.markov_head_type != "vanilla",
        "a confidence head without a Markov head": config.confidence_head
        and not (config.confidence_head_with_markov and config.markov_rank > 0),
    }
    refuse_parts(
        present(beyond),
        "for which DeepSeek-V4's fields have no place; save it in another layout.",
    )


def _is_v41(data: Mapping[str, Any]) -> bool:
    text = data.get("text_config")
    kinds = (data.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None)
    return any(str(kind).startswith(_V41) for kind in kinds)


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text model at the top."""
    text = data.get("text_config")
    flat = {
        name: value for name, value in data.items() if name not in ("text_config", "vision_config")
    }
    return flat | (dict(text) if isinstance(text, Mapping) else {})


def _stages(read: Reader) -> int:
    """`num_nextn_predict_layers` counts other modules; the ratios have one for every stage."""
    ratios = read.data.get("compress_ratios")
    layers = read.integer("num_hidden_layers")
    beyond = len(ratios) - layers if isinstance(ratios, list) else 0
    return read.integer(STAGES, default=beyond if beyond > 0 else _USUAL_STAGES)


def _theta(read: Reader) -> float:
    """RoPE's base in layers without compressed attention."""
    ropes = read.data.get("rope_parameters")
    main = ropes.get("main") if isinstance(ropes, Mapping) else None
    if "rope_theta" not in read.data and isinstance(main, Mapping):
        return Reader(main, f"rope_parameters.main of {read.where}").number("rope_theta")
    return read.number("rope_theta")


# Tensors


def unpack(data: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The module's tensors from a file's, whose names may be the module's already.

    Raises:
        CheckpointError: a scale or an expert is missing, or a scale has a wrong shape.
        CompatibilityError: a quantisation that is not known.
    """
    theirs = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    if not theirs:
        return dict(state)
    found = {name: tensor for name, tensor in state.items() if name not in theirs}
    outer, experts = (
        _FIRST | _LAST | _LAST_V41,
        defaultdict[str, dict[tuple[int, str], Tensor]](dict),
    )
    for name, tensor in dequantised(theirs, where, _block(data, where)).items():
        match = _STAGE.fullmatch(name)
        stage, part = match.groups() if match else ("", "")
        expert = _EXPERT.fullmatch(part)
        if expert:
            experts[stage][int(expert[1]), expert[2]] = tensor
        elif part != _IMAGES:
            own = f"layers.{stage}.{_PARTS[part]}" if part in _PARTS else outer.get(part, name)
            found[own] = tensor
    for stage, parts in experts.items():
        found |= _stacked(f"layers.{stage}.mlp.experts.", parts, f"{where} ({PREFIX}{stage})")
    return found


def _stacked(prefix: str, parts: Mapping[tuple[int, str], Tensor], where: str) -> dict[str, Tensor]:
    """The experts of a stage as two tensors, with gate and up projections side by side."""
    count = 1 + max(expert for expert, _ in parts)
    for wanted in ((expert, part) for expert in range(count) for part in "123"):
        if wanted not in parts:
            raise CheckpointError(
                f"{where} lacks ffn.experts.{wanted[0]}.w{wanted[1]}.weight; fetch it again."
            )
    both = [torch.cat((parts[e, "1"], parts[e, "3"])) for e in range(count)]
    return {
        f"{prefix}gate_up_proj": torch.stack(both),
        f"{prefix}down_proj": torch.stack([parts[e, "2"] for e in range(count)]),
    }


def pack(data: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file from the module's, in 8 and 4 bits if the target's are.

    Args:
        data: the config.json that is written beside it.
        state: the module's tensors.
    """
    quantization = data.get(_QUANTIZATION)
    found: dict[str, Tensor] = {}
    for name, tensor in _official(state, data[STAGES], carried=_is_v41(data)):
        expert = ".ffn.experts." in name
        part = name.split(".", 2)[2]
        if quantization is None or not (expert or _EIGHT_BITS.fullmatch(part)):
            found[name] = tensor.contiguous()
            continue
        four = expert and _expert_dtype(data) == "fp4"
        block = _block(data, "config.json")
        weight, scale = to_fp4(tensor) if four else to_fp8(tensor, block)
        found |= {name: weight, f"{name.removesuffix('.weight')}.scale": scale}
    return found


def _official(
    state: Mapping[str, Tensor], stages: int, *, carried: bool
) -> Iterator[tuple[str, Tensor]]:
    parts = {ours: theirs for theirs, ours in _PARTS.items()}
    outer = {ours: (0, theirs) for theirs, ours in _FIRST.items()}
    last = _LAST | _LAST_V41 if carried else _LAST
    outer |= {ours: (stages - 1, theirs) for theirs, ours in last.items()}
    for name, tensor in state.items():
        if name in outer:
            stage, theirs = outer[name]
            yield f"{PREFIX}{stage}.{theirs}", tensor
            continue
        _, number, part = name.split(".", 2)
        if part in parts:
            yield f"{PREFIX}{number}.{parts[part]}", tensor
            continue
        both = part == "mlp.experts.gate_up_proj"
        for expert, matrix in enumerate(tensor):
            halves = zip("13", matrix.chunk(2), strict=True) if both else [("2", matrix)]
            for which, weight in halves:
                yield f"{PREFIX}{number}.ffn.experts.{expert}.w{which}.weight", weight


def _block(data: Mapping[str, Any], where: str) -> tuple[int, int]:
    quantization = data.get(_QUANTIZATION) or _flat(data).get(_QUANTIZATION)
    if quantization is None:
        return BLOCK
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"{where} has {_QUANTIZATION} {quantization!r}, but it must be an object."
        )
    method = quantization.get("quant_method", "fp8")
    size = quantization.get("weight_block_size", list(BLOCK))
    whole = (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    )
    if method not in ("fp8", "deepseek_v4_fp8") or not whole:
        raise CompatibilityError(
            f"{where} has a {_QUANTIZATION} of quant_method {method!r} and weight_block_size "
            f"{size!r}, which is not known here (known: fp8 with two numbers)."
        )
    return size[0], size[1]


def _expert_dtype(data: Mapping[str, Any]) -> str:
    quantization = data.get(_QUANTIZATION) or {}
    return str(data.get("expert_dtype") or quantization.get("expert_dtype") or "fp4")


def _write_inside(drafter: DeepseekV4Drafter, dtype: str) -> dict[str, Any]:
    if drafter.own_embedding_VH is not None or drafter.own_head_VH is not None:
        raise CompatibilityError(
            "The drafter holds an embedding or a head, but mtp.* uses the target's; name the "
            "target with --target, so that they are left out where they are the target's."
        )
    _refuse_beyond(drafter.config)
    return to_json(drafter.config, dtype)


LAYOUT = Layout(
    readers={ARCHITECTURE: from_json, V41_ARCHITECTURE: from_json},
    writers={DeepseekV4Drafter: _write_inside},
    holds_tables=False,
    prefix=PREFIX,
    unpack=unpack,
    pack=pack,
)
