"""DeepSeek-V4's draft module written out slowly, from a file's own tensors, and tiny drafters."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark.data.templates import train_tokenizer
from dspark.drafters.checkpoints.checkpoint import save
from dspark.drafters.checkpoints.deepseek_v4 import from_json
from dspark.drafters.checkpoints.files import CONFIG, INDEX, WEIGHTS
from dspark.drafters.deepseek_v4 import DeepseekV4Config, DeepseekV4Drafter
from dspark.drafters.deepseek_v4_layers import DeepseekV4Layers
from tests.helpers.state_models import STATE_MODELS, new_model
from tests.helpers.targets import lent_parts

STAGES, VOCAB = 3, 300
TEXTS = ["how many apples are left", "a table for two"] * 4
DRAFT_FIELDS = {
    "dspark_block_size": 5, "dspark_noise_token_id": 3, "dspark_target_layer_ids": [1, 3],
    "dspark_markov_rank": 64,
}  # fmt: skip
# As many entries as the index may choose: where it must choose, entries of score 0 tie, and which
# of them torch takes hangs on the shape of a chunk (docs/LOG.md).
SHAPE = STATE_MODELS["deepseek_v4"] | {
    "index_topk": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 160,
    "eos_token_id": 2,
    "hc_sinkhorn_iters": 3,
}


def tiny_layers(width: int = 32, num_taps: int = 2, **changes: Any) -> DeepseekV4Layers:
    """Three stages with a window of 6."""
    fields: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 32,
        "num_layers": STAGES,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 16,
        "num_taps": num_taps,
        "rope_theta": 10000.0,
        "sliding_layers": tuple(range(STAGES)),
        "sliding_window": 6,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
        "o_groups": 2,
        "rope_head_dim": 8,
        "num_experts": 6,
        "experts_per_token": 2,
        "swiglu_limit": 0.4,
    }
    return DeepseekV4Layers(**(fields | changes))


def tiny_config(vocab: int, layers: DeepseekV4Layers, **changes: Any) -> DeepseekV4Config:
    """Five drafts."""
    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "block_size": 5,
        "mask_token_id": 3,
        "target_layer_ids": tuple(range(layers.num_taps)),
        "num_target_layers": 4,
        "markov_rank": 8,
    }
    return DeepseekV4Config(backbone=layers, **(fields | changes))


@torch.no_grad()
def tiny_drafter(parts: Any, config: DeepseekV4Config, seed: int = 1) -> DeepseekV4Drafter:
    """Bound, with every number random, also those that start at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    drafter = DeepseekV4Drafter.from_target(
        parts, config, generator=generator, init_std=0.2, copy_final_norm=False
    ).eval()
    for name, tensor in drafter.state_dict().items():
        if tensor.dim() == 1:
            around = 1.0 if "norm" in name or name.endswith("scale") else 0.0
            tensor.copy_(around + 0.4 * torch.randn(tensor.shape, generator=generator))
    return drafter


def write_target(path: Path) -> Path:
    """A target in two shards, of which the second is the draft module, as published."""
    model = new_model("deepseek_v4", **SHAPE)
    model.save_pretrained(path)
    train_tokenizer(TEXTS, VOCAB).save_pretrained(path)
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    data = json.loads((path / CONFIG).read_text()) | DRAFT_FIELDS
    config = from_json(data, CONFIG)
    drafter = tiny_drafter(lent_parts(*(table.detach() for table in tables)), config)
    written = save(drafter, path / "alone", "deepseek_v4", dtype=None)
    (path / CONFIG).write_text(json.dumps(data))
    shards = {"model-00001.safetensors": path, "model-00002.safetensors": written.directory}
    index = {}
    for name, directory in shards.items():
        tensors = load_file(directory / WEIGHTS)
        save_file(tensors, path / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / WEIGHTS).unlink()
    shutil.rmtree(written.directory)
    return path


