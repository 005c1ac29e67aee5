"""`/metrics`: Prometheus figures, named as in vLLM where they mean the same.

What the engine's thread counts is read when someone asks; what a request takes is noted once, at
its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from dspark.request import Output
from dspark.serving.counters import SecondsHistogram
from dspark.serving.learning.learner import Learner
from dspark.serving.live.engines import PageEngines
from dspark.serving.service import EngineService

router = APIRouter(tags=["metrics"])
_BY_MODEL = ("model_name",)
_SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0
)  # fmt: skip
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_LENGTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)


class Metrics:
    """What the server counts, in a registry of its own.

    Args:
        service: whose engine is counted.
        engines: the engines of the live page, which are counted apart.
        model_name: the label of the figures that vLLM has too.
    """

    def __init__(self, service: EngineService, engines: PageEngines, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        labels = ("model_name",)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(name, text, labels, registry=self.registry, buckets=tuple(buckets))
            return made.labels(model_name)

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.",
            _SECONDS,
        )  # fmt: skip
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a request, after the first.",
            _TOKEN_SECONDS,
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", _SECONDS
        )
        self._prompt_sizes = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._answer_sizes = histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", _TOKENS
        )
        self._lengths = histogram(
            "dspark_request_accepted_length", "Tokens per round of a request, bonus included.",
            _LENGTHS,
        )  # fmt: skip
        self._prompt_tokens, self._tokens = (
            Counter(name, text, labels, registry=self.registry).labels(model_name)
            for name, text in (
                ("vllm:prompt_tokens", "Prompt tokens of ended requests."),
                ("vllm:generation_tokens", "Generated tokens of ended requests."),
            )
        )
        self._ended = Counter(
            "vllm:request_success",
            "Requests that ended, by why.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._replies = Counter(
            "dspark_http_requests", "HTTP requests, by route and status.", ("route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_EngineFigures(service, model_name))
        self.registry.register(_PageFigures(engines))
        if service.learner is not None:
            self.registry.register(_LearningFigures(service.learner))

    def note_reply(self, route: str, status: int) -> None:
        """Count an HTTP request."""
        self._replies.labels(route, str(status)).inc()

    def note_first_token(self, seconds: float) -> None:
        """Note how long an answer's first token took."""
        self._first_token.observe(seconds)

    def note_end(
        self, output: Output, prompt_tokens: int, seconds: float, after_first_s: float | None
    ) -> None:
        """Note an ended answer.

        Args:
            output: the answer.
            prompt_tokens: of its prompt.
            seconds: from its arrival to its end.
            after_first_s: from its first token to its end; None if no token came.
        """
        self.note_reason(output.finish_reason)
        tokens = len(output.token_ids)
        self._prompt_tokens.inc(prompt_tokens)
        self._tokens.inc(tokens)
        self._whole.observe(seconds)
        self._prompt_sizes.observe(prompt_tokens)
        self._answer_sizes.observe(tokens)
        if after_first_s is not None and tokens > 1:
            self._per_token.observe(after_first_s / (tokens - 1))
        if output.stats.verified:
            self._lengths.observe(output.stats.accepted_length)

    def note_reason(self, reason: str) -> None:
        """Count an answer that ended, or that its client left."""
        self._ended.labels(self._model, reason).inc()


