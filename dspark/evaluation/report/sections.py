"""Sections of a report: the content of its tables and text."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.evaluation.report.document import (
    Grid,
    Heading,
    Picture,
    Piece,
    Report,
    Text,
    gain,
    number,
    percent,
    setting,
    three,
    with_interval,
)
from dspark.evaluation.sweeps import run_labels

CAPTIONS = {
    "accepted_length": "Accepted length per task (Table 1 of the paper), with 95 % intervals.",
    "decay": "Conditional acceptance by draft position (Fig. 2): the share of drafts kept, given "
    "that all before them were. Points with fewer than 30 rounds behind them are faint.",
    "depth": "Accepted length against layers of the drafter (Fig. 3), a mean over tasks.",
    "block": "Accepted length against drafts per round (Fig. 4), a mean over tasks of a domain.",
    "threshold": "Confidence threshold (Fig. 5): how much is accepted of what the target verifies, "
    "(accepted + 1) / (verified + 1), and the accepted length that is left.",
    "calibration": "Predicted survival against the share that survived (Fig. 6), at positions 1, "
    "3, 5 and 7 where the block has them; the bars count rounds.",
    "verifier": "Accepted length by verifier, a mean over tasks.",
    "temperature": "Accepted length by temperature, a mean over tasks.",
    "top-p": "Accepted length by top-p, a mean over tasks.",
}


def pieces_of(report: Report, pictures: Sequence[str]) -> list[Piece]:
    """The whole report.

    Args:
        report: of `results.report_of`.
        pictures: names of the figures that were drawn.
    """
    labels = run_labels(report["runs"])
    named = list(zip(labels, report["runs"], strict=True))
    targets = dict.fromkeys(run["settings"]["target"] for run in report["runs"])
    pieces: list[Piece] = [Heading(f"Evaluation: {', '.join(targets)}", 1)]

    def picture(*names: str) -> list[Piece]:
        return [Picture(name, CAPTIONS[name]) for name in names if name in pictures]

    pieces += [*_lengths(named), *picture("accepted_length")]
    pieces += _comparisons(report)
    pieces += [*_decay(named), *picture("decay")]
    pieces += [*_verification(named), *picture("block", "threshold", "depth")]
    pieces += picture("verifier", "temperature", "top-p")
    pieces += [*_calibration(named), *picture("calibration")]
    pieces += _speed(named)
    pieces += _prompts(named)
    pieces += _how(named)
    return pieces


def _lengths(named: Sequence[tuple[str, Report]]) -> list[Piece]:
    tasks = list(dict.fromkeys(task for _, run in named for task in run["tasks"]))
    rows = []
    for label, run in named:
        cells = [with_interval(run["tasks"].get(task)) for task in tasks]
        rows.append((label, *cells, with_interval(run["macro"])))
    text = (
        "Tokens that a round gains, the bonus token included, and their 95 % interval over prompts "
        "(bootstrap). Rounds that the limit on tokens leaves no room for a whole block are left "
        "out; a round that a stop token ends counts up to there (product-limit estimator). The "
        "last column is the mean over tasks."
    )
    found: list[Piece] = [
        Heading("Accepted length"),
        Text(text),
        Grid(("run", *tasks, "macro"), tuple(rows)),
    ]
    domains = list(dict.fromkeys(name for _, run in named for name in run["domains"]))
    if 1 < len(domains) < len(tasks):
        rows = [
            (
                label,
                *(with_interval(run["domains"].get(name)) for name in domains),
                number(run["macro"]["accepted_length_domains"]),
            )
            for label, run in named
        ]
        found += [
            Text("By domain, a mean over its tasks; the last column is the mean over domains."),
            Grid(("run", *domains, "macro"), tuple(rows)),
        ]
    return found


def _comparisons(report: Report) -> list[Piece]:
    pairs = [pair for pair in report["comparisons"] if pair["macro"] is not None]
    if not pairs:
        return []
    tasks = list(dict.fromkeys(task for pair in pairs for task in pair["tasks"]))
    varying = [
        name
        for name in ("temperature", "verifier", "top_p", "threshold", "block_size")
        if len({pair["setting"][name] for pair in pairs}) > 1
    ]
    rows = []
    for pair in pairs:
        said = "".join(
            f", {name.replace('_', ' ')} {pair['setting'][name]}"
            for name in varying
            if pair["setting"][name] is not None
        )
        cells = [gain(pair["tasks"].get(task)) for task in tasks]
        same = pair["same_answers"]
        rows.append(
            (f"{pair['a']} over {pair['b']}{said}", *cells, gain(pair["macro"]), percent(same))
        )
    text = (
        "How much longer the accepted length of one drafter is than another's on the prompts that "
        "both answered, with the 95 % interval of a paired bootstrap: the same resample of prompts "
        "for both. The last column is the share of prompts whose answers are the same, token for "
        "token: at temperature 0, or with the verifier coupled, all of them should be, but for "
        "ties that rounding decides."
    )
    return [
        Heading("Drafters compared"),
        Text(text),
        Grid(("pair", *tasks, "macro", "same answers"), tuple(rows)),
    ]


def _decay(named: Sequence[tuple[str, Report]]) -> list[Piece]:
    depth = max((run["drafter"]["block_size"] for _, run in named), default=0)
    if not depth:
        return []
    rows = []
    for label, run in named:
        for name, domain in run["domains"].items():
            pairs = zip(domain["conditional_acceptance"], domain["conditional_counts"], strict=True)
            cells = [f"{number(kept)} ({count})" for kept, count in pairs]
            rows.append((f"{label}, {name}", *cells, *[""] * (depth - len(cells))))
    survival = [
        (f"{label}, {name}", *cells, *[""] * (depth - len(cells)))
        for label, run in named
        for name, domain in run["domains"].items()
        if domain["prefix_survival"] is not None
        for cells in [[number(kept) for kept in domain["prefix_survival"]]]
    ]
    head = ("run, domain", *(str(k) for k in range(1, depth + 1)))
    return [
        Heading("Acceptance by draft position"),
        Text(
            "Conditional acceptance: the share of drafts kept, given that all before them were; "
            "in brackets the rounds behind it."
        ),
        Grid(head, tuple(rows)),
        Text("Prefix survival: the share of rounds that keep at least so many drafts."),
        Grid(head, tuple(survival)),
    ]


def _by_task(named: Sequence[tuple[str, Report]]) -> list[tuple[str, Report]]:
    """Every task's figures, labelled with run and task."""
    return [
        (f"{label}, {name}", task) for label, run in named for name, task in run["tasks"].items()
    ]


