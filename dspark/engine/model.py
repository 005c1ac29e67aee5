"""A target with its drafter, ready to generate: what `dspark.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from dspark.drafters.base import Drafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine.engine import Engine
from dspark.engine.options import split_options
from dspark.engine.profile import Progress, machine_key, measure_costs
from dspark.engine.requests.prompt import Messages, encode_prompt, one_prompt
from dspark.engine.requests.sequence import Piece
from dspark.engine.schedule_choice import choose_schedule, choose_trees
from dspark.engine.speculation.round_record import Watch
from dspark.engine.speculation.schedule import ScheduleName
from dspark.errors import RequestError, UsageError
from dspark.request import Output, Request, Verifier
from dspark.scheduling.calibration import TemperatureClass, temperature_class
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost_table import CostTable, MachineKey
from dspark.targets.target import Target


class Model:
    """A target with its drafter.

    Args:
        target: the model whose outputs are wanted.
        drafter: who proposes, bound to the target; None decodes plainly.
        name: where the drafter came from; a cost table belongs to it.
        directory: where the drafter lies, if it lies anywhere.
        calibration: of the drafter's confidences.
        costs: of this machine; by default those that `dspark profile` left in the user's cache.
        draft_top_k: draft from this many candidates of each slot, the likeliest before the Markov
            head's bias, from now on; None leaves the drafter as it is.

    Raises:
        UsageError: `draft_top_k` is below 1, or the drafter has no Markov head.
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
        draft_top_k: int | None = None,
    ) -> None:
        if draft_top_k is not None:
            _restrict(drafter, draft_top_k)
        self.target = target
        self.drafter = drafter
        self.name = name
        self.directory = directory
        self.calibration = calibration
        self._costs = costs
        self._tree_costs: dict[tuple[int, int, int | None], CostTable] = {}

    @property
    def machine(self) -> MachineKey:
        """What a cost table of this pair, here and now, belongs to."""
        restricted = self.draft_top_k
        suffix = "" if restricted is None else f" top-{restricted}"
        return machine_key(self.target, self.name + suffix)

    @property
    def draft_top_k(self) -> int | None:
        """Candidates of each slot; None for all that the drafter knows."""
        return self.drafter.draft_top_k if isinstance(self.drafter, DSparkDrafter) else None

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
        limit_s: float | None = None,
        progress: Progress | None = None,
    ) -> CostTable:
        """Measure what steps cost on this machine, and use that from now on.

        Args:
            max_requests: the most requests at once to measure.
            block_size: drafts per round, at most the drafter's own, which is the default.
            repeats: rounds per point.
            limit_s: stop repeating after so many seconds.
            progress: told (points measured, points in all).

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
            limit_s=limit_s,
            progress=progress,
        )
        return self._costs

    def profile_trees(self, most: int, nodes: int, block_size: int | None = None) -> CostTable:
        """Measure what rounds cost that draft trees; remembered by this object alone.

        Args:
            most: requests at once.
            nodes: of a tree.
            block_size: depth of a tree; None for the drafter's own.

        Raises:
            UsageError: there is no drafter, or a size is not possible.
        """
        if self.drafter is None:
            raise UsageError("Draft trees need a drafter; give one with --draft.")
        key = most, nodes, block_size
        if key not in self._tree_costs:
            machine = replace(self.machine, drafter=f"{self.machine.drafter} trees of {nodes}")
            self._tree_costs[key] = measure_costs(
                self.target,
                self.drafter,
                machine,
                max_requests=most,
                block_size=block_size,
                tree_nodes=nodes,
            )
        return self._tree_costs[key]

    def engine(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        verifier: Verifier = "block",
        schedule: ScheduleName | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        tree_nodes: int | None = None,
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
            schedule: None or `auto` takes `lagged` where the drafter is calibrated for these
                requests and this machine is profiled, else verifies every draft while that is
                faster than plain decoding. A schedule that weighs costs on a machine without a
                cost table measures one first.
            threshold: of the schedule `threshold`.
            block_size: drafts per round, at most the drafter's own, which is the default.
            tree_nodes: draft trees of so many nodes at most, `block_size` deep, in rounds where
                they are faster than chains; under `fixed` in all.
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
        chosen = choose_schedule(self, kinds, schedule, threshold, verifier, block_size, at_once)
        return Engine(
            self.target,
            self.drafter,
            max_requests=at_once,
            max_length=longest,
            verifier=verifier,
            schedule=chosen,
            block_size=block_size,
            **choose_trees(self, chosen, tree_nodes, at_once),
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
        tree_nodes: int | None = None,
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
        memory_share: float | None = None,
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
            tree_nodes: as in `engine`.
            step_tokens: rows of one step, as `Engine`.
            cache_tokens: rows of the cache, as `Engine`.
            memory_share: what the cache may take of the free memory, as `Engine`.
            prefix_reuse: whether prompts share the pages of equal beginnings.

        Raises:
            UsageError: an option has a value that cannot be used.
        """
        kinds: set[TemperatureClass] = {"greedy", "sampled"}
        chosen = choose_schedule(
            self, kinds, schedule, threshold, verifier, block_size, max_requests
        )
        return Engine(
            self.target,
            self.drafter,
            max_requests=max_requests,
            max_length=max_length,
            verifier=verifier,
            schedule=chosen,
            block_size=block_size,
            **choose_trees(self, chosen, tree_nodes, max_requests),
            step_tokens=step_tokens,
            cache_tokens=cache_tokens,
            memory_share=memory_share,
            max_queue=max_queue,
            prefix_reuse=prefix_reuse,
        )

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
        return encode_prompt(self.target, prompt, raw=raw, thinking=thinking)

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
                `threshold`, `block_size`, `tree_nodes`. Prompt i of a list draws with seed + i.

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
            one = one_prompt(prompt, messages)
            request = Request(self.encode(one), params, **limits)
            text = one if isinstance(one, str) else one[-1]["content"]
            outputs = self.engine([request], **engine_options).run([request], [text])
            return outputs[0] if params.n == 1 else outputs
        if messages is not None:
            raise RequestError("Give either prompts or messages.")
        if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
            raise RequestError(f"The prompt is {prompt!r}, but must be a text or a list of texts.")
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
        request = Request(self.encode(one_prompt(prompt, messages)), params, **limits)
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


def _restrict(drafter: Drafter | None, top_k: int) -> None:
    """Have a drafter draft from the `top_k` likeliest tokens of a slot."""
    if top_k < 1:
        raise UsageError(f"draft_top_k is {top_k}, but must be at least 1.")
    if not isinstance(drafter, DSparkDrafter) or drafter.markov_head is None:
        what = "there is no drafter" if drafter is None else "the drafter has no Markov head"
        raise UsageError(f"draft_top_k is {top_k}, but {what}; leave it out.")
    drafter.draft_top_k = top_k
