"""Evaluation of a fit: races against plain decoding, figures by domain, limits, commands.

A race decodes held-out prompts one request at a time, end to end, plainly and as served: by two
engines that live as long as the race, as a server's does. The two runs of a prompt follow each
other directly and alternate in order, so that a slow moment of the machine affects both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark.data.conversations import Prompt
from dspark.data.files.atomic import Journal
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.speculation.schedule import ScheduleName
from dspark.errors import RequestError
from dspark.evaluation.check.live import render
from dspark.evaluation.metrics import RESAMPLES, interval
from dspark.fitting.recipe import Shape
from dspark.params import SamplingParams
from dspark.request import Request
from dspark.scheduling.cost_table import CostTable

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Lap:
    """A prompt decoded both ways at one temperature.

    Attributes:
        prompt: its place among the held-out prompts.
        domain: what it is about.
        temperature: of both runs.
        plain_tokens, plain_s: generated plainly, and the seconds that it took.
        tokens, seconds: the same with the drafter.
    """

    prompt: int
    domain: str
    temperature: float
    plain_tokens: int
    plain_s: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class HeldOutPrompt:
    """A held-out prompt with its domain."""

    prompt: Prompt
    domain: str


def race(
    model: Model,
    prompts: Sequence[HeldOutPrompt],
    journal_path: Path,
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    least: int,
    is_over: Callable[[], bool],
    progress: Callable[[int, int], None],
    schedule: ScheduleName | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Lap]:
    """Decode prompts both ways until the time is over, but at least `least` of them.

    A journal holds the laps, so that an interrupted race resumes. Prompts are not shared between
    temperatures, which would spare the second one its reading.

    Args:
        model: the pair.
        prompts: at least one; a lap names its prompt by the place in this list.
        journal_path: of the laps.
        temperatures: of each prompt's laps.
        max_new_tokens: of an answer.
        least: prompts that are decoded in any case.
        is_over: whether the time is over.
        progress: called with prompts done, and all of them.
        schedule: of the pair; None as `Model.open_engine`.
        settings: what else a resumed race must have in common with this one.

    Raises:
        DataError: the journal cannot be written.
        RequestError, NumericsError: decoding failed.
    """
    own = {"max_new_tokens": max_new_tokens, "drafter": model.name, **(settings or {})}
    with Journal(journal_path, own) as journal:
        laps = [Lap(**entry) for _, entry in journal.entries()]
        done = {(lap.prompt, lap.temperature) for lap in laps}
        encoded = render(model, [held.prompt for held in prompts])
        longest = max(map(len, encoded)) + max_new_tokens
        engines = [
            each.open_engine(
                max_requests=1, max_length=longest, schedule=chosen, prefix_reuse=False
            )
            for each, chosen in ((Model(model.target), None), (model, schedule))
        ]
        for engine in engines:
            engine.run([Request(tuple(encoded[0]), SamplingParams(WARM_UP_TOKENS))])
        for number, (held, ids) in enumerate(zip(prompts, encoded, strict=True)):
            if number >= least and is_over():
                break
            for temperature in temperatures:
                if (number, temperature) in done:
                    continue
                params = SamplingParams(max_new_tokens, temperature=temperature, seed=number)
                lap = _lap(engines, Request(ids, params), number, held.domain)
                journal.append(asdict(lap))
                laps.append(lap)
            progress(number + 1, len(prompts))
    return laps


def _lap(engines: Sequence[Engine], request: Request, number: int, domain: str) -> Lap:
    """A prompt decoded by the plain engine and by the pair's."""
    found: dict[Engine, tuple[int, float]] = {}
    for engine in engines if number % 2 == 0 else engines[::-1]:
        started = time.perf_counter()
        (output,) = engine.run([request])
        found[engine] = len(output.token_ids), time.perf_counter() - started
    (plain_tokens, plain_s), (tokens, seconds) = (found[engine] for engine in engines)
    temperature = request.params.temperature
    return Lap(number, domain, temperature, plain_tokens, plain_s, tokens, seconds)


def fits(model: Model, prompt: Prompt, max_new_tokens: int) -> bool:
    """Whether a prompt leaves room for an answer in the context."""
    try:
        (ids,) = render(model, [prompt])
    except RequestError:  # the template refuses it, or a dialogue lacks one
        return False
    return len(ids) + max_new_tokens <= model.target.max_context


def speedup(laps: Sequence[Lap], *, seed: int = 0) -> Mapping[str, Any]:
    """Speed-up over plain decoding, and its 95 % interval.

    The ratio of tokens per second, all laps together; the interval is a bootstrap over prompts,
    None for a single one.
    """
    if not laps:
        return {"speedup": None, "ci95": None, "prompts": 0}
    rows = np.array([(x.tokens, x.seconds, x.plain_tokens, x.plain_s) for x in laps])
    weights = np.random.default_rng(seed).multinomial(
        len(laps), np.full(len(laps), 1 / len(laps)), RESAMPLES
    )
    drawn = weights @ rows
    return {
        "speedup": float(_ratio(rows.sum(axis=0))),
        "ci95": interval(_ratio(drawn)) if len(laps) > 1 else None,
        "prompts": len(laps),
    }


def _ratio(sums: Any) -> Any:
    return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])


TEMPERATURES = (0.0, 1.0)
OVERALL = "all"


