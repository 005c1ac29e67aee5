"""Real accepted length of a drafter during training: held-out prompts decoded by the engine.

A training step reports an expectation under the prefixes of the true tokens; decoding measures how
much is accepted when the drafter continues its own drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dspark.data.conversations import Prompt
from dspark.data.samples import Sample
from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.request import Request, SamplingParams, Stats
from dspark.targets.target import Target
from dspark.training.parallel import sum_numbers
from dspark.training.settings import EvaluationSettings

Decode = Callable[[Target, AnyDrafter, Sequence[Request]], Stats]
"""Decodes requests with a drafter by the engine and returns counts."""

Encode = Callable[[Target, Sequence[Prompt]], Sequence[Sequence[int]]]
"""Token ids of prompts, encoded as in serving."""


@dataclass(frozen=True)
class HeldOut:
    """A measurement of the drafter being trained.

    Attributes:
        target: frozen.
        drafter: bound.
        requests: at temperature 0, each with its own seed.
        temperatures: to decode them at, one after the other.
        decode: by the engine.
        rank, ranks: of the processes, which share the requests.
    """

    target: Target
    drafter: AnyDrafter
    requests: Sequence[Request]
    temperatures: Sequence[float]
    decode: Decode
    rank: int
    ranks: int

    def measure(self) -> Mapping[str, float]:
        """Accepted length by temperature, `real_accepted_length_t0` and so on, and their mean."""
        self.drafter.eval()
        found: dict[str, float] = {}
        for temperature in self.temperatures:
            mine = [
                Request(r.prompt_ids, replace(r.params, temperature=temperature))
                for r in self.requests[self.rank :: self.ranks]
            ]
            stats = self.decode(self.target, self.drafter, mine) if mine else Stats()
            both = sum_numbers({"tokens": stats.tokens, "rounds": stats.rounds})
            length = both["tokens"] / max(both["rounds"], 1.0)
            found[f"real_accepted_length_t{temperature:g}"] = length
        self.drafter.train()
        return {"real_accepted_length": sum(found.values()) / len(found), **found}


def requests_of(prompts: Sequence[Sequence[int]], settings: EvaluationSettings) -> list[Request]:
    """The requests of an evaluation.

    Args:
        prompts: token ids.
        settings: how many, and how long.
    """
    return [
        Request(tuple(ids), SamplingParams(settings.max_new_tokens, seed=seed))
        for seed, ids in enumerate(prompts[: settings.limit])
    ]


def prompts_of(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    """Token ids before each sample's first answer."""
    firsts = [sample.loss_mask.index(True) for sample in samples]
    return [s.input_ids[:first] for s, first in zip(samples, firsts, strict=True) if first]


def put_best(write: Callable[[Path], None], best: Path) -> None:
    """Replace the best drafter so far.

    Args:
        write: writes the drafter into a new directory.
        best: the directory to replace.
    """
    from dspark.training.checkpoints import put_in_place

    fresh = best.with_name(f"{best.name}.new")
    write(fresh)
    put_in_place(fresh, best)
