"""Answer regeneration: the target answers the prompts that its drafter will be trained on.

Every assistant turn of a conversation is regenerated in order, each after the regenerated turns
before it. A `Responder` answers: our engine (`engine_backend.py`) or servers (`server_backend.py`).
A journal beside the output records what has been done, so that an interrupted run resumes without
losing a line or answering one twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from dspark.data.answers.replay import Replay
from dspark.data.files.atomic import Journal
from dspark.data.files.json_lines import (
    Row,
    beside,
    read_json_lines,
    scan_json_lines,
    write_json_lines,
    write_list,
)
from dspark.errors import DataError

Done = Callable[[Replay], None]
Progress = Callable[[int, int], None]
"""(lines done, lines in all)"""
SHOWN_CHARACTERS = 200


class Responder(Protocol):
    """A backend that answers: the engine or servers."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that determine its answers, as JSON values."""
        ...

    @property
    def template_options(self) -> Mapping[str, Any]:
        """Chat-template variables that it answers with."""
        ...

    def answer(self, replays: Iterator[Replay], done: Done) -> None:
        """Answer every assistant turn of every replay.

        Args:
            replays: read lazily.
            done: called in the calling thread with each finished replay, in any order.

        Raises:
            DataError: the backend no longer answers.
        """
        ...


@dataclass(frozen=True)
class RegenerateReport:
    """Outcome of every input line: records + failed + skipped = input.

    Attributes:
        input: lines read.
        records: lines with regenerated answers.
        failed: lines without an answer, listed with the reason in `*_failed.jsonl`.
        skipped: lines whose answers the filters rejected.
        resumed: lines done by an earlier run.
        tokens: generated tokens of the records, as far as known.
        bytes: size of the output.
        failures: the list of failures; None if there are none.
    """

    input: int
    records: int
    failed: int
    skipped: int
    resumed: int
    tokens: int
    bytes: int
    failures: Path | None


def journal_path(out: Path) -> Path:
    """Path of a run's journal."""
    return out.with_name(out.name + ".journal")


def regenerate(
    responder: Responder,
    prompts_path: str | Path,
    out_path: str | Path,
    *,
    limit: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> RegenerateReport:
    """Answer every prompt of a file with the target and write the conversations.

    For a line with `messages`, all assistant turns are regenerated (one answer if it has none); a
    line with `turns` gets one answer per turn, a line with `prompt` a raw continuation. Chat lines
    are written as {"messages", "finish_reason"}, with `tools` and `chat_template_kwargs` if there
    are any, raw ones as {"input_ids", "prompt_len", "finish_reason"}, in the order of the input.
    The output is replaced at the end; until then the journal holds the results.

    Args:
        responder: the backend.
        prompts_path: JSON lines.
        out_path: where to write; `.gz` compresses.
        limit: read at most this many lines.
        strict: raise at the first malformed line.
        progress: called after every line.

    Raises:
        DataError: the input is missing or empty, or changed since the interrupted run; no line
            yielded a record; the backend fails; or a file cannot be written.
    """
    out, prompts = Path(out_path), Path(prompts_path)
    numbers = [line.number for line in islice(scan_json_lines(prompts), limit)]
    if not numbers:
        raise DataError(f"{prompts} holds no prompt.")
    with Journal(journal_path(out), responder.settings) as journal:
        noted = _noted(journal, numbers[-1])
        note = _note(journal, len(noted), len(numbers), progress)
        lines = islice(scan_json_lines(prompts), limit)
        responder.answer(_open_replays(lines, responder, noted, strict), note)
        report = _assemble(journal, out, numbers, len(noted))
        journal.remove()
    if not report.records:
        raise _nothing(prompts, report)
    return report


def _noted(journal: Journal, last: int) -> dict[int, int]:
    """Checksums of the finished lines up to `last`, by number."""
    entries = (entry for _, entry in journal.entries())
    return {e["line"]: e["checksum"] for e in entries if not e["again"] and e["line"] <= last}


def _note(journal: Journal, done: int, total: int, progress: Progress | None) -> Done:
    def note(replay: Replay) -> None:
        nonlocal done
        done += 1
        names = ("line", "checksum", "status", "again", "tokens")
        entry = {name: getattr(replay, name) for name in names}
        journal.append(entry | {"result": replay.result()})
        if progress:
            progress(done, total)

    return note


def _open_replays(
    lines: Iterator[Row],
    responder: Responder,
    noted: Mapping[int, int],
    strict: bool,
) -> Iterator[Replay]:
    """The unfinished lines; malformed ones have failed already."""
    for line in lines:
        checksum = zlib.crc32(line.raw)
        known = noted.get(line.number)
        if known is not None:
            if known != checksum:
                raise DataError(
                    f"{line.where} has changed since the run began; give the same prompts to "
                    "resume, or name another --out."
                )
            continue
        try:
            options = responder.template_options
            replay = Replay.of(line.number, checksum, line.whole(), line.where, options)
        except DataError as error:
            if strict:
                raise
            shown = line.record or {"text": line.raw[:SHOWN_CHARACTERS].decode(errors="replace")}
            replay = Replay(line.number, checksum, shown)
            replay.fail(str(error))
        yield replay


def _assemble(
    journal: Journal, out: Path, numbers: Sequence[int], resumed: int
) -> RegenerateReport:
    """Write output and failures in the order of the input."""
    latest: dict[int, tuple[int, str]] = {}  # a retried line has several entries
    for place, entry in journal.entries():
        latest[entry["line"]] = place, entry["status"]
    ended = [latest[number] for number in numbers]
    done = [place for place, status in ended if status == "done"]
    failed = [place for place, status in ended if status == "failed"]
    tokens = 0
    if done:
        with write_json_lines(out) as write:
            for entry in journal.read(done):
                write(entry["result"])
                tokens += entry["tokens"]
    failures = beside(out, "failed")
    write_list(failures, [entry["result"] for entry in journal.read(failed)])
    return RegenerateReport(
        input=len(numbers),
        records=len(done),
        failed=len(failed),
        skipped=len(numbers) - len(done) - len(failed),
        resumed=resumed,
        tokens=tokens,
        bytes=out.stat().st_size if done else 0,
        failures=failures if failed else None,
    )


def _nothing(prompts: Path, report: RegenerateReport) -> DataError:
    if report.failures is not None:
        first = next(record for _, record in read_json_lines(report.failures))
        return DataError(
            f"No line of {prompts} could be answered; the first fault: {first['error']} All stand "
            f"in {report.failures}."
        )
    return DataError(
        f"The filters rejected all {report.skipped} answers; allow unfinished or repeating ones, "
        "or train the model for longer."
    )