@dataclass(frozen=True)
class Limits:
    """Speed-ups of one request with whole blocks, as is and with one limit removed.

    Attributes:
        speedup: by the cost table and the accepted length.
        all_kept: if every draft were accepted.
        free_drafting: if drafting were free.
        free_verification: if verifying a block cost as much as decoding a token.
    """

    speedup: float
    all_kept: float
    free_drafting: float
    free_verification: float

    @classmethod
    def of(cls, costs: CostTable, accepted_length: float, drafts: int) -> Limits:
        """From step costs and the accepted length."""
        plain, draft = costs.off_ms(1), costs.draft_ms(1)
        verify = costs.verify_ms(min(drafts + 1, costs.most_tokens(1)), 1)
        return cls(
            speedup=accepted_length * plain / (verify + draft),
            all_kept=(drafts + 1) * plain / (verify + draft),
            free_drafting=accepted_length * plain / verify,
            free_verification=accepted_length * plain / (plain + draft),
        )

    @property
    def name(self) -> str:
        """The limit whose removal would gain most."""
        gains = {
            "acceptance": self.all_kept,
            "drafting cost": self.free_drafting,
            "verification cost": self.free_verification,
        }
        return max(gains, key=lambda name: gains[name])

    def sentence(self, temperature: float) -> str:
        """The limits as a sentence."""
        return (
            f"At temperature {temperature:g} the limit is {self.name}: whole blocks give "
            f"{self.speedup:.2f}x by the cost table; {self.all_kept:.2f}x if every draft were "
            f"kept, {self.free_drafting:.2f}x if drafting were free, {self.free_verification:.2f}x "
            "if verifying a block cost as little as decoding a token."
        )


def domain_rows(reports: Mapping[str, Mapping[str, Any]], laps: Sequence[Lap]) -> dict[str, Any]:
    """Accepted length and speed-up by domain and temperature, with 95 % intervals.

    Args:
        reports: of the evaluations, by "t0" and "t1".
        laps: of the races.
    """
    found: dict[str, Any] = {}
    for key, temperature in zip(("t0", "t1"), TEMPERATURES, strict=True):
        mine = [lap for lap in laps if lap.temperature == temperature]
        for name, figures in reports[key]["tasks"].items():
            raced = speedup([lap for lap in mine if lap.domain == name])
            found.setdefault(name, {})[key] = _row(figures, raced)
        found.setdefault(OVERALL, {})[key] = _row(reports[key]["macro"], speedup(mine))
    return found


def _row(figures: Mapping[str, Any], raced: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "accepted_length": figures["accepted_length"],
        "accepted_length_ci95": figures["ci95"],
        "speedup": raced["speedup"],
        "speedup_ci95": raced["ci95"],
        "raced": raced["prompts"],
    }


def calibration_error(reports: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean expected calibration error over domains and both temperatures."""
    errors = [
        task["ece"]
        for report in reports.values()
        for task in report["tasks"].values()
        if task["ece"] is not None
    ]
    return sum(errors) / len(errors) if errors else None


def serving_commands(
    target: str, folder: str, shape: Shape, *, attached: bool, reduced: bool
) -> dict[str, str]:
    """The commands that serve the drafter, by engine.

    Args:
        target: its name or directory.
        folder: where the drafter lies.
        shape: of the drafter.
        attached: whether the target finds it by itself.
        reduced: whether its vocabulary is reduced, for which SGLang's layout of DSpark's drafters
            has no place.
    """
    name = "TARGET.gguf" if not target.endswith(".gguf") else target
    convert = f"dspark convert {folder} {folder}"
    here = f"dspark serve {target}" + ("" if attached else f" --draft {folder}")
    method, drafts = shape.algorithm, shape.block_size
    vllm = (
        f'vllm serve {target} --speculative-config \'{{"method": "{method}", '
        f'"model": "{folder}/vllm", "num_speculative_tokens": {drafts}}}\''
    )
    sglang = (
        f"python -m sglang.launch_server --model-path {target} "
        f"--speculative-algorithm {method.upper()} --speculative-draft-model-path {folder}/sglang"
    )
    layout = "deepspec"
    if method == "eagle3":
        layout = "sglang"
        sglang += (
            f" --speculative-num-steps {drafts} --speculative-eagle-topk 1"
            f" --speculative-num-draft-tokens {drafts + 1}"
        )
    llama = (
        f"llama-server -m {name} -md {folder}/drafter.gguf --spec-type draft-{method} "
        f"--spec-draft-n-max {drafts}"
    )
    published = {"SGLang": f"{convert}/sglang --to {layout} --target {target} && {sglang}"}
    if reduced and layout == "deepspec":
        published = {}
    return {
        "dspark": here,
        "vLLM": f"{convert}/vllm --to speculators --target {target} && {vllm}",
        **published,
        "llama.cpp": f"{convert}/drafter.gguf --to gguf --target {target} && {llama}",
    }


def limits_of(
    costs: CostTable, reports: Mapping[str, Mapping[str, Any]], drafts: int
) -> dict[str, Any]:
    """The limits at each temperature."""
    found: dict[str, Any] = {}
    for key, temperature in zip(("t0", "t1"), TEMPERATURES, strict=True):
        length = reports[key]["macro"]["accepted_length"]
        if length is not None:
            limits = Limits.of(costs, length, drafts)
            found[key] = asdict(limits) | {
                "limit": limits.name,
                "sentence": limits.sentence(temperature),
            }
    return found