def _verification(named: Sequence[tuple[str, Report]]) -> list[Piece]:
    rows = [
        (
            where,
            str(row["rounds"]),
            str(row["whole_rounds"]),
            str(row["cut_rounds"]),
            number(row["verified_per_round"]),
            number(row["wasted_per_round"]),
            percent(row["acceptance"]),
            number(row["tokens_per_round"]),
        )
        for where, row in _by_task(named)
    ]
    text = (
        "Drafts sent to the target per round with room for a whole block, those of them that were "
        "rejected, and acceptance as in Fig. 5 of the paper, (accepted + 1) / (verified + 1). "
        "Tokens per round is the plain ratio, cut rounds included, as a server observes it."
    )
    head = (
        "run, task", "rounds", "whole", "cut", "verified", "wasted", "acceptance",
        "tokens per round",
    )  # fmt: skip
    return [Heading("Rounds and verified drafts"), Text(text), Grid(head, tuple(rows))]


def _calibration(named: Sequence[tuple[str, Report]]) -> list[Piece]:
    rows = []
    for where, task in _by_task(named):
        found = task["calibration"]
        if found is None:
            continue
        before, after = found["mean_before"], found["mean_after"] or {}
        rows.append(
            (
                where,
                str(found["rounds"]),
                *(percent(each.get("ece")) for each in (before, after)),
                *(three(each.get(n)) for n in ("auc", "brier") for each in (before, after)),
                found["after_by"] or "too few rounds",
            )
        )
    if not rows:
        return []
    text = (
        "Predicted survival of a draft (the product of confidences up to it) against its outcome: "
        "expected calibration error (20 bins), area under the ROC curve and Brier score, "
        "means over positions weighted by their rounds, before and after calibration. Stored: by "
        "the drafter's own calibration. Cross-fitted: it has none for this setting, so each half "
        "of the prompts is judged by the temperatures that were fitted on the other."
    )
    head = (
        "run, task", "rounds", "ECE before", "after", "AUC before", "after", "Brier before",
        "after", "calibration",
    )  # fmt: skip
    return [Heading("Calibration"), Text(text), Grid(head, tuple(rows))]


