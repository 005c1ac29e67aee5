"""Decodes requests, timing the engine alone, and sets plain beside speculative decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dspark.attention.ragged_batch import RaggedBatch
from dspark.cli.options import picked
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.requests.sequence import Piece
from dspark.evaluation.load.closed_loop import clock_since
from dspark.request import Output, Request, Stats, merge_stats
from dspark.targets.target import Target

NEAR_TIE = 1e-5
"""Below this top-2 logit gap, float32 rounding may decide (docs: losslessness, numerics)."""
Show = Callable[[int, Sequence[Piece], Output | None], None]
"""(index of the request, its new pieces, its output once it has ended)"""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine decodes, whatever the drafter.

    Attributes:
        verifier: token, block or coupled.
        schedule: off, fixed, threshold, prefix or lagged; None takes `lagged` where the pair is
            calibrated and this machine profiled, else `auto`.
        threshold: of the schedule `threshold`.
        block_size: drafts per round; None for the drafter's own.
        tree_nodes: of draft trees at most; None for chains.
        batch_size: requests at once.
    """

    verifier: str = "block"
    schedule: str | None = None
    threshold: float | None = None
    block_size: int | None = None
    tree_nodes: int | None = None
    batch_size: int = 8

    def engine(self, model: Model, requests: Sequence[Request]) -> Engine:
        """An engine of the model for these requests."""
        return model.engine(requests, **asdict(self))

    def plain_engine(self, model: Model, requests: Sequence[Request]) -> Engine:
        """The same target without any drafter, hooks or draft context."""
        plain = Model(model.target)
        own = replace(self, schedule=None, threshold=None, block_size=None, tree_nodes=None)
        return own.engine(plain, requests)


@dataclass(frozen=True)
class Decoded:
    """A finished run over some requests.

    Attributes:
        outputs: in the order of the requests.
        seconds: from the first request's admission to the last one's end, prefill included,
            display excluded.
        moments: (seconds, pieces) of every step, all requests together.
        num_drafts: drafts per round at most.
        round_ms: mean `draft_ms`, `schedule_ms` and `verify_ms` of a round. The first step only
            reads prompts and is left out.
    """

    outputs: list[Output]
    seconds: float
    moments: list[tuple[float, list[Piece]]]
    num_drafts: int
    round_ms: dict[str, float]

    @property
    def stats(self) -> Stats:
        """The counts of all requests."""
        return merge_stats(self.outputs)

    @property
    def generated_tokens(self) -> int:
        """All generated tokens, first and end tokens included."""
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, end to end."""
        return self.generated_tokens / self.seconds


def decode(
    engine: Engine,
    requests: Sequence[Request],
    prompts: Sequence[str],
    *,
    live: bool = False,
    show: Show | None = None,
) -> Decoded:
    """Decode all requests to their end.

    Args:
        engine: has nothing else to do.
        requests: what to decode.
        prompts: their texts, for the outputs.
        live: settle text token by token.
        show: told after every step what it did for each request; its time is not counted.

    Raises:
        NumericsError, RequestError: an error ended one of the requests.
    """
    seconds, before, first = 0.0, replace(engine.clock), None
    moments: list[tuple[float, list[Piece]]] = []
    started = time.perf_counter()
    index = {
        engine.add(request, prompt=prompt, live=live): i
        for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
    }
    outputs: dict[int, Output] = {}
    while engine.has_work:
        events = engine.step()
        seconds += time.perf_counter() - started
        first = first or replace(engine.clock)
        moments.append((seconds, [piece for event in events for piece in event.pieces]))
        for event in events:
            if event.output is not None:
                outputs[index[event.request_id]] = event.output.checked()
            if show is not None:
                show(index[event.request_id], event.pieces, event.output)
        started = time.perf_counter()
    return Decoded(
        outputs=[outputs[i] for i in range(len(requests))],
        seconds=seconds,
        moments=moments,
        num_drafts=engine.num_drafts,
        round_ms=asdict(clock_since(engine.clock, first or before).per_step()),
    )


def _output_report(output: Output) -> dict[str, Any]:
    report = {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is None:
        return report
    return report | {
        "logprobs": [
            {"logprob": each.logprob, "top": [[token, value] for token, value in each.top]}
            for each in output.logprobs
        ]
    }


def run_report(runs: Sequence[Decoded]) -> dict[str, Any]:
    """The JSON keys of decoding, over one run or several together."""
    stats, seconds = Stats(), sum(run.seconds for run in runs)
    for run in runs:
        stats.add(run.stats)
    generated = sum(run.generated_tokens for run in runs)
    acceptance = stats.conditional_acceptance
    longest = max(run.num_drafts for run in runs)
    rounds = [max(run.stats.rounds, 1) for run in runs]
    means = {
        name: sum(run.round_ms[name] * n for run, n in zip(runs, rounds, strict=True)) / sum(rounds)
        for name in ("draft_ms", "schedule_ms", "verify_ms")
    }
    return {
        "outputs": [_output_report(output) for run in runs for output in run.outputs],
        **stats.counts,
        **picked(stats, "tokens", "accepted_length"),
        "generated_tokens": generated,
        "conditional_acceptance": acceptance + [None] * (longest - len(acceptance)),
        "seconds": seconds,
        "tokens_per_s": generated / seconds,
        **means,
    }


@dataclass(frozen=True)
class Difference:
    """Where an output first departs from plain decoding's.

    Attributes:
        request: index of the request.
        position: index of the first generated token that differs.
        top2_gap: gap of the target's two largest logits there.
    """

    request: int
    position: int
    top2_gap: float

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding may have decided."""
        return self.top2_gap < NEAR_TIE

    def sentence(self, dtype: torch.dtype, *, batch_invariant: bool = False) -> str:
        """What a user should know about it; in batch-invariant mode rounding is no excuse."""
        where = f"Output {self.request + 1} differs from token {self.position + 1} on, where the "
        gap = f"target's two best logits are {self.top2_gap:.1e} apart: "
        if batch_invariant:
            return where + gap + "not to be in batch-invariant mode; please report this."
        if self.is_near_tie:
            return where + gap + "a tie that rounding decides."
        if dtype in (torch.bfloat16, torch.float16):
            return where + gap + f"rounding of {str(dtype).removeprefix('torch.')}."
        return where + gap + "no tie; please report this."


