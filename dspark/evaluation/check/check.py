"""Pair check: does a drafter fit its target, and is it worth using on this machine?

A mismatched pair fails silently: drafts are merely rejected. Faults that inspection cannot see are
found by decoding a few prompts, once as configured and once with each common mistake undone; the
change that restores acceptance identifies the fault.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

from dspark.data.conversations import Prompt
from dspark.drafters.base import Drafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine.model import Model
from dspark.errors import NumericsError
from dspark.evaluation.check.findings import (
    FEWEST_TOKENS,
    CheckReport,
    Finding,
    LiveRun,
    Trial,
    by_severity,
)
from dspark.evaluation.check.inspection import inspect
from dspark.evaluation.check.live import (
    ObservedDrafter,
    TokenIds,
    accepted,
    other_renderings,
    race,
    render,
)
from dspark.request import Request, SamplingParams, Stats

COLLAPSED = 1.3
"""Tokens per round below which a drafter counts as broken."""
BETTER_TOKENS, BETTER_RATIO, BETTER_RATIO_OTHER_TEXT = 0.3, 1.15, 1.5
"""Least absolute and relative gain in tokens per round for an alternative to count."""
RARE = 0.05
"""Drafts accepted in a smaller share of rounds are not worth verifying."""

QUESTIONS = (
    "What is 17 + 25? Please reason step by step.",
    "What does the command `tar` do? Show me common usages.",
    "I need a taxi to the station at six o'clock, please.",
    "Write a Python function that reverses a list.",
    "Tom has 12 apples and gives a third of them away. How many are left?",
    "Can you find me a restaurant for tonight?",
)
PROMPTS = tuple(Prompt(({"role": "user", "content": text},), text) for text in QUESTIONS)


@dataclass(frozen=True)
class Variant:
    """A drafter with one common mistake undone.

    Attributes:
        drafter: the variant.
        what: the change, as the rest of a sentence that begins "with".
        remedy: how to make it permanent.
    """

    drafter: Drafter
    what: str
    remedy: str


def variants(drafter: Drafter, num_target_layers: int) -> Iterator[Variant]:
    """Alternative readings of a drafter: all layer ids shifted by one, the other slot convention.

    Variants that the target's layers or the drafter's block size rule out are skipped.
    """
    for shift in (-1, 1):
        taps = tuple(tap + shift for tap in drafter.taps)
        if taps and min(taps) >= -1 and max(taps) < num_target_layers:
            yield Variant(
                ObservedDrafter(drafter, taps),
                f"every layer id {'raised' if shift > 0 else 'lowered'} by 1",
                f"Set target_layer_ids to {list(taps)} in the drafter's config.json (where layers "
                f"are counted from 1, as speculators does: {[tap + 1 for tap in taps]}).",
            )
    if isinstance(drafter, DSparkDrafter) and drafter.config.block_size > 1:
        other = not drafter.config.sample_from_anchor
        yield Variant(
            _with_slots(drafter, sample_from_anchor=other),
            f"slot 0 of every block {'drafting' if other else 'thrown away'}",
            f"Set sample_from_anchor to {str(other).lower()} in the drafter's config.json.",
        )


def _with_slots(drafter: DSparkDrafter, *, sample_from_anchor: bool) -> DSparkDrafter:
    """The same weights under the other slot convention."""
    other = copy(drafter)
    other.config = replace(drafter.config, sample_from_anchor=sample_from_anchor)
    return other.eval()


def check(
    model: Model,
    prompts: Sequence[Prompt] = PROMPTS,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 1,
    seed: int = 0,
    limit_s: float | None = None,
    progress: Callable[[str], None] = lambda _step: None,
) -> CheckReport:
    """Inspect a pair and run it live.

    Args:
        model: a target with its drafter.
        prompts: for the live runs.
        max_new_tokens: per prompt.
        batch_size: requests at once in speed measurements.
        seed: request i uses seed + i.
        limit_s: seconds after which no further alternative is tried and no measurement repeated;
            None for no limit. What one run of the prompts takes comes on top.
        progress: told what comes next.

    Raises:
        RequestError: a prompt does not fit the context or the chat template.
    """
    if model.drafter is None:
        return CheckReport((_no_drafter(model),))
    if model.target.tokenizer is None:
        return CheckReport((_no_tokenizer(model),))
    deadline_s = math.inf if limit_s is None else time.monotonic() + limit_s
    rendered = render(model, prompts)
    findings = inspect(model, rendered)
    requests = _requests(rendered, max_new_tokens, seed)
    try:
        observed = ObservedDrafter(model.drafter, model.drafter.taps)
        progress(f"Decoding {len(requests)} prompts with the drafter")
        stats = accepted(model, observed, requests)
        trials = tuple(
            _trials(model, prompts, requests, deadline_s, progress) if model.drafter.taps else ()
        )
        runs = list[LiveRun]()
        for temperature in (0, 1):
            progress(f"Measuring the speed at temperature {temperature}, plainly and drafting")
            runs.append(
                race(
                    model,
                    requests,
                    temperature=temperature,
                    batch_size=batch_size,
                    deadline_s=deadline_s,
                )
            )
    except NumericsError as error:
        return CheckReport(by_severity([*findings, Finding.refusal(error)]))
    if model.drafter.taps:
        findings += judge_acceptance(stats, observed.belief, trials)
        findings += judge_sampling(*runs)
    if CheckReport(tuple(findings)).ok:  # otherwise only the fault matters
        findings += [*judge_tail(stats), *judge_speed(runs)]
    if time.monotonic() > deadline_s:
        findings.append(_cut(limit_s))
    return CheckReport(by_severity(findings), tuple(runs), trials)


def _cut(limit_s: float | None) -> Finding:
    return Finding(
        f"The check came to its limit of {limit_s:g} seconds, so that not all was tried or "
        "repeated.",
        "note",
        "Raise --time-limit for a thorough check.",
    )


def _no_drafter(model: Model) -> Finding:
    return Finding(
        f"{model.target.name} has no drafter, so it decodes plainly.",
        "error",
        "Name one with --draft; train one with `dspark train`; or use --draft ngram, which needs "
        "no training.",
    )


def _no_tokenizer(model: Model) -> Finding:
    return Finding(
        f"{model.target.name} has no tokenizer, so no prompt can be tried.",
        "error",
        "Fetch the tokenizer's files into the target's directory.",
    )


def _requests(rendered: Sequence[TokenIds], max_new_tokens: int, seed: int) -> list[Request]:
    return [
        Request(ids, SamplingParams(max_new_tokens, seed=seed + i))
        for i, ids in enumerate(rendered)
    ]


def _trials(
    model: Model,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    deadline_s: float,
    progress: Callable[[str], None],
) -> Iterator[Trial]:
    """Try every variant of the drafter, and every other rendering, while there is time."""
    assert model.drafter is not None
    for variant in variants(model.drafter, model.target.num_layers):
        if time.monotonic() > deadline_s:
            return
        progress(f"Trying {variant.what}")
        try:
            stats = accepted(model, variant.drafter, requests)
        except NumericsError:  # a wrong variant may overflow
            continue
        yield Trial(variant.what, variant.remedy, stats.tokens, stats.accepted_length)
    params = requests[0].params
    for name, rendered in other_renderings(model, prompts).items():
        if time.monotonic() > deadline_s:
            return
        progress(f"Trying {name}")
        others = _requests(rendered, params.max_new_tokens, params.seed)
        stats = accepted(model, model.drafter, others)
        remedy = (
            f"The drafter seems trained with {name}: train it with the chat template as it is "
            "served (dspark data regenerate), or serve it what it was trained with."
        )
        yield Trial(name, remedy, stats.tokens, stats.accepted_length, other_text=True)


def judge_acceptance(
    stats: Stats, belief: float | None, trials: Sequence[Trial]
) -> Iterator[Finding]:
    """Findings from the accepted length at temperature 0, with the likeliest cause.

    Args:
        stats: counts of the live run of the pair as configured.
        belief: expected acceptance of first drafts by the drafter's own distribution.
        trials: alternatives tried on the same prompts.
    """
    length = stats.accepted_length
    if stats.tokens < FEWEST_TOKENS:
        yield Finding(
            f"The live run gained only {stats.tokens} tokens, too few to judge acceptance.",
            "warning",
            "Give prompts with longer answers (--prompts), or raise --max-new-tokens.",
        )
        return
    gained = f"At temperature 0 a round gains {length:.2f} tokens"
    if better := [trial for trial in trials if _better(trial, length)]:
        best = max(better, key=lambda trial: trial.accepted_length)
        yield Finding(
            f"{gained}, but {best.accepted_length:.2f} with {best.what}.",
            "error" if length < COLLAPSED else "warning",
            best.remedy,
        )
        return
    cause = "Check that the drafter was made for this very target, with its chat template and "
    cause += "thinking mode; if it was, train it longer."
    first = stats.conditional_acceptance[0] if stats.offered else None
    if length < COLLAPSED:
        tried = f"; tried in vain: {', '.join(trial.what for trial in trials)}" if trials else ""
        yield Finding(f"{gained}, hardly more than plain decoding{tried}.", "error", cause)
    elif first is not None and belief is not None and first < belief / 2:
        yield Finding(
            f"The first draft is accepted in {first:.0%} of the rounds, but the drafter's own "
            f"distribution predicts {belief:.0%}.",
            "warning",
            cause,
        )


def _better(trial: Trial, length: float) -> bool:
    ratio = BETTER_RATIO_OTHER_TEXT if trial.other_text else BETTER_RATIO
    enough = max(ratio * length, length + BETTER_TOKENS)
    return trial.tokens >= FEWEST_TOKENS and trial.accepted_length >= enough


def judge_sampling(greedy: LiveRun, sampled: LiveRun) -> Iterator[Finding]:
    """Whether the drafter works at temperature 0 only."""
    fine, short = greedy.accepted_length >= COLLAPSED, sampled.accepted_length < COLLAPSED
    if fine and short and sampled.telling:
        yield Finding(
            f"At temperature {sampled.temperature:g} a round gains only "
            f"{sampled.accepted_length:.2f} tokens.",
            "warning",
            "Train the drafter on answers sampled at that temperature (dspark data regenerate "
            "--temperature).",
        )


def judge_tail(stats: Stats) -> Iterator[Finding]:
    """Whether the last drafts of a block are worth verifying."""
    if stats.tokens < FEWEST_TOKENS:
        return
    worth = sum(kept >= RARE * stats.rounds for kept in stats.survived)
    if 0 < worth < len(stats.survived) - 1:
        yield Finding(
            f"Drafts from number {worth + 1} on are accepted in less than {RARE:.0%} of the "
            "rounds.",
            "note",
            f"Try `dspark generate --block-size {worth}`, which does not verify them.",
        )


def judge_speed(runs: Sequence[LiveRun]) -> Iterator[Finding]:
    """Whether drafting pays on this machine, at every temperature."""
    slow = [run for run in runs if run.speedup < 1 and run.telling]
    if slow:
        temperatures = " and ".join(f"{run.temperature:g}" for run in slow)
        speeds = " and ".join(f"{run.speedup:.2f}" for run in slow)
        yield Finding(
            f"The drafter is not worth it on this machine at temperature {temperatures}: its "
            f"speed is {speeds} times that of plain decoding.",
            "warning",
            "Decode without it there (--draft none), or try fewer drafts a round (--block-size).",
        )
