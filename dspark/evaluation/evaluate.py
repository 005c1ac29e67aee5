"""Evaluation: every question of every task is decoded by the engine and yields one record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dspark.data.conversations import Message
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.speculation.round_record import RoundRecord
from dspark.errors import CompatibilityError, UsageError
from dspark.evaluation.identity import (
    draft_fingerprint,
    drafted,
    dtype_name,
    environment,
    target_fingerprint,
)
from dspark.evaluation.records import (
    Plan,
    Record,
    RunRecords,
    Settings,
    Spent,
    TreeRound,
    Turn,
)
from dspark.evaluation.tasks import Question, Task
from dspark.request import Output, Request, SamplingParams
from dspark.scheduling.calibration import temperature_class

_MOST_LOGIT = 30.0


@dataclass
class RoundLog:
    """The rounds of one answer.

    Attributes:
        verified, kept: per round.
        logits: confidence logits per round, empty unless it has one for each draft of a whole
            block.
        has_own: whether the drafter has confidences of its own, as far as known.
        committed: tokens so far.
        trees: per round, empty ones where chains are drafted.
    """

    verified: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    logits: list[tuple[float, ...]] = field(default_factory=list)
    has_own: bool = True
    committed: int = 0
    trees: list[TreeRound] = field(default_factory=list)

    def add(self, record: RoundRecord, row: int, num_drafts: int) -> None:
        """Record a round; the first one reads the prompt and has no drafts."""
        if self.committed:
            self.verified.append(record.lengths[row])
            self.kept.append(record.accepted[row])
            self._add_tree(record, row)
            logits_RK = record.confidence_logits_RK
            logits_K = np.empty(0) if logits_RK is None else logits_RK[row]
            self.has_own &= not record.are_margins
            whole = len(logits_K) == num_drafts and not np.isnan(logits_K).any()
            clipped = logits_K.clip(-_MOST_LOGIT, _MOST_LOGIT) if whole else []
            self.logits.append(tuple(round(float(x), 4) for x in clipped))
        self.committed += len(record.committed[row])

    def _add_tree(self, record: RoundRecord, row: int) -> None:
        """Record a round's tree: its drafts count as deep as they were tested."""
        if record.parents is None or record.paths is None:
            self.trees.append(TreeRound((), (), ()))
            return
        parents, path = record.parents[row][: record.lengths[row]], record.paths[row]
        survival = [0.0] * len(parents)
        if record.survival_RK is not None and row < len(record.survival_RK):
            survival = record.survival_RK[row][: len(parents)].tolist()
        self.trees.append(TreeRound(parents, tuple(round(x, 4) for x in survival), path))
        self.verified[-1] = len(path) + ((path[-1] if path else -1) in parents)

    def turn(self, output: Output, room: int, *, plain: bool) -> Turn:
        """The finished answer."""
        stats = output.stats
        if plain:  # plain decoding reports no rounds
            self.verified = self.kept = [0] * stats.rounds
        cut = False
        if self.kept and not plain:
            overshoot = max(0, self.committed - len(output.token_ids))
            cut = overshoot >= 1  # at least the token after the drafts was not committed
            self.kept[-1] = min(self.kept[-1], self.kept[-1] + 1 - overshoot)
        ids = ",".join(map(str, output.token_ids)).encode()
        return Turn(
            tokens=len(output.token_ids),
            room=room,
            finish_reason=output.finish_reason,
            drafted=stats.drafted,
            verified=tuple(self.verified),
            kept=tuple(self.kept),
            cut=cut,
            logits=tuple(self.logits) if self.has_own and not plain else None,
            digest=hashlib.sha256(ids).hexdigest()[:12],
            text=output.text,
            trees=tuple(self.trees) if any(each.parents for each in self.trees) else None,
        )


@dataclass
class Dialogue:
    """A question in progress, turn by turn.

    Attributes:
        question: the question.
        request: of the current turn.
        messages: so far, including the user's last turn; empty for raw text.
        turns: answers so far.
        log: of the current answer.
    """

    question: Question
    request: Request
    messages: list[Message]
    turns: list[Turn] = field(default_factory=list)
    log: RoundLog = field(default_factory=RoundLog)


Progress = Callable[[Task, Record], None]
"""(task, the question just finished)"""
# Allowance for template tokens around a later turn.
_TEMPLATE_TOKENS = 64


