"""Records of an evaluation, and the file from which an interrupted one resumes.

A file belongs to one drafter at one setting. Its lines are JSON objects: the settings first; then,
at every start, the plan (environment and questions); and one record per finished prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dspark.data.files.atomic import append_line, writing
from dspark.errors import DataError
from dspark.request import Verifier

VERSION = 1
SUFFIX = ".records.jsonl"


@dataclass(frozen=True)
class Settings:
    """All that a record hangs on: runs with other settings have a file of their own.

    Attributes:
        target, target_weights: its name, and a fingerprint of its weights.
        drafter: the name in reports.
        draft, draft_weights: where it came from, and a fingerprint of its weights.
        dtype: of the target, with a word for batch-invariant mode.
        temperature, top_p, top_k, max_new_tokens, seed: as `SamplingParams`.
        verifier, schedule, threshold, block_size, batch_size: as `Model.engine`.
        thinking: the chat template's thinking mode; None leaves it as it is.
        raw: texts without the chat template.
        turns: turns of a conversation at most; None for all.
        draft_top_k: as `Model`.
    """

    target: str
    target_weights: str
    drafter: str
    draft: str
    draft_weights: str
    dtype: str
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    verifier: Verifier = "block"
    schedule: str = "fixed"
    threshold: float | None = None
    block_size: int | None = None
    batch_size: int = 16
    thinking: bool | None = False
    raw: bool = False
    turns: int | None = None
    draft_top_k: int | None = None

    @property
    def key(self) -> str:
        """Eight hexadecimal digits of all of it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def file_name(self) -> str:
        """Where its records lie in an output folder."""
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.drafter)
        return f"{name}-{self.key}{SUFFIX}"


@dataclass(frozen=True)
class Drafted:
    """What a drafter is.

    Attributes:
        block_size: drafts per round K; 0 without a drafter.
        layers: of its network, None where it has none.
        parameters: its own, without what it borrows; None where it has none.
        temperatures, shifts: its calibration for this setting, None where it has none.
    """

    block_size: int
    layers: int | None = None
    parameters: int | None = None
    temperatures: tuple[float, ...] | None = None
    shifts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Spent:
    """What one or many prompts took, as far as it can be told apart from their neighbours.

    Attributes:
        seconds: by the clock, prompts read included.
        steps: of the engine.
        decode_steps: those that read no prompt.
        draft_ms, schedule_ms, verify_ms: of the latter, summed.
        judged: requests that gained tokens, summed over all steps.
    """

    seconds: float = 0.0
    steps: int = 0
    decode_steps: int = 0
    draft_ms: float = 0.0
    schedule_ms: float = 0.0
    verify_ms: float = 0.0
    judged: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Turn:
    """One answer, round by round. The step that reads the prompt and draws a first token is none.

    Attributes:
        tokens: generated, the first one and a closing end token included.
        room: tokens that the answer could have had.
        finish_reason: why it ended.
        drafted: drafts that were proposed.
        verified, kept: of every round: drafts sent to the target, and drafts that stayed.
        cut: whether the answer ended within the kept drafts of its last round, so that nothing is
            known of the draft behind them.
        logits: of every round the confidence logits of its drafts; None where the drafter has no
            confidences of its own.
        digest: of the tokens: equal answers have equal ones.
        text: the answer.
    """

    tokens: int
    room: int
    finish_reason: str
    drafted: int
    verified: tuple[int, ...]
    kept: tuple[int, ...]
    cut: bool
    logits: tuple[tuple[float, ...], ...] | None
    digest: str
    text: str


@dataclass(frozen=True)
class Record:
    """A finished prompt.

    Attributes:
        task, key: which one.
        turns: its answers.
        skipped: why it, or the rest of its turns, could not be asked; None where all were.
        spent: since the record before.
    """

    task: str
    key: str
    turns: tuple[Turn, ...]
    skipped: str | None = None
    spent: Spent = field(default_factory=Spent)


@dataclass(frozen=True)
class Plan:
    """What an evaluation is to ask.

    Attributes:
        command: how it was started.
        environment: hardware and versions.
        drafter: what it is.
        tasks: name -> `domain`, `source`, `available` and `keys` in the order of asking.
    """

    command: str
    environment: Mapping[str, Any]
    drafter: Drafted
    tasks: Mapping[str, Mapping[str, Any]]


