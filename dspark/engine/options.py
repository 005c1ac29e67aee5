"""The options of `generate`, told apart by whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.request import SamplingParams

REQUEST_OPTIONS = ("mask", "timeout_s")
ENGINE_OPTIONS = (
    "batch_size",
    "verifier",
    "schedule",
    "threshold",
    "block_size",
    "tree_nodes",
    "step_tokens",
    "cache_tokens",
    "prefix_reuse",
)


def split_options(
    options: Mapping[str, Any],
) -> tuple[SamplingParams, dict[str, Any], dict[str, Any]]:
    """Part the options of `generate` into sampling parameters, a request's own and the engine's.

    Sampling with a named seed is verified by `coupled`, unless a verifier is named too: its text is
    then plain decoding's, whatever the load and the schedule.

    Raises:
        UsageError: an option is unknown, or has a value that cannot be used.
    """
    rest = dict(options)
    limits, engine_options = (
        {name: rest.pop(name) for name in names if name in rest}
        for names in (REQUEST_OPTIONS, ENGINE_OPTIONS)
    )
    params = SamplingParams.of(rest)
    if "seed" in rest and params.temperature > 0:
        engine_options.setdefault("verifier", "coupled")
    return params, limits, engine_options