class Evaluator:
    """Evaluates the questions of tasks with one drafter at one setting.

    Args:
        model: a target with or without a drafter.
        run: the records, with their settings.
        progress: called for every finished question.

    Raises:
        CompatibilityError: thinking is requested but the chat template has no thinking mode.
        UsageError: a setting has an invalid value.
    """

    def __init__(self, model: Model, run: RunRecords, progress: Progress | None = None) -> None:
        self.model, self.run, self.settings = model, run, run.settings
        self._progress = progress
        settings = self.settings
        if settings.thinking and "enable_thinking" not in (
            model.target.tokenizer.chat_template or ""
        ):
            raise CompatibilityError(
                f"The chat template of {settings.target} has no thinking mode; leave --thinking "
                "out."
            )
        self._params = SamplingParams(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
        )
        self.num_drafts = 0
        if model.drafter is not None and settings.schedule != "off":
            self.num_drafts = settings.block_size or model.drafter.block_size

    def ask(self, task: Task) -> None:
        """Evaluate every question of a task that has no record yet.

        Raises:
            DSparkError: a request failed; finished records are kept.
        """
        dialogues = list[Dialogue]()
        limit = self.model.target.max_context
        for question in task.questions:
            if (task.name, question.key) in self.run.records:
                continue
            prompt = question.prompt
            messages = [dict(message) for message in prompt.messages or ()]
            ids = self._encode(messages or prompt.text)
            if len(ids) >= limit:
                why = f"the prompt has {len(ids)} tokens, but the context holds {limit}"
                self._keep(task, Record(task.name, question.key, (), why))
                continue
            dialogues.append(Dialogue(question, self._request(question.key, 0, ids), messages))
        if dialogues:
            self._lead(task, dialogues)

    def _lead(self, task: Task, dialogues: Sequence[Dialogue]) -> None:
        """Complete all dialogues, `batch_size` at once."""
        running: dict[int, Dialogue] = {}
        engine = self._engine(dialogues, running)
        waiting = iter(dialogues)
        stopwatch = _Stopwatch(engine)
        while True:
            self._admit(engine, waiting, running)
            if not engine.has_work:
                return
            events = engine.step()
            stopwatch.judged(len(events))
            for event in events:
                if event.output is None:
                    continue
                dialogue = running.pop(event.request_id)
                output = event.output.checked()
                plain = self.num_drafts == 0
                turn = dialogue.log.turn(output, _room(engine, dialogue.request), plain=plain)
                dialogue.turns.append(turn)
                record = self._follow(task, dialogue, engine)
                if record is None:
                    running[engine.add(dialogue.request)] = dialogue
                else:
                    self._keep(task, stopwatch.stamp(record))

    def _admit(
        self, engine: Engine, waiting: Iterator[Dialogue], running: dict[int, Dialogue]
    ) -> None:
        """Keep the engine's queue filled, at twice the batch size."""
        while len(running) < 2 * self.settings.batch_size:
            dialogue = next(waiting, None)
            if dialogue is None:
                return
            running[engine.add(dialogue.request)] = dialogue

    def _follow(self, task: Task, dialogue: Dialogue, engine: Engine) -> Record | None:
        """The record of a completed dialogue; otherwise None, with its next request prepared."""
        at = len(dialogue.turns)
        question, later = dialogue.question, dialogue.question.prompt.later
        if at > len(later):
            return Record(task.name, question.key, tuple(dialogue.turns))
        dialogue.messages += [
            {"role": "assistant", "content": dialogue.turns[-1].text},
            {"role": "user", "content": later[at - 1]},
        ]
        ids = self._encode(dialogue.messages)
        if len(ids) >= engine.max_length:
            why = (
                f"turn {at + 1} has {len(ids)} tokens with what went before, but the context holds "
                f"{engine.max_length}"
            )
            return Record(task.name, question.key, tuple(dialogue.turns), why)
        dialogue.request = self._request(question.key, at, ids)
        dialogue.log = RoundLog()
        return None

    def _engine(self, dialogues: Sequence[Dialogue], running: dict[int, Dialogue]) -> Engine:
        def watch(record: RoundRecord) -> None:
            for row, request_id in enumerate(record.request_ids):
                running[request_id].log.add(record, row, self.num_drafts)

        settings = self.settings
        plain = self.num_drafts == 0
        model = Model(self.model.target) if plain else self.model
        return model.engine(
            [dialogue.request for dialogue in dialogues],
            batch_size=settings.batch_size,
            verifier=settings.verifier,
            schedule=None if plain else settings.schedule,  # type: ignore[arg-type]
            threshold=settings.threshold,
            block_size=None if plain else settings.block_size,
            tree_nodes=None if plain else settings.tree_nodes,
            watch=watch,
            strict=True,
            max_length=max(map(self._longest, dialogues)),
        )

    def _longest(self, dialogue: Dialogue) -> int:
        """Largest number of tokens of a dialogue, all turns together."""
        length = len(dialogue.request.prompt_ids) + self.settings.max_new_tokens
        for text in dialogue.question.prompt.later:
            asked = len(self.model.encode(text)) if text.strip() else 0
            length += asked + _TEMPLATE_TOKENS + self.settings.max_new_tokens
        return length

    def _encode(self, prompt: str | list[Message]) -> tuple[int, ...]:
        settings = self.settings
        if isinstance(prompt, str) or not settings.raw:
            return self.model.encode(prompt, raw=settings.raw, thinking=settings.thinking)
        if len(prompt) > 1:
            raise UsageError(
                "--raw takes texts, but a prompt is a dialogue of several messages; leave --raw "
                "out, or give --turns 1."
            )
        return self.model.encode(prompt[0]["content"])

    def _request(self, key: str, turn: int, ids: tuple[int, ...]) -> Request:
        """A request whose seed depends on its question alone."""
        text = f"{self.settings.seed} {key} {turn}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
        return Request(ids, self._params.with_seed(seed))

    def _keep(self, task: Task, record: Record) -> None:
        self.run.add(record)
        if self._progress is not None:
            self._progress(task, record)


