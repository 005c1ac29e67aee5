"""Prompt collection: read, deduplicated, decontaminated and split into training and held-out files.

Every input line is accounted for: kept, duplicate, contaminated or malformed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dspark.data.conversations import ParsedRecord, read_record
from dspark.data.files.json_lines import Row, beside, write_json_lines, write_list
from dspark.data.prompts.dedup import EvaluationTexts, digest, near_text
from dspark.errors import DataError

SHOWN_CHARACTERS = 500
_LARGEST = 1 << 64


@dataclass(frozen=True)
class Split:
    """The split into training and held-out prompts.

    A hash of the prompt's text and the seed decides, so the split is stable when sources change,
    and near duplicates fall on the same side.

    Attributes:
        path: file of held-out prompts.
        share: of the prompts, from 0 to 1.
        seed: of the split.
    """

    path: Path
    share: float = 0.05
    seed: int = 0

    def holds_out(self, found: ParsedRecord) -> bool:
        """Whether a prompt is held out, by its first user turn."""
        place = digest((str(self.seed), near_text(found.user_turns[0])))
        return place < self.share * _LARGEST


@dataclass
class CollectReport:
    """Outcome of every input line.

    Attributes:
        input: lines read.
        records: prompts kept for training.
        heldout: prompts held out.
        duplicates: exact duplicates.
        near_duplicates: duplicates after `near_text` only.
        contaminated: prompts that match an evaluation set.
        malformed: lines without a prompt.
        dropped_turns: turns dropped from conversations, by role.
        bytes: size of the prompt files.
    """

    input: int = 0
    records: int = 0
    heldout: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0
    malformed: int = 0
    dropped_turns: Counter[str] = field(default_factory=Counter)
    bytes: int = 0


def collect_prompts(
    rows: Iterable[Row],
    out: Path,
    *,
    split: Split | None = None,
    against: EvaluationTexts | None = None,
    strict: bool = False,
    progress: Callable[[CollectReport], None] | None = None,
) -> CollectReport:
    """Write the prompts of sources as JSON lines that `dspark data regenerate` reads.

    The side files `*_contaminated.jsonl` and `*_malformed.jsonl` list what was left out and why.
    All files are replaced atomically at the end.

    Args:
        rows: the records of the sources.
        out: file of training prompts; `.gz` compresses.
        split: which prompts are held out; none by default.
        against: evaluation sets that prompts must not match.
        strict: raise at the first malformed line.
        progress: called after every line.

    Raises:
        DataError: no prompt remains; a line is malformed and `strict`; or a file cannot be written.
    """
    report = CollectReport()
    contaminated: list[dict[str, str]] = []
    malformed: list[dict[str, str]] = []
    exact, near = set[int](), set[int]()
    with contextlib.ExitStack() as files:
        write = files.enter_context(write_json_lines(out))
        write_heldout = files.enter_context(write_json_lines(split.path)) if split else None
        for row in rows:
            report.input += 1
            try:
                found = read_record(row.whole(), row.where)
            except DataError as error:
                if strict:
                    raise
                report.malformed += 1
                malformed.append({"where": row.where, "error": str(error)})
                continue
            report.dropped_turns += found.dropped
            if _is_duplicate(found, exact, near, report):
                continue
            matches = map(against.match, found.asked) if against else ()
            match = next(filter(None, matches), None)
            if match is not None:
                report.contaminated += 1
                shown = "\n".join(found.user_turns)[:SHOWN_CHARACTERS]
                contaminated.append({"where": row.where, "prompt": shown, **asdict(match)})
            elif split and write_heldout is not None and split.holds_out(found):
                report.heldout += 1
                write_heldout(heldout_record(found))
            else:
                report.records += 1
                write(train_record(found))
            if progress:
                progress(report)
        _check_any(report)
    write_list(beside(out, "contaminated"), contaminated)
    write_list(beside(out, "malformed"), malformed)
    report.bytes = sum(path.stat().st_size for path in ([out, split.path] if split else [out]))
    return report


def _is_duplicate(
    found: ParsedRecord, exact: set[int], near: set[int], report: CollectReport
) -> bool:
    """Whether the prompt was seen before; counts a duplicate or records the prompt."""
    asked = found.asked
    whole = digest(asked)
    loose = digest(map(near_text, asked))
    if whole in exact:
        report.duplicates += 1
        return True
    if loose in near:
        report.near_duplicates += 1
        return True
    exact.add(whole)
    near.add(loose)
    return False


def _check_any(report: CollectReport) -> None:
    if not report.records + report.heldout:
        raise DataError(
            f"No prompt is left of {report.input} lines: {report.malformed} are malformed, "
            f"{report.contaminated} match an evaluation set; check the sources and --against."
        )


def train_record(found: ParsedRecord) -> dict[str, Any]:
    """A prompt's record in a training file: `turns` if there are only user turns, or `messages`."""
    name = {"id": f"{digest(found.asked):016x}"}
    if found.dialogue is None:
        return {**name, "prompt": found.raw}
    messages = found.dialogue.messages
    if all(m["role"] == "user" or m == {"role": "assistant", "content": ""} for m in messages):
        return {**name, "turns": found.user_turns}
    tools = {"tools": list(found.dialogue.tools)} if found.dialogue.tools else {}
    return {**name, "messages": list(messages), **tools}


def heldout_record(found: ParsedRecord) -> dict[str, Any]:
    """A prompt's record in a held-out file: without answers."""
    name = {"id": f"{digest(found.asked):016x}"}
    if found.dialogue is None:
        return {**name, "prompt": found.raw}
    messages, tools = found.dialogue.messages, found.dialogue.tools
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    if first or tools:
        named = {"tools": list(tools)} if tools else {}
        return {**name, "messages": list(messages[: first + 1]), **named}
    return {**name, "turns": found.user_turns}
