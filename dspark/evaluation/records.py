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
    """Everything that determines a record; runs with other settings have their own file.

    Attributes:
        target, target_weights: its name, and a fingerprint of its weights.
        drafter: the name in reports.
        draft, draft_weights: its source, and a fingerprint of its weights.
        dtype: of the target, marked if batch-invariant.
        temperature, top_p, top_k, max_new_tokens, seed: as `SamplingParams`.
        verifier, schedule, threshold, block_size, batch_size: as `Model.engine`.
        thinking: the chat template's thinking mode; None for the template's default.
        raw: texts without the chat template.
        turns: turns of a conversation at most; None for all.
        draft_top_k: as `Model`.
        tree_nodes: nodes of draft trees; None for chains.
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
    tree_nodes: int | None = None

    @property
    def key(self) -> str:
        """Eight hex digits that identify the settings."""
        known = asdict(self)
        if self.tree_nodes is None:  # as in files that are older than trees
            del known["tree_nodes"]
        text = json.dumps(known, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def file_name(self) -> str:
        """Name of its file of records."""
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.drafter)
        return f"{name}-{self.key}{SUFFIX}"


@dataclass(frozen=True)
class Drafted:
    """Description of a drafter.

    Attributes:
        block_size: drafts per round K; 0 without a drafter.
        layers: of its network; None without one.
        parameters: its own, without borrowed ones; None without a network.
        temperatures, shifts: its calibration for this setting; None if uncalibrated.
    """

    block_size: int
    layers: int | None = None
    parameters: int | None = None
    temperatures: tuple[float, ...] | None = None
    shifts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Spent:
    """Time and work of one or many prompts, as far as they can be separated from others.

    Attributes:
        seconds: wall time, prefill included.
        steps: of the engine.
        decode_steps: steps without prefill.
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
class TreeRound:
    """A round in which a draft tree was verified.

    Attributes:
        parents: of each node, in the order of its growth; -1 for the anchor.
        survival: the chance, as predicted, that it stays.
        path: nodes that stayed.
    """

    parents: tuple[int, ...]
    survival: tuple[float, ...]
    path: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One answer, round by round; prefill, which draws the first token, is not a round.

    Attributes:
        tokens: generated, including the first one and a final end token.
        room: largest number of tokens that the answer could have had.
        finish_reason: as in `Output`.
        drafted: proposed drafts.
        verified, kept: per round: drafts sent to the target, and drafts kept; of trees how deep
            they were tested.
        cut: whether the answer ended within the kept drafts of its last round, so that the outcome
            of the next draft is unknown.
        logits: per round the confidence logits of its drafts; None if the drafter has no
            confidences of its own.
        digest: hash of the tokens.
        text: the answer.
        trees: of each round; None where chains were drafted.
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
    trees: tuple[TreeRound, ...] | None = None


@dataclass(frozen=True)
class Record:
    """A finished prompt.

    Attributes:
        task, key: of the question.
        turns: its answers.
        skipped: why it, or its remaining turns, were skipped; None if all were asked.
        spent: since the previous record.
    """

    task: str
    key: str
    turns: tuple[Turn, ...]
    skipped: str | None = None
    spent: Spent = field(default_factory=Spent)


@dataclass(frozen=True)
class Plan:
    """The plan of an evaluation.

    Attributes:
        command: the command line.
        environment: hardware and versions.
        drafter: description of the drafter.
        tasks: name -> `domain`, `source`, `available` and `keys` in evaluation order.
    """

    command: str
    environment: Mapping[str, Any]
    drafter: Drafted
    tasks: Mapping[str, Mapping[str, Any]]


@dataclass
class RunRecords:
    """The records of one run, on disk if it has a path.

    Attributes:
        settings: of the run.
        path: the file; None keeps everything in memory.
        plans: one per start; the last one is valid.
        records: finished prompts by (task, key).
    """

    settings: Settings
    path: Path | None = None
    plans: list[Plan] = field(default_factory=list)
    records: dict[tuple[str, str], Record] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: Settings, directory: Path | None) -> RunRecords:
        """Resume a run with these settings, or begin one.

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
        """Read a file, ignoring an incomplete last line.

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
        """Record the plan of this start.

        Raises:
            DataError: it cannot be written.
        """
        self.plans.append(plan)
        self._append({"plan": asdict(plan)})

    def add(self, record: Record) -> None:
        """Add a finished prompt.

        Raises:
            DataError: it cannot be written; earlier ones are kept.
        """
        self.records[record.task, record.key] = record
        self._append({"record": asdict(record)})

    @property
    def plan(self) -> Plan:
        """The last plan.

        Raises:
            DataError: there is none, because the run was killed before it began.
        """
        if not self.plans:
            raise DataError(f"{self.path} holds no evaluation yet; run dspark eval again.")
        return self.plans[-1]

    def of_task(self, task: str) -> list[Record]:
        """The finished prompts of a task among the planned ones, in evaluation order."""
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
    """Remove an incomplete last line of a killed run."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def load_runs(directories: Sequence[Path]) -> list[RunRecords]:
    """Every run in these folders, sorted by file name.

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
    logits, trees = value["logits"], value.get("trees")
    return Turn(
        **{
            **value,
            "verified": tuple(value["verified"]),
            "kept": tuple(value["kept"]),
            "logits": None if logits is None else tuple(map(tuple, logits)),
            "trees": None
            if trees is None
            else tuple(TreeRound(**{n: tuple(v) for n, v in each.items()}) for each in trees),
        }
    )
