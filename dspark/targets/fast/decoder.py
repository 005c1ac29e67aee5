"""A decoder of the Llama kind as one flat loop over packed products.

transformers' modules cost Python time that a small model feels: some forty calls of modules per
layer and step. Where every layer is of a class that is known here, the same arithmetic runs as a
flat list of operators: projections with a common input are one product, and the rotary embedding
in fp32 is one complex product (the rows of query and key are then packed in the order that makes
its pairs neighbours, which changes no score). `build_decoder` tries it out against the model's own
forward before anything is packed; what differs keeps its modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.attention.backends import Rule, fresh_attention
from dspark.attention.choice import Attend
from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.targets.families import Anatomy
from dspark.targets.fast.packing import PLAIN, Packer
from dspark.targets.fast.products import Product
from dspark.targets.forward import RaggedCall, run_decoder
from dspark.targets.probe import CacheLayout, relative_distance

# Classes of layers whose forward is the one below, and whether the norms' weights have an offset.
_LAYERS = {
    "LlamaDecoderLayer": 0.0,
    "MistralDecoderLayer": 0.0,
    "Qwen2DecoderLayer": 0.0,
    "Qwen3DecoderLayer": 0.0,
    "Gemma3DecoderLayer": 1.0,
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_FEWEST_POSITIONS = 1024
# Of hidden states to those of the model's own forward, relative.
_TOLERANCE = {torch.float32: 1e-4}
_SHORT_TOLERANCE = 0.05


@dataclass(frozen=True)
class _Norm:
    """A root-mean-square norm.

    On a CPU torch's own is a list of eight operators; by way of the Euclidean norm it is five.
    """

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return torch._fused_rms_norm(x, self.weight.shape, self.weight, self.epsilon)[0]
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return x.mul(torch.addcmul(self._floor, length, length).rsqrt_()).mul_(self._factor)

    @cached_property
    def _floor(self) -> Tensor:
        """What epsilon is to the sum of squares."""
        return self.weight.new_tensor(self.epsilon * len(self.weight))

    @cached_property
    def _factor(self) -> Tensor:
        """The weight, for numbers divided by the root of the sum of squares."""
        factor: Tensor = self.weight.detach() * len(self.weight) ** 0.5
        return factor


@dataclass(frozen=True)
class _Layer:
    """What one layer runs: norms, products and the rule of its attention."""

    input_norm: _Norm
    qkv: Product
    query_key_norm_HD: Tensor | None
    norm_epsilon: float
    rule: Rule
    rotary: int
    output: Product
    attention_out_norm: _Norm | None
    mlp_norm: _Norm
    gate_up: Product
    activate: Any
    down: Product
    mlp_out_norm: _Norm | None


class _Rotary:
    """Rows of one rotary embedding by position, computed as far as anyone has asked.

    Args:
        module: the model's own.
        kind: type of layer that it is asked for; None where there is one kind only.
        like: gives dtype and device.
        paired: the two numbers that turn together are neighbours.
    """

    def __init__(self, module: nn.Module, kind: str | None, like: Tensor, paired: bool) -> None:
        self._module, self._kind, self._like = module, kind, like
        self._paired = paired
        self._table = self._compute(_FEWEST_POSITIONS)

    def rows(self, positions_T: Tensor, longest: int) -> Tensor:
        """What turns heads at these positions."""
        if len(self._table) < longest:
            self._table = self._compute(1 << (longest - 1).bit_length())
        return self._table[positions_T]

    def _compute(self, positions: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            numbers = torch.arange(positions, device=self._like.device).unsqueeze(0)
            options = () if self._kind is None else (self._kind,)
            cosine, sine = (x[0] for x in self._module(self._like, numbers, *options))
            if self._paired:
                half = cosine.shape[-1] // 2
                return torch.complex(cosine[:, :half], sine[:, :half]).unsqueeze(1)
            half = sine.shape[-1] // 2
            signed = torch.cat((-sine[:, :half], sine[:, half:]), -1)
            return torch.stack((cosine, signed), 1).unsqueeze(2)


class FlatDecoder:
    """Runs a batch through all layers; takes the place of `targets.forward.run_tapped`.

    Args:
        anatomy: of the model.
        layout: what it caches.
        packer: lays its weights out.
    """

    def __init__(self, anatomy: Anatomy, layout: CacheLayout, packer: Packer) -> None:
        first: Any = anatomy.layers[0]
        attention = first.self_attn
        self._heads = anatomy.config.num_attention_heads
        self._groups = layout.shapes[0].kv_heads
        self._dim: int = attention.head_dim
        self._paired = anatomy.embedding.weight.dtype == torch.float32
        self._embedding = anatomy.embedding
        self._norm = _norm(anatomy.norm, anatomy.family.norm_offset)
        self._rotary, names = self._rotaries(anatomy)
        self._layers = [
            self._layer(module, packer, layout.windows[i], names[i], anatomy.family.norm_offset)
            for i, module in enumerate(anatomy.layers)
        ]

    def __call__(
        self, _anatomy: Anatomy, call: RaggedCall, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Normed hidden states [T, H] of a ragged batch, and its features [T, F] if any."""
        batch = call.batch
        x_TH: Tensor = self._embedding(batch.input_ids_T)
        turns = [rotary.rows(batch.positions_T, batch.longest) for rotary in self._rotary]
        taken: dict[int, Tensor] = {}
        wanted = set(taps)
        if -1 in wanted:
            taken[-1] = x_TH
        for index, layer in enumerate(self._layers):
            x_TH = self._run(layer, index, x_TH, turns[layer.rotary], call)
            if index in wanted:
                taken[index] = x_TH
        features = torch.cat([taken[tap] for tap in taps], -1) if taps else None
        return self._norm(x_TH), features

    def _run(
        self, layer: _Layer, index: int, x_TH: Tensor, turn: Tensor, call: RaggedCall
    ) -> Tensor:
        rows = x_TH.shape[0]
        qkv = layer.qkv(layer.input_norm(x_TH))
        both = self._heads + self._groups
        heads = qkv.narrow(1, 0, both * self._dim)
        if layer.query_key_norm_HD is not None:
            heads = heads.view(rows, both, self._dim)
            heads = torch._fused_rms_norm(heads, (self._dim,), None, layer.norm_epsilon)[0]
            heads = heads * layer.query_key_norm_HD
        turned = self._turn(heads, rows, turn).transpose(0, 1).unsqueeze(0)
        value = qkv.narrow(1, both * self._dim, self._groups * self._dim)
        mixed = _attend(
            call,
            index,
            turned.narrow(1, 0, self._heads),
            turned.narrow(1, self._heads, self._groups),
            value.view(rows, self._groups, self._dim).transpose(0, 1).unsqueeze(0),
            layer.rule,
        )
        out = layer.output(mixed.transpose(1, 2).reshape(rows, self._heads * self._dim))
        if layer.attention_out_norm is not None:
            out = layer.attention_out_norm(out)
        x_TH = x_TH + out
        gate, up = layer.gate_up(layer.mlp_norm(x_TH)).chunk(2, -1)
        out = layer.down(layer.activate(gate).mul_(up))
        if layer.mlp_out_norm is not None:
            out = layer.mlp_out_norm(out)
        return out.add_(x_TH)

    def _turn(self, heads: Tensor, rows: int, turn: Tensor) -> Tensor:
        """Query and key heads [T, A + G, D] at their positions."""
        both = self._heads + self._groups
        if self._paired:
            pairs = torch.view_as_complex(heads.view(rows, both, self._dim // 2, 2))
            return torch.view_as_real(pairs * turn).view(rows, both, self._dim)
        heads = heads.view(rows, both, self._dim)
        cosine, sine = turn.unbind(1)
        return torch.addcmul(heads * cosine, heads.roll(self._dim // 2, -1), sine)

    def _rotaries(self, anatomy: Anatomy) -> tuple[list[_Rotary], list[int]]:
        """The model's rotary embeddings, and which of them each layer uses."""
        module: Any = dict(anatomy.decoder.named_children())["rotary_emb"]
        types = list(getattr(anatomy.config, "layer_types", None) or ())
        several = type(anatomy.layers[0]).__name__ == "Gemma3DecoderLayer"
        kinds: list[str | None] = [*sorted(set(types))] if several else [None]
        like = anatomy.embedding.weight[:1].unsqueeze(0)
        rotaries = [_Rotary(module, kind, like, self._paired) for kind in kinds]
        count = len(anatomy.layers)
        return rotaries, [kinds.index(types[i]) if several else 0 for i in range(count)]

    def _layer(
        self, module: Any, packer: Packer, window: int | None, rotary: int, offset: float
    ) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        norms = dict(module.named_children())
        after, before_mlp = (
            norms["post_attention_layernorm"],
            norms.get("pre_feedforward_layernorm"),
        )
        after_mlp = norms.get("post_feedforward_layernorm")
        query, key, value = (getattr(attention, name) for name in _PROJECTIONS)
        query_key_norm, epsilon = self._query_key_norm(attention, offset)
        order = None if not self._paired else self._order(query.weight.device)
        layer = _Layer(
            input_norm=_norm(module.input_layernorm, offset),
            qkv=packer.pack(
                [_ordered(query.weight, order), _ordered(key.weight, order), value.weight],
                [_ordered(query.bias, order), _ordered(key.bias, order), value.bias],
            ),
            query_key_norm_HD=query_key_norm,
            norm_epsilon=epsilon,
            rule=Rule(float(attention.scaling), window),
            rotary=rotary,
            output=packer.pack([attention.o_proj.weight], [attention.o_proj.bias]),
            attention_out_norm=None if before_mlp is None else _norm(after, offset),
            mlp_norm=_norm(after if before_mlp is None else before_mlp, offset),
            gate_up=packer.pack(
                [mlp.gate_proj.weight, mlp.up_proj.weight], [mlp.gate_proj.bias, mlp.up_proj.bias]
            ),
            activate=_activation(mlp.act_fn),
            down=packer.pack([mlp.down_proj.weight], [mlp.down_proj.bias]),
            mlp_out_norm=None if after_mlp is None else _norm(after_mlp, offset),
        )
        if packer.kind != "plain":
            _release(module)
        return layer

    def _order(self, device: torch.device) -> Tensor:
        """Old place of each number of a head, so that those that turn together are neighbours."""
        return torch.arange(self._dim, device=device).view(2, -1).T.flatten()

    def _query_key_norm(self, attention: Any, offset: float) -> tuple[Tensor | None, float]:
        parts = dict(attention.named_children())
        if "q_norm" not in parts:
            return None, 0.0
        query, key = (_norm(parts[name], offset) for name in ("q_norm", "k_norm"))
        weights = torch.cat(
            (query.weight.expand(self._heads, -1), key.weight.expand(self._groups, -1))
        )
        if self._paired:
            weights = weights[:, self._order(weights.device)]
        return weights, query.epsilon


def build_decoder(
    anatomy: Anatomy, layout: CacheLayout, packer: Packer
) -> tuple[FlatDecoder | None, str]:
    """A flat decoder for a model, its layers' weights packed and their modules emptied.

    Returns:
        The decoder and an empty reason; or None and why the model keeps its modules.
    """
    reason = _reason_against(anatomy, layout)
    if reason:
        return None, reason
    expected = run_two_steps(anatomy, layout, None)
    found = run_two_steps(anatomy, layout, FlatDecoder(anatomy, layout, PLAIN))
    distance = relative_distance(found, expected)
    if distance > _TOLERANCE.get(expected.dtype, _SHORT_TOLERANCE):
        return None, f"a flat step differs from the modules' by {distance:.2g}"
    return FlatDecoder(anatomy, layout, packer), ""


def _reason_against(anatomy: Anatomy, layout: CacheLayout) -> str:
    names = {type(layer).__name__ for layer in anatomy.layers}
    if len(names) != 1 or not names <= set(_LAYERS):
        return f"its layers are {', '.join(sorted(names))}"
    if _LAYERS[names.pop()] != anatomy.family.norm_offset:
        return "its norms are not those of its layers"
    if len(set(layout.shapes)) != 1 or not all(layout.writers):
        return "its layers cache different things"
    shape = layout.shapes[0]
    for layer in anatomy.layers:
        modules: Any = layer
        linear = [*(getattr(modules.self_attn, name) for name in (*_PROJECTIONS, "o_proj"))]
        linear += [modules.mlp.gate_proj, modules.mlp.up_proj, modules.mlp.down_proj]
        if any(type(module) is not nn.Linear for module in linear):
            return "its projections are not plain ones"
    if shape.key_dim != shape.value_dim or shape.key_dim % 2:
        return "its heads are not all of one even width"
    return ""


_TRIAL_IDS = ([3, 5, 7, 11, 13], [17], [19, 23, 29])
TRIAL_STEPS = tuple(map(len, _TRIAL_IDS))


def run_two_steps(anatomy: Anatomy, layout: CacheLayout, decoder: FlatDecoder | None) -> Tensor:
    """Hidden states of a short prompt and of two steps behind it, by the modules or a flat decoder.

    Their rows: `TRIAL_STEPS`.
    """
    weight = anatomy.embedding.weight
    cache = PagedCache(layout.shapes, 1, dtype=weight.dtype, device=weight.device)
    table, start, found = BlockTable((0,)), 0, list[Tensor]()
    for ids in _TRIAL_IDS:
        known = [token % anatomy.embedding.num_embeddings for token in ids]
        batch = RaggedBatch.build([(table, start, known)], weight.device)
        call = RaggedCall(batch, cache, layout.cache_layers, layout.writers)
        found.append(
            run_decoder(anatomy, call) if decoder is None else decoder(anatomy, call, ())[0]
        )
        start += len(ids)
    return torch.cat(found)


def _attend(
    call: RaggedCall, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule
) -> Tensor:
    """Attention [1, A, T, D] of one layer, its keys and values written to the cache before."""
    batch, cache = call.batch, call.cache
    if cache is None:
        return fresh_attention(query, key, value, batch, rule)
    cache_layer = call.cache_layers[layer]
    cache.write_runs(cache_layer, batch.rows_T, batch.runs, key, value)
    attend: Attend = call.attend
    return attend(query, cache, cache_layer, batch, rule)


def _activation(module: Any) -> Any:
    """A layer's activation, without the calls of its module where it is torch's SiLU."""
    return F.silu if type(module).__name__ in ("SiLUActivation", "SiLU") else module


def _release(layer: nn.Module) -> None:
    """Give up a layer's projections, whose weights live on in its products."""
    for module in layer.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _norm(module: Any, offset: float) -> _Norm:
    epsilons = [vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)]
    weight = module.weight.detach()
    return _Norm(weight + offset if offset else weight, float(epsilons[0]))


def _ordered(rows: Tensor | None, order: Tensor | None) -> Any:
    """Rows of a projection, or its bias, in another order within each head."""
    if rows is None or order is None:
        return rows
    return rows.view(-1, len(order), *rows.shape[1:])[:, order].flatten(0, 1)