class SlowModule:
    """`mtp.*` row by row in float64, after the published description; knows nothing of ours.

    Args:
        tensors: the file's, without scales.
        config: shapes and constants.
        embedding_VH: the target's.
        head_VH: likewise.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: DeepseekV4Config,
        embedding_VH: Tensor,
        head_VH: Tensor,
    ) -> None:
        self.tensors = {name: x.double() for name, x in tensors.items()}
        self.config, self.layers = config, config.backbone
        self.embedding_VH, self.head_VH = embedding_VH.double(), head_VH.double()

    def __call__(self, features_TF: Tensor, anchor: int) -> tuple[Tensor, Tensor]:
        """States [K, H] before the final norm, and logits [K, V] without the Markov bias.

        Args:
            features_TF: of the context, whose length is the anchor's position.
            anchor: its token.
        """
        layers, length = self.layers, len(features_TF)
        features = features_TF.double()
        main = [self._norm("mtp.0.main_norm", self._at("mtp.0.main_proj", f)) for f in features]
        tokens = [anchor] + [self.config.mask_token_id] * (self.config.block_size - 1)
        streams = [
            torch.stack([self.embedding_VH[token]] * layers.hc_mult) for token in tokens
        ]  # per row [S, H]
        mixes: list[Tensor | None] = [None] * len(tokens)
        for stage in range(layers.num_layers):
            name = f"mtp.{stage}"
            seen = [
                self._key_value(name, main[position], position)
                for position in range(max(0, length - layers.sliding_window), length)
            ]
            for part, run in (("attn", self._attention), ("ffn", self._experts)):
                mixed = [self._mix(f"{name}.hc_{part}", x) for x in streams]
                before = mixes if layers.carried_mix else [pre for pre, _, _ in mixed]
                read = [
                    self._norm(f"{name}.{part}_norm", x[0] if pre is None else pre @ x)
                    for x, pre in zip(streams, before, strict=True)
                ]
                out = run(name, read, seen, length)
                streams = [
                    torch.outer(post, y) + comb.T @ x
                    for x, y, (_, post, comb) in zip(streams, out, mixed, strict=True)
                ]
                mixes = [pre for pre, _, _ in mixed]
        last = f"mtp.{layers.num_layers - 1}"
        if layers.carried_mix:
            hidden = [pre @ x for pre, x in zip(mixes, streams, strict=True)]
        else:
            hidden = [self._collapse(f"{last}.hc_head", x) for x in streams]
        logits = [self.head_VH @ self._norm(f"{last}.norm", x) for x in hidden]
        return torch.stack(hidden), torch.stack(logits)

    def markov(self, token: int) -> tuple[Tensor, Tensor]:
        """Embedding [r] of a token, and the bias [V] that it gives to the next."""
        last = f"mtp.{self.layers.num_layers - 1}.markov_head."
        names = ("embed", "head") if self.layers.carried_mix else ("markov_w1", "markov_w2")
        first, second = (self.tensors[f"{last}{name}.weight"] for name in names)
        return first[token], second @ first[token]

    def confidence(self, hidden_H: Tensor, embedded_r: Tensor) -> Tensor:
        """Its logit."""
        weight = self.tensors[f"mtp.{self.layers.num_layers - 1}.confidence_head.proj.weight"]
        return weight[0] @ torch.cat((hidden_H, embedded_r))

    def _at(self, name: str, x: Tensor) -> Tensor:
        return self.tensors[f"{name}.weight"] @ x

    def _norm(self, name: str | None, x: Tensor) -> Tensor:
        scaled = x / math.sqrt(float((x * x).mean()) + self.layers.rms_norm_eps)
        return scaled if name is None else scaled * self.tensors[f"{name}.weight"]

    def _turn(self, x: Tensor, position: int) -> Tensor:
        """The last dimensions, pair by pair, by an angle that grows with the position."""
        x, turned = x.clone(), self.layers.rope_head_dim
        begin = len(x) - turned
        for pair in range(turned // 2):
            angle = position * self.layers.rope_theta ** (-2 * pair / turned)
            a, b = float(x[begin + 2 * pair]), float(x[begin + 2 * pair + 1])
            x[begin + 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            x[begin + 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return x

    def _key_value(self, stage: str, x: Tensor, position: int) -> Tensor:
        return self._turn(
            self._norm(f"{stage}.attn.kv_norm", self._at(f"{stage}.attn.wkv", x)), position
        )

    def _attention(
        self, stage: str, rows: list[Tensor], seen: list[Tensor], length: int
    ) -> list[Tensor]:
        layers, name = self.layers, f"{stage}.attn"
        keys = [*seen, *(self._key_value(stage, x, length + i) for i, x in enumerate(rows))]
        found = []
        for i, x in enumerate(rows):
            low = self._norm(f"{name}.q_norm", self._at(f"{name}.wq_a", x))
            heads = self._at(f"{name}.wq_b", low).view(layers.num_heads, layers.head_dim)
            outs = []
            for head, query in enumerate(heads):
                turned = self._turn(self._norm(None, query), length + i)
                scores = [float(turned @ key) / math.sqrt(layers.head_dim) for key in keys]
                sink = float(self.tensors[f"{name}.attn_sink"][head])
                total = sum(math.exp(s) for s in scores) + math.exp(sink)
                mixed = sum(math.exp(s) / total * key for s, key in zip(scores, keys, strict=True))
                outs.append(self._turn(mixed, -(length + i)))
            groups = torch.cat(outs).view(layers.o_groups, -1)
            first = self.tensors[f"{name}.wo_a.weight"].view(
                layers.o_groups, layers.o_lora_rank, -1
            )
            low = torch.cat([matrix @ group for matrix, group in zip(first, groups, strict=True)])
            found.append(self._at(f"{name}.wo_b", low))
        return found

    def _experts(
        self, stage: str, rows: list[Tensor], _seen: list[Tensor], _length: int
    ) -> list[Tensor]:
        layers, name, found = self.layers, f"{stage}.ffn", []
        for x in rows:
            scores = torch.sqrt(torch.log1p(torch.exp(self._at(f"{name}.gate", x))))
            ranked = (scores + self.tensors[f"{name}.gate.bias"]).argsort(descending=True)
            chosen = ranked[: layers.experts_per_token].tolist()
            total = sum(float(scores[e]) for e in chosen)
            out = self._gated(f"{name}.shared_experts", x)
            for e in chosen:
                weight = float(scores[e]) / total * layers.routed_scaling_factor
                out = out + weight * self._gated(f"{name}.experts.{e}", x)
            found.append(out)
        return found

    def _gated(self, name: str, x: Tensor) -> Tensor:
        limit = self.layers.swiglu_limit
        gate = self._at(f"{name}.w1", x).clamp(max=limit)
        up = self._at(f"{name}.w3", x).clamp(-limit, limit)
        return self._at(f"{name}.w2", gate / (1 + torch.exp(-gate)) * up)

    def _mix(self, name: str, streams_SH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, eps = self.layers.hc_mult, self.layers.hc_eps
        weights = self.tensors[f"{name}_fn"] @ self._norm(None, streams_SH.flatten())
        base, scale = self.tensors[f"{name}_base"], self.tensors[f"{name}_scale"]
        pre = torch.sigmoid(weights[:count] * scale[0] + base[:count]) + eps
        post = 2 * torch.sigmoid(weights[count : 2 * count] * scale[1] + base[count : 2 * count])
        comb = (weights[2 * count :] * scale[2] + base[2 * count :]).view(count, count)
        comb = comb.softmax(-1) + eps
        comb = comb / (comb.sum(0, keepdim=True) + eps)
        for _ in range(self.layers.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(1, keepdim=True) + eps)
            comb = comb / (comb.sum(0, keepdim=True) + eps)
        return pre, post, comb

    def _collapse(self, name: str, streams_SH: Tensor) -> Tensor:
        weights = self.tensors[f"{name}_fn"] @ self._norm(None, streams_SH.flatten())
        base, scale = self.tensors[f"{name}_base"], self.tensors[f"{name}_scale"]
        return (torch.sigmoid(weights * scale[0] + base) + self.layers.hc_eps) @ streams_SH