def comparable(temperature: float, verifier: str) -> bool:
    """Whether both ways must give the same tokens, and not only the same distribution."""
    return temperature == 0 or verifier == "coupled"


def compare_report(
    runs: Sequence[Decoded], plain: Sequence[Decoded], *, comparable: bool
) -> dict[str, Any]:
    """The JSON keys of speculative runs, with those that set them beside plain ones."""
    report = run_report(runs)
    plain_tokens = sum(run.generated_tokens for run in plain)
    report["plain_tokens_per_s"] = plain_tokens / sum(run.seconds for run in plain)
    report["speedup"] = report["tokens_per_s"] / report["plain_tokens_per_s"]
    same = all(
        ours.token_ids == theirs.token_ids
        for run, other in zip(runs, plain, strict=True)
        for ours, theirs in zip(run.outputs, other.outputs, strict=True)
    )
    report["identical"] = same if comparable else None
    return report


def differences(
    target: Target, requests: Sequence[Request], outputs: Sequence[Output], plain: Sequence[Output]
) -> list[Difference]:
    """Find where greedy outputs depart from plain ones."""
    found = []
    for i, (request, ours, theirs) in enumerate(zip(requests, outputs, plain, strict=True)):
        if ours.token_ids == theirs.token_ids:
            continue
        pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=False))
        shorter = min(len(ours.token_ids), len(theirs.token_ids))
        position = next((at for at, (a, b) in pairs if a != b), shorter)
        context = [*request.prompt_ids, *theirs.token_ids[:position]]
        found.append(Difference(i, position, _top2_gap(target, context)))
    return found


@torch.inference_mode()
def _top2_gap(target: Target, token_ids: Sequence[int]) -> float:
    batch = RaggedBatch.fresh([token_ids], target.device)
    last = torch.tensor([len(token_ids) - 1], device=target.device)
    logits_NV = target.forward(batch, logit_rows=last).logits_NV
    assert logits_NV is not None
    best, second = logits_NV[0].topk(2).values.tolist()
    return float(best - second)