@dataclass
class RunRecords:
    """The records of one run, on disk where it has a path.

    Attributes:
        settings: of the run.
        path: the file; None keeps everything in memory.
        plans: of every start, the last one counts.
        records: finished prompts by (task, key).
    """

    settings: Settings
    path: Path | None = None
    plans: list[Plan] = field(default_factory=list)
    records: dict[tuple[str, str], Record] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: Settings, directory: Path | None) -> RunRecords:
        """Go on where a run with these settings stopped, or begin.

        Raises:
            DataError: the file is damaged, or belongs to other settings.
        """
        if directory is None:
            return cls(settings)
        path = directory / settings.file_name
        if path.is_file():
            _drop_torn_line(path)
        if path.is_file() and path.stat().st_size:
            run = cls.load(path)
            if run.settings != settings:
                raise DataError(f"{path} belongs to other settings; name another --out.")
            return run
        directory.mkdir(parents=True, exist_ok=True)
        run = cls(settings, path)
        run._append({"version": VERSION, "settings": asdict(settings)})
        return run

    @classmethod
    def load(cls, path: Path) -> RunRecords:
        """Read a file, but for a last line that is still being written, or never was to its end.

        Raises:
            DataError: the file is damaged otherwise, or of another version.
        """
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines or lines[0]["version"] != VERSION:
                raise DataError(
                    f"{path} is no evaluation of version {VERSION}; name another --out."
                )
            run = cls(Settings(**lines[0]["settings"]), path)
            for line in lines[1:]:
                if "plan" in line:
                    run.plans.append(_plan(line["plan"]))
                else:
                    record = _record(line["record"])
                    run.records[record.task, record.key] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged ({error}); remove it to evaluate anew, or name another --out."
            ) from error
        return run

    def start(self, plan: Plan) -> None:
        """Note what is to be asked from here on.

        Raises:
            DataError: it cannot be written.
        """
        self.plans.append(plan)
        self._append({"plan": asdict(plan)})

    def add(self, record: Record) -> None:
        """Keep a finished prompt.

        Raises:
            DataError: it cannot be written; those before it are kept.
        """
        self.records[record.task, record.key] = record
        self._append({"record": asdict(record)})

    @property
    def plan(self) -> Plan:
        """The last one.

        Raises:
            DataError: there is none: the run was killed before it began.
        """
        if not self.plans:
            raise DataError(f"{self.path} holds no evaluation yet; run dspark eval again.")
        return self.plans[-1]

    def of_task(self, task: str) -> list[Record]:
        """The finished prompts of a task in the order of asking, of those that are planned."""
        keys: Sequence[str] = self.plan.tasks[task]["keys"]
        return [self.records[task, key] for key in keys if (task, key) in self.records]

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            append_line(descriptor, self.path, json.dumps(line, allow_nan=False))
        finally:
            os.close(descriptor)


def _drop_torn_line(path: Path) -> None:
    """Take away what a killed run was writing, so that the next line begins afresh."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def load_runs(directories: Sequence[Path]) -> list[RunRecords]:
    """Every run of these folders, by name of file.

    Raises:
        DataError: a folder is missing or has no run, or a file is damaged.
    """
    runs = []
    for directory in directories:
        paths = sorted(directory.glob(f"*{SUFFIX}"))
        if not paths:
            raise DataError(
                f"{directory} holds no evaluation; name a folder that dspark eval --out wrote."
            )
        runs += [run for run in map(RunRecords.load, paths) if run.plans]
    return runs


def _plan(value: Mapping[str, Any]) -> Plan:
    drafter = dict(value["drafter"])
    if drafter["temperatures"] is not None:
        drafter["temperatures"] = tuple(drafter["temperatures"])
    drafter["shifts"] = tuple(drafter["shifts"])
    return Plan(**{**value, "drafter": Drafted(**drafter)})


def _record(value: Mapping[str, Any]) -> Record:
    turns = tuple(_turn(turn) for turn in value["turns"])
    return Record(**{**value, "turns": turns, "spent": Spent(**value["spent"])})


def _turn(value: Mapping[str, Any]) -> Turn:
    logits = value["logits"]
    return Turn(
        **{
            **value,
            "verified": tuple(value["verified"]),
            "kept": tuple(value["kept"]),
            "logits": None if logits is None else tuple(map(tuple, logits)),
        }
    )
