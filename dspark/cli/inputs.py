"""What commands start from: prompts, a loaded model, and what steps cost on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspark.cli.groups import Common, Loading, Pair, Prompts, Speculation
from dspark.cli.options import picked
from dspark.cli.screen import Screen
from dspark.data.conversations import Prompt, read_prompts
from dspark.errors import DataError, UsageError, is_unicode
from dspark.request import Request

if TYPE_CHECKING:
    from dspark.engine.engine import Engine
    from dspark.engine.model import Model
    from dspark.scheduling.calibration import TemperatureClass

# What a kind of packed weights means, said at the start.
_WEIGHTS = {
    "fp16": "the checkpoint's values in 16 bits, computed in 32",
    "onednn": "laid out for oneDNN",
    "int8": "quantised to 8 bits: outputs are those of the quantised model",
}
# What `dspark.load` takes as it was given.
_LOADING = (
    "device", "dtype", "revision", "offline", "trust_remote_code", "batch_invariant",
    "cuda_graphs", "compile", "weights", "quantize",
)  # fmt: skip
# A visit of all points that has begun is finished, so measuring may take somewhat longer.
_LIMIT_S = 5.0


def encode(prompt: Prompt, model: Model, *, raw: bool) -> tuple[int, ...]:
    """Token ids: by the chat template where there is one, unless `raw`.

    Raises:
        RequestError: nothing to encode, or no template for a dialogue.
        UsageError: `raw` is asked of a dialogue of several messages.
    """
    messages = prompt.messages or ()
    if raw and len(messages) > 1:
        raise UsageError(
            f"--raw takes texts, but a prompt is a dialogue of {len(messages)} messages; "
            "leave --raw out."
        )
    if len(messages) > 1:
        return model.encode(messages)
    return model.encode(prompt.text, raw=raw)


def named_prompts(options: Prompts) -> list[Prompt]:
    """The prompts that the options name.

    Raises:
        UsageError: none is named, and standard input is a terminal.
        DataError: the file is missing or malformed, or standard input is not text.
    """
    if options.prompt:
        return [Prompt(None, text) for text in options.prompt]
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if sys.stdin.isatty():
        raise UsageError("There is no prompt; give --prompt TEXT, --prompts FILE or a pipe.")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"Standard input is not {error.encoding} text; convert it.") from error
    if not is_unicode(text):  # where the locale lets any byte through
        raise DataError(f"Standard input is not {sys.stdin.encoding} text; convert it.")
    return [Prompt(None, text.removesuffix("\n"))]


def use_threads(options: Common) -> None:
    """Apply `--threads`."""
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


def load_pair(options: Pair, screen: Screen) -> Model:
    """Load the target and the drafter that the options name.

    Raises:
        CheckpointError, CompatibilityError, UsageError: as `dspark.load`.
    """
    return load_model(
        options.target, options.draft, options, screen, draft_top_k=options.draft_top_k
    )


def load_model(
    target: str,
    draft: str | None,
    options: Loading,
    screen: Screen,
    *,
    draft_top_k: int | None = None,
) -> Model:
    """Load a target with a drafter.

    Raises:
        CheckpointError, CompatibilityError, UsageError: as `dspark.load`.
    """
    with screen.log.status(f"Loading {target} ..."):
        from dspark.engine.loading import load

        use_threads(options)
        model = load(
            target,
            draft,
            draft_top_k=draft_top_k,
            **picked(options, *_LOADING),
        )
    loaded = model.target
    dtype = str(loaded.parts().embedding_VH.dtype).removeprefix("torch.")
    if (options.dtype, loaded.device.type, dtype) == ("auto", "cpu", "bfloat16"):
        screen.remark("Dtype: bfloat16, which is measured to be faster here than float32.")
    if loaded.own_cache:
        screen.remark(
            f"{target} keeps more than keys and values: requests run through its own cache, one "
            "after the other, and share no prefixes; outputs are exact, and slower."
        )
    if loaded.weights != "plain":
        screen.remark(f"Weights: {loaded.weights} ({_WEIGHTS[loaded.weights_kind]}).")
    return model


def _classes_of(requests: Sequence[Request] | None) -> set[TemperatureClass]:
    """Temperature classes of requests; both where they are yet to come."""
    from dspark.scheduling.calibration import temperature_class

    if requests is None:
        return {"greedy", "sampled"}
    return {temperature_class(request.params.temperature) for request in requests}


def measure_costs(
    options: Speculation,
    model: Model,
    requests: Sequence[Request] | None,
    at_once: int,
    screen: Screen,
) -> None:
    """Measure the cost table where a better schedule could serve with it; it is kept.

    Args:
        options: how the drafter is used.
        model: the pair.
        requests: to be decoded; None where they are yet to come.
        at_once: requests in a round at most.
        screen: for progress.
    """
    from dspark.engine.schedule_choice import cover_costs, wants_costs

    schedule, block_size = options.schedule, options.block_size
    wanted = wants_costs(
        model, _classes_of(requests), schedule, options.verifier, block_size, at_once
    )
    if options.no_profile or not wanted:
        return
    started = time.perf_counter()
    with screen.progress("measuring what steps cost") as tell:
        cover_costs(model, at_once, block_size=block_size, limit_s=_LIMIT_S, progress=tell)
    what = "1 request costs" if at_once == 1 else f"up to {at_once} requests cost"
    screen.remark(
        f"Measured what steps of {what} on this machine, in {time.perf_counter() - started:.0f} s; "
        "kept in the user's cache (--no-profile skips it)."
    )


def tell_schedule(
    model: Model, engine: Engine, requests: Sequence[Request] | None, screen: Screen
) -> None:
    """Print which schedule serves, and why."""
    from dspark.engine.schedule_choice import reason

    if model.drafter is not None:
        screen.remark(reason(model, engine, _classes_of(requests)), "dim")