def _speed(named: Sequence[tuple[str, Report]]) -> list[Piece]:
    keys = (
        "tokens_per_s", "draft_ms", "schedule_ms", "verify_ms", "requests_per_step",
        "latency_ms_per_token",
    )  # fmt: skip
    rows = [
        (where, *(number(task["timings"][key]) for key in keys)) for where, task in _by_task(named)
    ]
    text = (
        "Tokens per second of all requests together, prompts read included; and per step that "
        "reads no prompt the terms of a token's latency L = (T_draft + T_schedule + T_verify) / "
        "accepted length, at so many requests a step. These alone differ between two runs of one "
        "seed."
    )
    head = (
        "run, task", "tokens/s", "draft ms", "schedule ms", "verify ms", "requests", "L, ms",
    )  # fmt: skip
    return [Heading("Speed"), Text(text), Grid(head, tuple(rows))]


def _prompts(named: Sequence[tuple[str, Report]]) -> list[Piece]:
    rows = [
        (
            f"{label}, {name}",
            run["sources"][name]["source"],
            str(run["sources"][name]["available"]),
            str(row["planned"]),
            str(row["prompts"]),
            str(row["skipped"]),
            str(row["generated_tokens"]),
        )
        for label, run in named
        for name, row in run["tasks"].items()
    ]
    head = ("run, task", "source", "available", "chosen", "answered", "skipped", "tokens")
    pieces: list[Piece] = [Heading("Prompts"), Grid(head, tuple(rows))]
    skipped = dict.fromkeys(
        (each["task"], each["key"], each["why"]) for _, run in named for each in run["skipped"]
    )
    if skipped:
        pieces += [
            Text("Skipped, because they exceed the context:"),
            Grid(("task", "prompt", "why"), tuple(skipped)),
        ]
    unfinished = [f"{label} ({run['unfinished']})" for label, run in named if run["unfinished"]]
    if unfinished:
        pieces.append(
            Text(
                f"Unfinished, with the number of remaining prompts: {', '.join(unfinished)}. The "
                "same command resumes the evaluation."
            )
        )
    return pieces


def _how(named: Sequence[tuple[str, Report]]) -> list[Piece]:
    pieces: list[Piece] = [Heading("How it was run")]
    commands = dict.fromkeys(c for _, run in named for c in run["timings"]["commands"] if c)
    if commands:
        pieces.append(Text("\n".join(commands), fixed=True))
    labels = [label for label, _ in named]
    columns = [_settings(run) for _, run in named]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "-") for column in columns)) for name in names]
    same = tuple(row[:2] for row in rows if len(set(row[1:])) == 1)
    pieces.append(Grid(("setting", "of all runs" if len(named) > 1 else labels[0]), same))
    if len(same) < len(rows):
        other = tuple(row for row in rows if len(set(row[1:])) > 1)
        pieces.append(Grid(("setting", *labels), other))
    return pieces


def _settings(run: Report) -> dict[str, str]:
    """Everything that was set, and where it ran."""
    values = {name: value for name, value in run["settings"].items() if name != "drafter"}
    values |= {name: run["drafter"][name] for name in ("layers", "parameters")}
    values |= run["timings"]["environment"]
    return {name.replace("_", " "): setting(value) for name, value in values.items()}