class _EngineFigures(Collector):
    """What the engine's thread keeps, read when it is asked for."""

    def __init__(self, service: EngineService, model_name: str) -> None:
        self._service = service
        self._model = (model_name,)

    def collect(self) -> Iterator[Metric]:
        yield from self._requests_and_cache()
        yield from self._speculation()
        yield from self._steps()

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _family(GaugeMetricFamily, name, text, _BY_MODEL, [(self._model, value)])

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return _family(CounterMetricFamily, name, text, _BY_MODEL, [(self._model, value)])

    def _requests_and_cache(self) -> Iterator[Metric]:
        now = self._service.snapshot()
        yield self._gauge("vllm:num_requests_running", "Requests that run.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", now.queued)
        share = now.pages_held / now.pages_total
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of pages held, 0 to 1.", share)
        yield self._counter("vllm:num_preemptions", "Requests that gave way.", now.preemptions)
        yield self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the cache.", now.prefix_hit_tokens
        )
        free = now.pages_total - now.pages_held - now.pages_kept
        pages = [(["held"], now.pages_held), (["kept"], now.pages_kept), (["free"], free)]
        text = "Pages of the cache."
        yield _family(GaugeMetricFamily, "dspark_cache_pages", text, ("state",), pages)
        budget = now.verified if now.budget is None else now.budget
        yield self._gauge(
            "dspark_schedule_budget_tokens",
            "Drafts that the last round might verify; those it did where no budget was set.",
            budget,
        )

    def _speculation(self) -> Iterator[Metric]:
        counters = self._service.counters
        verified, accepted = int(counters.verified_K.sum()), int(counters.accepted_K.sum())
        yield self._counter("vllm:spec_decode_num_drafts", "Verified blocks.", counters.rounds)
        yield self._counter(
            "vllm:spec_decode_num_draft_tokens", "Drafts sent to the target.", verified
        )
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafts that stayed.", accepted)
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        stayed = [((*self._model, str(k)), int(n)) for k, n in enumerate(counters.accepted_K)]
        labels = (*_BY_MODEL, "position")
        yield _family(CounterMetricFamily, name, "Drafts that stayed, by position.", labels, stayed)
        for name, text, counts in (
            ("dspark_drafted_tokens", "Drafts made, by position.", counters.drafted_K),
            ("dspark_verified_tokens", "Drafts verified, by position.", counters.verified_K),
        ):
            by_place = [([str(k)], int(n)) for k, n in enumerate(counts)]
            yield _family(CounterMetricFamily, name, text, ("position",), by_place)
        length = 1 + accepted / counters.rounds if counters.rounds else 0.0
        yield GaugeMetricFamily(
            "dspark_accepted_length", "Tokens per verified block, bonus included.", length
        )
        yield GaugeMetricFamily(
            "dspark_calibration_error",
            "Expected calibration error of survivals against outcomes, of late.",
            counters.drift.error,
        )
        yield CounterMetricFamily(
            "dspark_calibration_observations", "Drafts it was taken from.", counters.drift.observed
        )

    def _steps(self) -> Iterator[Metric]:
        counters = self._service.counters
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds",
            "Time between an answer's outputs; one holds all tokens of a step.",
            labels=["model_name"],
        )
        _add_times(gaps, self._model, counters.gaps)
        yield gaps
        steps = HistogramMetricFamily("dspark_step_seconds", "Time of a step of the engine.")
        _add_times(steps, [], counters.step_times)
        yield steps
        parts = [([p], getattr(counters, f"{p}_ms") / 1e3) for p in ("draft", "schedule", "verify")]
        text = "Time of rounds with a drafter, by part."
        yield _family(CounterMetricFamily, "dspark_round_part_seconds", text, ("part",), parts)


class _PageFigures(Collector):
    """The live page's engines: apart from those of the server, whose drafter may be another."""

    def __init__(self, engines: PageEngines) -> None:
        self._stages = engines

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "dspark_page_engines", "Engines of the live page.", self._stages.engines
        )
        totals = self._stages.totals()
        for name, text, value in (
            ("steps", "Steps of the live page's engines.", attrgetter("steps")),
            ("step_seconds", "Time of these steps.", attrgetter("step_s")),
            ("rounds", "Verified blocks of the live page.", attrgetter("rounds")),
            ("verified_tokens", "Drafts sent to the target.", attrgetter("verified")),
            ("accepted_tokens", "Drafts that stayed.", attrgetter("accepted")),
        ):
            labels = ("drafter", "verifier", "schedule")
            values = [(kind, value(total)) for kind, total in totals.items()]
            yield _family(CounterMetricFamily, f"dspark_page_{name}", text, labels, values)


class _LearningFigures(Collector):
    """How learning from the traffic goes."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def collect(self) -> Iterator[Metric]:
        now = self._learner.progress
        state = now.state
        for name, text, count in (
            ("samples", "Answers that were written to learn from.", now.samples),
            ("tokens", "Their tokens, prompts included.", now.tokens),
            ("dropped", "Answers that came too fast to be written.", now.dropped),
            ("swaps", "Drafters swapped in, rollbacks included.", now.swaps),
            ("trainer_failures", "Trainers that ended by themselves.", now.trainer_failures),
            ("steps", "Training steps of this directory.", state.steps),
            ("rejected", "Candidates that gained too little.", state.rejected),
            ("rollbacks", "Drafters taken back.", state.rollbacks),
            ("calibrations", "Calibrations put to use.", state.calibrations),
        ):
            yield CounterMetricFamily(f"dspark_learning_{name}", text, count)
        for name, text, value in (
            ("bytes", "Samples on disk.", now.bytes),
            ("trainer_up", "Whether the trainer runs.", int(self._learner.trainer_pid is not None)),
            ("drafter", "Number of the drafter that is to serve.", state.generation),
            ("held_out_accepted_length", "Of that drafter, by the laws.", state.held_out_length),
            ("held_out_accepted_length_before", "Of the one before.", state.held_out_before),
        ):
            yield GaugeMetricFamily(f"dspark_learning_{name}", text, value)


def _family(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    labels: Sequence[str],
    values: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    """A metric with its values by their labels."""
    family = kind(name, text, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def _add_times(
    family: HistogramMetricFamily, labels: Sequence[str], times: SecondsHistogram
) -> None:
    """Add a histogram, whose buckets Prometheus wants summed up."""
    bounds = [*map(str, times.bounds_s), "+Inf"]
    sums = itertools.accumulate(list(times.counts))
    family.add_metric(labels, list(zip(bounds, sums, strict=True)), times.total_s)


async def _metrics_of(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.context.metrics
    return metrics


@router.get("/metrics", response_class=Response)
async def metrics(found: Annotated[Metrics, Depends(_metrics_of)]) -> Response:
    """All figures in Prometheus' text format."""
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)