class _Stopwatch:
    """Attributes an engine's time to records."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._judged = engine, 0
        self._last = self._spent()

    def judged(self, requests: int) -> None:
        """Count the requests of a step."""
        self._judged += requests

    def stamp(self, record: Record) -> Record:
        """The record with the time spent since the previous one."""
        now = self._spent()
        spent, self._last = now - self._last, now
        return Record(record.task, record.key, record.turns, record.skipped, spent)

    def _spent(self) -> Spent:
        clock = self._engine.clock
        return Spent(
            seconds=time.perf_counter(),
            steps=clock.steps + clock.prefills,
            decode_steps=clock.steps,
            draft_ms=clock.draft_ms,
            schedule_ms=clock.schedule_ms,
            verify_ms=clock.verify_ms,
            judged=self._judged,
        )


def _room(engine: Engine, request: Request) -> int:
    """Largest number of tokens of an answer."""
    return min(request.params.max_new_tokens, engine.max_length - len(request.prompt_ids))


def settings_of(model: Model, target: str, name: str, draft: str, **options: Any) -> Settings:
    """The settings of a run.

    Args:
        model: the pair.
        target: name that the target was loaded by.
        name: of the drafter, in reports.
        draft: name that it was loaded by.
        **options: further fields of `Settings`; temperature defaults to 0.
    """
    return Settings(
        target=target,
        target_weights=target_fingerprint(model.target),
        drafter=name,
        draft=draft,
        draft_weights=draft_fingerprint(model),
        dtype=dtype_name(model.target),
        draft_top_k=model.draft_top_k,
        **({"temperature": 0.0} | options),
    )


def evaluate(
    model: Model,
    settings: Settings,
    tasks: Sequence[Task],
    out: Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> RunRecords:
    """Evaluate every question of the tasks that has no record in `out` yet.

    Args:
        model: the pair that `settings` names.
        settings: of the run.
        tasks: the questions.
        out: a folder for the records; None keeps them in memory.
        command: the command line, for the report.
        progress: called for every finished question, including those of earlier starts.

    Returns:
        The records.

    Raises:
        DSparkError: the file of records is damaged, a setting is invalid, or a request failed;
            finished records are kept.
    """
    run = RunRecords.open(settings, out)
    plan = Plan(
        command=command,
        environment=environment(model.target),
        drafter=drafted(model, settings, temperature_class(settings.temperature)),
        tasks={
            task.name: {
                "domain": task.domain,
                "source": task.source,
                "available": task.available,
                "keys": [question.key for question in task.questions],
            }
            for task in tasks
        },
    )
    evaluator = Evaluator(model, run, progress)
    run.start(plan)
    for task in tasks:
        if progress is not None:
            for record in run.of_task(task.name):
                progress(task, record)
        evaluator.ask(task)
    return run
