"""What a step costs on this machine: measured points, a monotone envelope, load and save.

A step of R requests and n drafts sends R + n tokens to the target. Noise must not invent cheap
tokens, so the table is made monotone; where it was not measured it says nothing, because a table
that is extrapolated makes tokens look free. Between two probes a cost is a
straight line: a stair shows where probes stand on both sides of it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspark.errors import CompatibilityError, DataError, UsageError
from dspark.scheduling.json_files import read_json, typed_fields, write_json

VERSION = 3
FALLBACK = "measure it with dspark profile; until then the schedule is 'auto'"
_PARTS = ("points", "prompts", "extras")
FLAT_RISE, FLAT_SPAN = 1.10, 4
NOISE = 0.15
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MachineKey:
    """What a cost table belongs to; a table of any other is refused.

    Attributes:
        hardware: name of the processor or accelerator.
        threads: of the CPU.
        dtype: of the target's weights, `float32` and the like, and the mode that it runs in:
            `float32 batch-invariant`, `bfloat16 with CUDA graphs`.
        target: directory or hub id with its revision.
        drafter: the same of the drafter; empty without one.
    """

    hardware: str
    threads: int
    dtype: str
    target: str
    drafter: str

    def path(self) -> Path:
        """Where the user's cache keeps this machine's table ($XDG_CACHE_HOME or ~/.cache)."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.target).name).strip("-")[:40] or "target"
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        return cache / "dspark" / "costs" / f"{name}-{digest}.json"


@dataclass(frozen=True)
class CostPoint:
    """One measurement, of greedy requests.

    Attributes:
        tokens: rows sent to the target, anchors included.
        requests: R.
        verify_ms: milliseconds of a round without drafting: the target's forward and the rest.
        draft_ms: milliseconds of drafting a whole block for R requests.
        single_share: what drafting a single token each takes of that; 1 where depth costs nothing.
    """

    tokens: int
    requests: int
    verify_ms: float
    draft_ms: float
    single_share: float = 1.0


@dataclass(frozen=True)
class PromptCost:
    """One measurement of a step that reads a prompt and nothing else.

    Attributes:
        rows: tokens of the prompt.
        ms: milliseconds of the whole step, the first token's draw included, with a drafter, which
            takes the prompt's features.
        plain_ms: the same of an engine without one; 0 where it is unknown, which takes `ms`.
    """

    rows: int
    ms: float
    plain_ms: float = 0.0


@dataclass(frozen=True)
class StepExtra:
    """What steps of so many requests take beside drafting and verification.

    Attributes:
        requests: R.
        plain_ms: a whole step of an engine without a drafter.
        rest_ms: of a step with a drafter, all that is neither drafting nor verification:
            admission, commits, text.
        schedule_ms: what the schedule `lagged` adds to it in rounds that it decides: deciding, and
            learning from them.
        prompt_ms: what a step takes in which others than so many decoding requests read prompts,
            beyond that of these requests and what prompts alone take over a plain step of one.
        plain_prompt_ms: the same of an engine without a drafter.
    """

    requests: int
    plain_ms: float
    rest_ms: float
    schedule_ms: float
    prompt_ms: float = 0.0
    plain_prompt_ms: float = 0.0


