"""Where the numbers of a small Qwen3 layer stand in a layer of a larger shape that does the same.

- Width H -> H': the state is zero in the new channels. The mean of squares shrinks by H / H', so
  norm weights are scaled by sqrt(H / H') and epsilon by H / H', which is exact.
- Head size D -> D': rotary pair i (of base^(-2i/D)) moves to pair i D'/D, which turns at the same
  speed; the other channels of the trained heads are zero. The key norm's weight is scaled by
  sqrt(D / D'); the query norm's would be too, but the softmax scale D'^-1/2 needs sqrt(D' / D)
  there, so it stays as it is. Epsilon is the width's: a head's mean of squares m is read as m + e
  with e = eps H D' / (H' D) where it was m + eps, a relative change of the head below
  |e - eps| / 2m (2e-7 for m = 1 and the default shapes).
- New heads, MLP channels and layers are random, so that their arithmetic is real, and their output
  projections zero. Dense kernels multiply by zeros at full price; none of them is denormal.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.config import BackboneConfig
from dspark.errors import CompatibilityError

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model: layers, width, query and key heads, head size, MLP width."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "layers,width,heads,kv heads,head size,MLP width", or a name: qwen3_4b."""
        if text in SHAPES:
            return SHAPES[text]
        try:
            return cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no shape; give layers,width,heads,kv_heads,head_dim,mlp_width, or "
                f"one of {', '.join(SHAPES)}."
            ) from error

    @property
    def numbers(self) -> list[int]:
        """The sizes in the order that `parse` reads."""
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def of_target(cls, config: Any) -> Shape:
        """The shape of a Qwen3 configuration."""
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
        )

    @classmethod
    def of_drafter(cls, backbone: BackboneConfig) -> Shape:
        """The shape of a drafter's backbone."""
        return cls(
            backbone.num_layers,
            backbone.hidden_size,
            backbone.num_heads,
            backbone.num_kv_heads,
            backbone.head_dim,
            backbone.intermediate_size,
        )


QWEN3_06B = Shape(28, 1024, 16, 8, 128, 3072)
SHAPES = {"qwen3_0.6b": QWEN3_06B, "qwen3_4b": Shape(36, 2560, 32, 8, 128, 9728)}


class Placement:
    """Where the numbers of a small layer stand in a large one.

    Args:
        old, new: the shapes.

    Raises:
        CompatibilityError: the old shape does not fit into the new one.
    """

    def __init__(self, old: Shape, new: Shape) -> None:
        for name in old.__dataclass_fields__:
            if getattr(new, name) < getattr(old, name):
                raise CompatibilityError(
                    f"{name} is {getattr(old, name)} and cannot shrink to {getattr(new, name)}; "
                    "name a larger shape."
                )
        group, new_group = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
        if new.head_dim % old.head_dim or new_group < group or new.num_heads % new.num_kv_heads:
            raise CompatibilityError(
                f"{old} does not fit into {new}: head_dim must be a multiple, and each key head "
                "must have as many query heads or more."
            )
        self.old, self.new = old, new
        stretch, half = new.head_dim // old.head_dim, old.head_dim // 2
        low_d = torch.arange(half) * stretch
        self.channels_D = torch.cat((low_d, low_d + new.head_dim // 2))
        heads = torch.arange(old.num_heads)
        self.query = self._rows(heads // group * new_group + heads % group)
        self.key = self._rows(torch.arange(old.num_kv_heads))
        self.width_scale = (old.hidden_size / new.hidden_size) ** 0.5
        self.head_scale = (old.head_dim / new.head_dim) ** 0.5

    def _rows(self, heads_A: Tensor) -> Tensor:
        return (heads_A[:, None] * self.new.head_dim + self.channels_D).flatten()

    def width_norm(self, old_H: Tensor, new_H: Tensor) -> None:
        """A norm over the width."""
        new_H[: self.old.hidden_size] = old_H * self.width_scale

    def layer(self, old: Weights, new: Weights, *, parts: int = 1) -> None:
        """Overwrite one layer that holds random numbers by an equivalent of the old one.

        Args:
            old: its weights.
            new: those to overwrite.
            parts: how many states stand side by side in what the attention reads (Eagle3: two).
        """
        width, mlp = self.old.hidden_size, self.old.intermediate_size
        starts = torch.arange(parts)[:, None] * self.new.hidden_size
        columns = (starts + torch.arange(width)).flatten()
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            self.width_norm(old[name], new[name])
        dtype = new["self_attn.q_norm.weight"].dtype
        old = {name: tensor.to(dtype) for name, tensor in old.items()}
        new["self_attn.q_norm.weight"][self.channels_D] = old["self_attn.q_norm.weight"]
        key_norm_D = old["self_attn.k_norm.weight"] * self.head_scale
        new["self_attn.k_norm.weight"][self.channels_D] = key_norm_D
        for name, rows in (("q", self.query), ("k", self.key), ("v", self.key)):
            weight = new[f"self_attn.{name}_proj.weight"]
            if name != "v":  # the head norms count every channel of a trained head
                weight.view(-1, self.new.head_dim, weight.shape[1])[rows // self.new.head_dim] = 0.0
            weight[rows[:, None], columns] = old[f"self_attn.{name}_proj.weight"]
        self.silence(new)
        new["self_attn.o_proj.weight"][:width, self.query] = old["self_attn.o_proj.weight"]
        for name in ("gate", "up"):
            new[f"mlp.{name}_proj.weight"][:mlp, :width] = old[f"mlp.{name}_proj.weight"]
        new["mlp.down_proj.weight"][:width, :mlp] = old["mlp.down_proj.weight"]

    @staticmethod
    def silence(new: Weights) -> None:
        """Make a layer add nothing to the state."""
        new["self_attn.o_proj.weight"].zero_()
        new["mlp.down_proj.weight"].zero_()
