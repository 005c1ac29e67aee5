"""A target with its drafter, ready to generate: what `dspark.load` returns."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, overload

from jinja2 import TemplateError

from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.profile import Progress, machine_key, measure_costs
from dspark.engine.record import Watch
from dspark.engine.schedule import Schedule, ScheduleName
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import Piece
from dspark.errors import (
    CompatibilityError,
    DataError,
    DSparkWarning,
    RequestError,
    UsageError,
)
from dspark.request import Output, Request, SamplingParams, Verifier
from dspark.scheduling.calibration import TemperatureClass, temperature_class
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost import CostTable
from dspark.scheduling.machine import MachineKey
from dspark.targets.target import Target

Messages = Sequence[Mapping[str, str]]


class Model:
    """A target with its drafter.

    Args:
        target: the model whose outputs are wanted.
        drafter: who proposes, bound to the target; None decodes plainly.
        name: where the drafter came from; a cost table belongs to it.
        directory: where the drafter lies, if it lies anywhere.
        calibration: of the drafter's confidences.
        costs: of this machine; by default those that `dspark profile` left in the user's cache.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        name: str = "",
        directory: Path | None = None,
        calibration: Calibration | None = None,
        costs: CostTable | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.name = name
        self.directory = directory
        self.calibration = calibration
        self._costs = costs

    @property
    def machine(self) -> MachineKey:
        """What a cost table of this pair, here and now, belongs to."""
        return machine_key(self.target, self.name)

    @property
    def costs(self) -> CostTable | None:
        """What steps cost on this machine, if it has been measured (`profile`).

        Raises:
            DataError: the table in the user's cache is damaged.
        """
        if self._costs is not None:
            return self._costs
        machine = self.machine
        if self.drafter is None or not machine.path().is_file():
            return None
        return CostTable.load(machine=machine)

    def _usable_costs(self) -> bool:
        """Whether there is a cost table; one that is damaged is warned of."""
        try:
            return self.costs is not None
        except (DataError, CompatibilityError) as error:
            warnings.warn(DSparkWarning(str(error)), stacklevel=4)
            return False

    def use_costs(self, path: str | Path) -> None:
        """Take the cost table of a file from now on.

        Raises:
            DataError: the file is missing or damaged.
            CompatibilityError: it belongs to another machine, dtype, target or drafter.
        """
        self._costs = CostTable.load(path, self.machine)

    def profile(
        self,
        *,
        max_requests: int = 8,
        block_size: int | None = None,
        repeats: int = 5,
        progress: Progress | None = None,
    ) -> CostTable:
        """Measure what steps cost on this machine, and use that from now on.

        Raises:
            UsageError: there is no drafter, or a size is not possible.
        """
        if self.drafter is None:
            raise UsageError(
                "A cost table needs a drafter, whose cost is half of it; give one with --draft."
            )
        self._costs = measure_costs(
            self.target,
            self.drafter,
            self.machine,
            max_requests=max_requests,
            block_size=block_size,
            repeats=repeats,
            progress=progress,
        )
        return self._costs

    def engine(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        verifier: Verifier = "block",
        schedule: ScheduleName | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        watch: Watch | None = None,
        strict: bool = False,
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
        prefix_reuse: bool = True,
        max_length: int | None = None,
    ) -> Engine:
        """An engine with room for these requests, `batch_size` of them at once.

        Args:
            requests: what is to be decoded.
            batch_size: requests in a round at most.
            verifier: token, block or coupled.
            schedule: None takes `lagged` where the drafter is calibrated for these requests and
                this machine is profiled, else `fixed`. A schedule that weighs costs on a machine
                without a cost table measures one first.
            threshold: of the schedule `threshold`.
            block_size: drafts per round, at most the drafter's own, which is the default.
            watch: is told about every round in which a drafter takes part.
            strict: raise what the drafter does wrong, in place of going on plainly.
            step_tokens: rows of one step, as `Engine`.
            cache_tokens: rows of the cache, as `Engine`.
            prefix_reuse: whether prompts share the pages of equal beginnings.
            max_length: tokens of prompt and output together, where requests are to follow that are
                longer than these.

        Raises:
            RequestError: there are no requests.
            UsageError: an option has a value that cannot be used.
        """
        if not requests:
            raise RequestError("There are no requests; give at least one prompt.")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, but must be at least 1.")
        longest = max(len(r.prompt_ids) + r.params.max_new_tokens for r in requests)
        longest = max(longest, max_length or 0)
        at_once = min(batch_size, sum(r.params.n for r in requests))
        kinds = {temperature_class(r.params.temperature) for r in requests}
        return Engine(
            self.target,
            self.drafter,
            max_requests=at_once,
            max_length=longest,
            verifier=verifier,
            schedule=self._scheduler(kinds, schedule, threshold, verifier, block_size, at_once),
            block_size=block_size,
            watch=watch,
            strict=strict,
            step_tokens=step_tokens,
            cache_tokens=cache_tokens,
            prefix_reuse=prefix_reuse,
        )

    def open_engine(
        self,
        *,
        max_requests: int = 8,
        max_length: int | None = None,
        max_queue: int | None = None,
        verifier: Verifier = "block",
        schedule: ScheduleName | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
        prefix_reuse: bool = True,
    ) -> Engine:
        """An engine for requests that are yet to come, of any temperature: a server's.

        Args:
            max_requests: requests in a round at most.
            max_length: tokens of prompt and output together; the target's context by default.
            max_queue: requests that may wait beyond those; None for any number.
            verifier: token, block or coupled.
            schedule: as in `engine`; calibration must cover greedy and sampled requests.
            threshold: of the schedule `threshold`.
            block_size: drafts per round, at most the drafter's own, which is the default.
            step_tokens: rows of one step, as `Engine`.
            cache_tokens: rows of the cache, as `Engine`.
            prefix_reuse: whether prompts share the pages of equal beginnings.

        Raises:
            UsageError: an option has a value that cannot be used.
        """
        kinds: set[TemperatureClass] = {"greedy", "sampled"}
        return Engine(
            self.target,
            self.drafter,
            max_requests=max_requests,
            max_length=max_length,
            verifier=verifier,
            schedule=self._scheduler(
                kinds, schedule, threshold, verifier, block_size, max_requests
            ),
            block_size=block_size,
            step_tokens=step_tokens,
            cache_tokens=cache_tokens,
            max_queue=max_queue,
            prefix_reuse=prefix_reuse,
        )

    def _scheduler(
        self,
        kinds: Set[TemperatureClass],
        name: ScheduleName | None,
        threshold: float | None,
        verifier: Verifier,
        block_size: int | None,
        at_once: int,
    ) -> Schedule | Scheduler:
        if self.drafter is None:
            return Schedule(name or "fixed", threshold)
        num_drafts = block_size or self.drafter.block_size
        missing = self._uncalibrated(kinds, num_drafts, verifier)
        if name is None:
            name = "lagged" if missing == [] and self._usable_costs() else "fixed"
        schedule = Schedule(name, threshold)
        for sentence in (missing or []) if schedule.reads_confidences else []:
            warnings.warn(DSparkWarning(sentence), stacklevel=3)
        costs = self.costs if schedule.weighs_costs else None
        if schedule.weighs_costs and (costs is None or not costs.covers(at_once)):
            costs = self.profile(max_requests=at_once, block_size=block_size)
            for sentence in costs.warnings():
                warnings.warn(DSparkWarning(sentence), stacklevel=3)
            with contextlib.suppress(DataError):  # a cache that cannot be written is no obstacle
                costs.save()
        return Scheduler(schedule, verifier, num_drafts, self.calibration, costs)

    def _uncalibrated(
        self, kinds: Set[TemperatureClass], num_drafts: int, verifier: Verifier
    ) -> list[str] | None:
        """What the calibration lacks for such requests, a sentence each; None without one."""
        if self.calibration is None:
            return None
        found = []
        for kind in sorted(kinds):
            try:
                self.calibration.entry(num_drafts, verifier, kind)
            except CompatibilityError as error:
                found.append(str(error))
        return found

    def encode(
        self, prompt: str | Messages, *, raw: bool = True, thinking: bool | None = None
    ) -> tuple[int, ...]:
        """Token ids of a prompt.

        Args:
            prompt: text, or chat messages, which always go through the chat template.
            raw: take text as it is; else as a user turn of the chat template, where there is one.
            thinking: switch the chat template's thinking mode (`enable_thinking`) on or off; None
                leaves it as the template has it.

        Raises:
            RequestError: there is no tokenizer, no chat template for messages, or nothing to
                encode; or the chat template refuses the messages.
        """
        tokenizer = self.target.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.target.name} has no tokenizer; give token ids.")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("The prompt is empty; give at least one word.")
            if raw or not tokenizer.chat_template:
                return tuple(tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        if not tokenizer.chat_template:
            raise RequestError(f"{self.target.name} has no chat template; give a plain prompt.")
        _check_messages(prompt)
        try:
            encoded = tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                **({} if thinking is None else {"enable_thinking": thinking}),
            )
        except TemplateError as error:
            raise RequestError(f"The chat template refuses the messages: {error}.") from error
        return tuple(encoded["input_ids"])

    @overload
    def generate(
        self, prompt: str | None = ..., *, messages: Messages | None = ..., **options: Any
    ) -> Output: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[Output]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: Messages | None = None,
        **options: Any,
    ) -> Output | list[Output]:
        """Continue one prompt, or several.

        Args:
            prompt: raw text, or a list of texts.
            messages: chat messages, in place of `prompt`.
            **options: fields of `SamplingParams` (max_new_tokens, temperature, seed, n, ...),
                `mask` and `timeout_s` of `Request`, and `batch_size`, `verifier`, `schedule`,
                `threshold`, `block_size`. Prompt i of a list draws with seed + i.

        Returns:
            An output; a list of them for a list of prompts, or where `n` is above 1 (all answers
            to a prompt side by side).

        Raises:
            RequestError: a prompt is empty or does not fit the context; or the mask failed.
            NumericsError: the model computed NaN or infinite numbers.
            UsageError: an option is unknown or has a value that cannot be used.
        """
        params, limits, engine_options = split_options(options)
        if isinstance(prompt, str) or prompt is None:
            one = _one_prompt(prompt, messages)
            request = Request(self.encode(one), params, **limits)
            text = one if isinstance(one, str) else one[-1]["content"]
            outputs = self.engine([request], **engine_options).run([request], [text])
            return outputs[0] if params.n == 1 else outputs
        if messages is not None:
            raise RequestError("Give either prompts or messages.")
        requests = [
            Request(self.encode(p), params.with_seed(params.seed + i), **limits)
            for i, p in enumerate(prompt)
        ]
        if not requests:
            return []
        return self.engine(requests, **engine_options).run(requests, prompt)

    def stream(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> Iterator[Piece]:
        """Continue one prompt, yielding each token's text as it is decided.

        Takes what `generate` takes, for one prompt and one answer.

        Raises:
            RequestError, NumericsError, UsageError: as `generate`.
        """
        params, limits, engine_options = split_options(options)
        if params.n != 1:
            raise UsageError(f"n is {params.n}, but a stream shows one answer; use generate.")
        request = Request(self.encode(_one_prompt(prompt, messages)), params, **limits)
        yield from stream_pieces(self.engine([request], **engine_options), request)


def stream_pieces(engine: Engine, request: Request) -> Iterator[Piece]:
    """Yield the pieces of one request from an engine that has nothing else to do.

    Raises:
        RequestError, NumericsError: after the last piece, where an error ended the request.
    """
    engine.add(request, live=True)
    while engine.has_work:
        for event in engine.step():
            yield from event.pieces
            if event.output is not None:
                event.output.checked()


def split_options(
    options: Mapping[str, Any],
) -> tuple[SamplingParams, dict[str, Any], dict[str, Any]]:
    """Part the options of `generate` into sampling parameters, a request's own and the engine's.

    Raises:
        UsageError: an option is unknown, or has a value that cannot be used.
    """
    engine_names = (
        "batch_size",
        "verifier",
        "schedule",
        "threshold",
        "block_size",
        "step_tokens",
        "cache_tokens",
        "prefix_reuse",
    )
    engine_options = {name: options[name] for name in engine_names if name in options}
    limits = {name: options[name] for name in ("mask", "timeout_s") if name in options}
    rest = {
        name: value
        for name, value in options.items()
        if name not in engine_options and name not in limits
    }
    return SamplingParams.of(rest), limits, engine_options


def _one_prompt(prompt: str | None, messages: Messages | None) -> str | Messages:
    if prompt is not None and messages is None:
        return prompt
    if messages is not None and prompt is None:
        return messages
    raise RequestError("Give either a prompt or messages.")


def _check_messages(messages: Messages) -> None:
    if not messages:
        raise RequestError("The list of messages is empty; give at least one user message.")
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestError(
                f"A message is {dict(message)!r}, but must have a 'role' and a 'content', both "
                "text."
            )
