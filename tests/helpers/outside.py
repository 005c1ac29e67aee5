"""What a package outside of dspark brings: drafters and a checkpoint layout, one object each.

docs/adding_a_family.md shows the entry points that name them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.drafters.base import DrafterKind, Layout, Proposal
from dspark.drafters.checkpoints.published import dspark_from_json, dspark_to_json
from dspark.drafters.config import DSparkConfig
from dspark.drafters.dspark import DSparkDrafter


class RepeatDrafter:
    """Drafts the last token again and again: no weights, no features, no cache."""

    block_size, taps, context_shapes = 3, (), ()
    reads_next_token, rows_ahead = False, 0

    def bind(self, parts):
        """Nothing to borrow."""

    def observe(self, context, batch, features_TF, next_tokens_T):
        """Nothing to keep."""

    def propose(self, context, batch, draw):
        tokens_R1 = batch.anchors_R.unsqueeze(1)
        for step in range(batch.num_drafts):
            draw(step, torch.zeros(tokens_R1.shape), tokens_R1)
        return Proposal(torch.zeros(len(tokens_R1), batch.num_drafts))


REPEAT = DrafterKind(create=RepeatDrafter)


@dataclass(frozen=True)
class OtherConfig(DSparkConfig):
    """A configuration of its own."""


class OtherDrafter(DSparkDrafter):
    """A drafter with weights of its own."""


def _read(data, where):
    return OtherConfig(**vars(dspark_from_json(data, where)))


def _write(drafter, dtype):
    return dspark_to_json(drafter.config, dtype) | {"architectures": ["OtherModel"]}


OTHER = DrafterKind(
    drafter=OtherDrafter,
    config=OtherConfig,
    build=lambda config, names, where: OtherDrafter(config),
    readers={"OtherModel": _read},
    write=_write,
)


def _read_flat(data, where):
    return dspark_from_json(data["drafter"], where)


def _write_flat(drafter, dtype):
    return {"architectures": ["FlatModel"], "drafter": dspark_to_json(drafter.config, dtype)}


FLAT = Layout(
    readers={"FlatModel": _read_flat},
    writers={DSparkDrafter: _write_flat},
    renamed={"drafter.": ""},
)