@dataclass(frozen=True)
class CostTable:
    """Costs of steps by tokens and requests.

    Attributes:
        points: as measured, at least one.
        machine: what they were measured on.
        prompts, extras: for capacity planning, which has to add up whole steps; schedules, which
            compare them, need neither.

    Raises:
        DataError: there is no point, or one is not possible.
    """

    points: tuple[CostPoint, ...]
    machine: MachineKey
    prompts: tuple[PromptCost, ...] = ()
    extras: tuple[StepExtra, ...] = ()

    def __post_init__(self) -> None:
        if not self.points:
            raise DataError(f"The cost table is empty; {FALLBACK}.")
        whole: tuple[PromptCost | StepExtra, ...] = (*self.prompts, *self.extras)
        for each in whole:
            first, *times = asdict(each).values()
            if first < 1 or not all(0 <= ms < math.inf for ms in times):
                raise DataError(f"The cost table has an impossible entry, {each}; {FALLBACK}.")
        for point in self.points:
            costs = (point.verify_ms, point.draft_ms)
            if not (
                1 <= point.requests <= point.tokens
                and all(map(math.isfinite, costs))
                and point.verify_ms > 0
                and point.draft_ms >= 0
                and 0 <= point.single_share <= 1
            ):
                raise DataError(f"The cost table has an impossible point, {point}; {FALLBACK}.")

    def covers(self, requests: int) -> bool:
        """Whether steps of so many requests lie within what was measured."""
        return self._counts[0] <= requests <= self._counts[-1]

    def most_tokens(self, requests: int) -> int:
        """The last probe: the most tokens of a step of so many requests that the table knows.

        Raises:
            UsageError: the table does not cover so many requests.
        """
        low, high, weight = self._bracket(requests)
        ends = [self._curves[count][0][-1] for count in (low, high)]
        return max(requests, int(ends[0] + weight * (ends[1] - ends[0])))

    def verify_ms(self, tokens: int, requests: int) -> float:
        """Milliseconds of a step that sends so many tokens of so many requests to the target.

        Raises:
            UsageError: the step lies outside what was measured.
        """
        if not requests <= tokens <= self.most_tokens(requests):
            raise UsageError(
                f"A step of {tokens} tokens and {requests} requests lies outside the cost table "
                f"({requests} to {self.most_tokens(requests)} tokens); {FALLBACK}."
            )
        return float(self._verify(np.array([float(tokens)]), requests)[0])

    def draft_ms(self, requests: int, depth: float = 1.0) -> float:
        """Milliseconds of drafting for so many requests.

        Args:
            requests: R.
            depth: from 0, a single token each, to 1, the whole block.

        Raises:
            UsageError: the table does not cover so many requests.
        """
        low, high, weight = self._bracket(requests)
        whole = (1 - weight) * self._draft[low] + weight * self._draft[high]
        single = (1 - weight) * self._single[low] + weight * self._single[high]
        return whole * (single + (1 - single) * depth)

    def step_ms(self, requests: int, drafts: int, depth: float = 1.0) -> FloatArray:
        """Milliseconds of steps that verify 0, 1, ... drafts in all, drafting included.

        Args:
            requests: R.
            drafts: the most drafts of interest, usually R * K.
            depth: of drafting, as `draft_ms`.

        Returns:
            [N + 1], never falling; N is `drafts`, or less where the last probe comes before.

        Raises:
            UsageError: the table does not cover so many requests, or the drafts are negative.
        """
        if drafts < 0:
            raise UsageError(f"The number of drafts is {drafts}, but must be 0 or more.")
        return self.verify_curve(requests)[: drafts + 1] + self.draft_ms(requests, depth)

    def verify_curve(self, requests: int) -> FloatArray:
        """Milliseconds of the target's part of steps that verify 0, 1, ... drafts in all.

        Args:
            requests: R.

        Returns:
            [N + 1] up to the last probe, never falling; not to be written to.

        Raises:
            UsageError: the table does not cover so many requests.
        """
        curve = self._whole_curves.get(requests)
        if curve is None:
            tokens = np.arange(requests, self.most_tokens(requests) + 1, dtype=np.float64)
            curve = self._whole_curves[requests] = self._verify(tokens, requests)
        return curve

    def off_ms(self, requests: int) -> float:
        """Milliseconds of a step that drafts nothing.

        Raises:
            UsageError: the table does not cover so many requests.
        """
        return float(self.verify_curve(requests)[0])

    def warnings(self) -> list[str]:
        """One sentence for each thing that makes schedules from this table doubtful."""
        found = []
        by_cost = sorted(self.points, key=lambda point: point.verify_ms)
        tokens = [point.tokens for point in self.points]
        rise = by_cost[-1].verify_ms / by_cost[0].verify_ms
        if rise < FLAT_RISE and max(tokens) >= FLAT_SPAN * min(tokens):
            found.append(
                f"The cost table is flat: from {min(tokens)} to {max(tokens)} tokens the dearest "
                f"step costs {100 * (rise - 1):.0f} % more than the cheapest, so the schedule "
                "verifies nearly every draft; profile with more requests if that is not so."
            )
        moved = [
            abs(smooth / point.verify_ms - 1)
            for point, smooth in zip(self.points, self._envelope, strict=True)
        ]
        worst = int(np.argmax(moved))
        if moved[worst] > NOISE:
            point = self.points[worst]
            found.append(
                f"The cost table is noisy: the step of {point.tokens} tokens and {point.requests} "
                f"requests was measured at {point.verify_ms:.3g} ms, {100 * moved[worst]:.0f} % "
                "off what its neighbours allow; profile again on an idle machine."
            )
        return found

    def save(self, path: str | Path | None = None) -> Path:
        """Write the table, by default to its place in the user's cache; returns the path.

        Raises:
            DataError: the place cannot be written.
        """
        path = self.machine.path() if path is None else Path(path)
        record: dict[str, object] = {"machine": asdict(self.machine)}
        for name in _PARTS:
            record[name] = [asdict(each) for each in getattr(self, name)]
        write_json(path, {"version": VERSION, **record})
        return path

    @classmethod
    def load(cls, path: str | Path | None = None, machine: MachineKey | None = None) -> CostTable:
        """Read a table.

        Args:
            path: the file; None takes the machine's place in the user's cache.
            machine: refuse a table of another one; None takes any.

        Raises:
            DataError: the file is missing, damaged, empty or of another version.
            CompatibilityError: it belongs to another machine, dtype, target or drafter.
            UsageError: neither a path nor a machine is given.
        """
        if path is None:
            if machine is None:
                raise UsageError("Give the path of a cost table, or the machine it belongs to.")
            path = machine.path()
        record = read_json(path, VERSION, FALLBACK)
        try:
            theirs = MachineKey(**typed_fields(record["machine"], MachineKey))
            rows, prompts, extras = (record.get(name, []) for name in _PARTS)
            table = cls(
                tuple(CostPoint(**typed_fields(row, CostPoint)) for row in rows),
                theirs,
                tuple(PromptCost(**typed_fields(row, PromptCost)) for row in prompts),
                tuple(StepExtra(**typed_fields(row, StepExtra)) for row in extras),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a cost table ({error}); {FALLBACK}.") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if machine is not None and machine != theirs:
            differing = [
                f.name
                for f in fields(machine)
                if getattr(machine, f.name) != getattr(theirs, f.name)
            ]
            first = differing[0]
            raise CompatibilityError(
                f"{path} was measured for {first} {getattr(theirs, first)!r}, but this is "
                f"{getattr(machine, first)!r}; {FALLBACK}."
            )
        return table

    @cached_property
    def _envelope(self) -> list[float]:
        """Verify costs made monotone in tokens and requests, one per point."""
        where = [(p.tokens, p.requests) for p in self.points]
        return _monotone(where, [p.verify_ms for p in self.points])

    @cached_property
    def _curves(self) -> dict[int, tuple[FloatArray, FloatArray]]:
        """Per measured number of requests: tokens, rising, and their verify costs."""
        curves: dict[int, dict[int, float]] = {}
        for point, ms in zip(self.points, self._envelope, strict=True):
            curves.setdefault(point.requests, {})[point.tokens] = ms
        return {
            count: (
                np.array(sorted(curve), dtype=np.float64),
                np.array([curve[t] for t in sorted(curve)]),
            )
            for count, curve in curves.items()
        }

    @cached_property
    def _whole_curves(self) -> dict[int, FloatArray]:
        """Verify curves that have been asked for, by requests."""
        return {}

    @cached_property
    def _brackets(self) -> dict[int, tuple[int, int, float]]:
        """What `_bracket` has found, by requests."""
        return {}

    @cached_property
    def _counts(self) -> list[int]:
        return sorted(self._curves)

    @cached_property
    def _draft(self) -> dict[int, float]:
        """Drafting costs made monotone, per measured number of requests."""
        costs = {
            count: float(np.median([p.draft_ms for p in self.points if p.requests == count]))
            for count in self._counts
        }
        smooth = _monotone([(count, 0) for count in costs], list(costs.values()))
        return dict(zip(costs, smooth, strict=True))

    @cached_property
    def _single(self) -> dict[int, float]:
        """What a single draft takes of a block's cost, per measured number of requests."""
        return {
            count: float(np.median([p.single_share for p in self.points if p.requests == count]))
            for count in self._counts
        }

    def _bracket(self, requests: int) -> tuple[int, int, float]:
        """The measured numbers of requests on both sides, and the weight of the upper one."""
        found = self._brackets.get(requests)
        if found is not None:
            return found
        if not self.covers(requests):
            raise UsageError(
                f"The cost table was measured for {self._counts[0]} to {self._counts[-1]} "
                f"requests, but {requests} run; {FALLBACK}."
            )
        low = max(count for count in self._counts if count <= requests)
        high = min(count for count in self._counts if count >= requests)
        weight = (requests - low) / (high - low) if high > low else 0.0
        self._brackets[requests] = low, high, weight
        return low, high, weight

    def _verify(self, tokens_T: FloatArray, requests: int) -> FloatArray:
        low, high, weight = self._bracket(requests)
        low_tokens, low_ms = self._curves[low]
        if weight == 0:
            return np.interp(tokens_T, low_tokens, low_ms)
        high_tokens, high_ms = self._curves[high]
        # Each curve borrows from the other what was measured where it has no probe itself: fewer
        # requests send fewer tokens. Envelopes keep the joined curves monotone.
        more, fewer = high_tokens > low_tokens[-1], low_tokens < high_tokens[0]
        below = np.interp(
            tokens_T, np.append(low_tokens, high_tokens[more]), np.append(low_ms, high_ms[more])
        )
        above = np.interp(
            tokens_T, np.append(low_tokens[fewer], high_tokens), np.append(low_ms[fewer], high_ms)
        )
        smooth: FloatArray = (1 - weight) * below + weight * above
        return smooth


def _monotone(where: Sequence[tuple[int, int]], values: Sequence[float]) -> list[float]:
    """The mean of the upper and the lower monotone envelope.

    The upper one is the dearest of all points that are no larger, the lower one the cheapest of
    all that are no smaller; either alone would let a single outlier move all others.
    """
    at_P2, values_P = np.asarray(where), np.asarray(values, dtype=np.float64)
    below_PP = (at_P2[None, :, :] <= at_P2[:, None, :]).all(axis=-1)  # [p, q]: q is no larger
    upper = np.where(below_PP, values_P, -np.inf).max(axis=1)
    lower = np.where(below_PP.T, values_P, np.inf).min(axis=1)
    return [float(v) for v in (upper + lower) / 2]
