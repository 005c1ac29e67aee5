"""Eagle3's single autoregressive layer (FORMAT_FACTS.md A.4).

A row is made of two parts: the hidden state h of a token (projected features, or what this layer
gave a step before) and the embedding of the token after it. Both are normed and laid side by side
as the input of the attention, so that the q, k and v projections read 2 H numbers; the residual is
h itself, before its norm (or, with `norm_before_residual`, after). What comes out is the next
step's h, and, normed, what the head reads.

Module names are the published state dict's keys. All else of the layer is `layers.Layer`, of
whatever family: training builds `Eagle3Weights` from the parameters at every step (gradients flow
through), decoding once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dspark.drafters.config import BackboneConfig
from dspark.drafters.layers import (
    Layer,
    LayerWeights,
    Pack,
    Product,
    RMSNorm,
    norm,
    packed,
    project,
)

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [.., A, D], key [.., G, D], value [.., G, D]) -> mixed values [.., A, D]."""


class Eagle3Layer(Layer):
    """Holds the layer."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config, input_width=2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size)


class Eagle3Backbone(nn.Module):
    """The parameters of an Eagle3 drafter, under their published names."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.backbone_config = config
        self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = RMSNorm(config.hidden_size)


@dataclass(frozen=True)
class Eagle3Weights:
    """All weights, and the computation."""

    config: BackboneConfig
    fc: Tensor | Product
    hidden_norm_H: Tensor
    layer: LayerWeights
    norm_H: Tensor

    @classmethod
    def of(cls, backbone: Eagle3Backbone) -> Eagle3Weights:
        """The weights of a backbone; gradients flow back to its parameters."""
        config, layer = backbone.backbone_config, backbone.layers[0]
        assert isinstance(layer, Eagle3Layer)
        return cls(
            config=config,
            fc=backbone.fc.weight,
            hidden_norm_H=layer.hidden_norm.weight,
            layer=LayerWeights.of(layer, config),
            norm_H=backbone.norm.weight,
        )

    def like(self, other: Tensor) -> Eagle3Weights:
        """The same in dtype and on the device of `other`."""
        return replace(
            self,
            fc=self.fc.to(other) if isinstance(self.fc, Tensor) else self.fc,
            hidden_norm_H=self.hidden_norm_H.to(other),
            layer=self.layer.like(other),
            norm_H=self.norm_H.to(other),
        )

    def packed(self, pack: Pack) -> Eagle3Weights:
        """The same with its projections packed, for decoding."""
        return replace(self, fc=packed(pack, self.fc), layer=self.layer.packed(pack, looks=True))

    def project(self, features: Tensor) -> Tensor:
        """The first hidden states [.., H] of captured features [.., F]."""
        return project(features, self.fc)

    def key_value(
        self, embedded: Tensor, hidden: Tensor, rotary_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [.., G, D] of rows that are only looked at.

        Args:
            embedded: embeddings [.., H] of the tokens after the rows' own.
            hidden: hidden states [.., H] of the rows.
            rotary_rows: `layers.rotary` of their positions.
        """
        return self.layer.key_value(self._input(embedded, hidden), rotary_rows.unbind(-3))

    def step(self, embedded: Tensor, hidden: Tensor, rotary_rows: Tensor, mix: Mix) -> Tensor:
        """One pass through the layer.

        Args:
            embedded: embeddings [.., H] of the tokens after the rows' own.
            hidden: hidden states [.., H] of the rows.
            rotary_rows: `layers.rotary` of their positions.
            mix: attends.

        Returns:
            The next hidden states [.., H], before the final norm.
        """
        read = self._input(embedded, hidden)
        # The input's second half is the normed hidden state.
        residual = read[..., embedded.shape[-1] :] if self.config.norm_before_residual else hidden
        return self.layer.finish(residual, mix(*self.layer.heads(read, rotary_rows.unbind(-3))))

    def final(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., H] as the head reads them."""
        return norm(hidden, self.norm_H, self.config)

    def _input(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        normed = (
            norm(embedded, self.layer.input_norm_H, self.config),
            norm(hidden, self.hidden_norm_H, self.config),
        )
        return torch.cat(normed, dim=-1)
