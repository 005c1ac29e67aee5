"""The real accepted length of a drafter while it trains: held-out prompts, decoded by the engine.

What a training step reports is an expectation under the true tokens' prefixes; what counts is how
much of its drafts stays when it drafts after its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dspark.data.conversations import Prompt
from dspark.data.samples import Sample
from dspark.drafters.registry import AnyDrafter
from dspark.errors import RecipeError
from dspark.request import Request, SamplingParams, Stats
from dspark.targets.target import Target
from dspark.training.parallel import sum_numbers
from dspark.training.run_settings import EvaluationSettings

Decode = Callable[[Target, AnyDrafter, Sequence[Request]], Stats]
"""Decodes requests with a drafter, by the engine, and counts."""

Encode = Callable[[Target, Sequence[Prompt]], Sequence[Sequence[int]]]
"""Token ids of prompts, as a server would make them."""


@dataclass(frozen=True)
class HeldOut:
    """The measurement: requests, and how they are decoded.

    Attributes:
        target: frozen.
        drafter: bound, in training; it is measured as it stands.
        requests: at temperature 0, each with a seed of its own.
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


def without_held_out(
    samples: list[Sample], settings: EvaluationSettings | None
) -> tuple[list[Sample], list[Sample]]:
    """Divide samples into those to train on and those whose prompts are held out.

    Raises:
        RecipeError: nothing would be left to train on.
    """
    count = 0 if settings is None else settings.heldout or 0
    if count >= len(samples) > 0:
        raise RecipeError(
            f"evaluation.heldout is {count}, but there are {len(samples)} usable samples; hold out "
            "fewer."
        )
    return samples[: len(samples) - count], samples[len(samples) - count :]


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
    """Write a drafter in the place of the best one before it.

    Args:
        write: writes it into a directory that does not exist.
        best: where it is to lie.
    """
    from dspark.training.checkpoints import put_in_place

    fresh = best.with_name(f"{best.name}.new")
    write(fresh)
    put_in_place(fresh, best)
