"""Sampling parameters for regeneration: as requested, else as the model's authors recommend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark.errors import CheckpointError
from dspark.params import SamplingParams
from dspark.sources.gguf import is_gguf
from dspark.sources.names import origin

GENERATION_CONFIG = "generation_config.json"
NEUTRAL = {"temperature": None, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
Thinking = Literal["on", "off", "default"]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, as far as specified.

    Attributes:
        values: by the names of `SamplingParams`; absent ones are left to the backend.
        recommended: names of those that come from the model's own generation settings.
    """

    values: Mapping[str, Any]
    recommended: tuple[str, ...] = ()

    def params(self, max_new_tokens: int, seed: int) -> SamplingParams:
        """Parameters for our engine; the default temperature is 1.

        Raises:
            UsageError: a value is outside its range.
        """
        given = {"temperature": 1.0, **self.values}
        return SamplingParams.of({**given, "max_new_tokens": max_new_tokens, "seed": seed})


def choose_sampling(given: Mapping[str, Any], recommended: Mapping[str, Any]) -> Sampling:
    """The requested values, completed by the model's recommendations.

    At temperature 0 no recommendations apply, since the argmax needs no filters.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("temperature") == 0:
        return Sampling(chosen)
    added = {name: value for name, value in recommended.items() if name not in chosen}
    return Sampling({**added, **chosen}, tuple(added))


def recommended_sampling(
    source: str, *, revision: str | None = None, offline: bool = False
) -> dict[str, Any]:
    """The sampling values in a model's generation_config.json; empty without any.

    Args:
        source: a directory, a GGUF file (which has none), a hub id, or a shipped name.
        revision: on the hub.
        offline: look only on this machine.
    """
    found = origin(source, offline=offline)
    if is_gguf(found):
        return {}
    source, folder = str(found), Path(found).expanduser()
    if not folder.is_dir():
        if source.count("/") != 1:
            return {}
        from dspark.drafters.checkpoints.files import fetch  # imports torch; only hub ids need it

        try:
            folder = fetch(source, revision, offline, (GENERATION_CONFIG,))
        except CheckpointError:
            return {}
    try:
        config = json.loads((folder / GENERATION_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("do_sample") is False:
        return {}
    values = {name: config.get(name) for name in NEUTRAL}
    return {n: v for n, v in values.items() if isinstance(v, (int, float)) and v != NEUTRAL[n]}


def template_options(thinking: Thinking) -> dict[str, Any]:
    """Chat-template variables that switch thinking."""
    return {} if thinking == "default" else {"enable_thinking": thinking == "on"}
