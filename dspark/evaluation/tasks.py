"""Evaluation tasks: the paper's nine benchmark sets, and any file of prompts.

The nine sets are read from a folder of JSON lines, or from the hub in the published evaluator's
wording. A set larger than the published evaluator's is shuffled by the seed and truncated.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dspark.data.conversations import Prompt, as_prompt, with_input
from dspark.data.corpus import BOXED
from dspark.data.files.json_lines import JSON_LINES, Row, read_json_lines, stem
from dspark.data.prompts.sources import DataSet, read_rows
from dspark.errors import DataError

Record = Mapping[str, Any]
DOMAINS = ("math", "code", "chat")
_PROMPT_COLUMNS = ("turns", "messages")
_LIVECODEBENCH = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program\n\n### Question:\n"
)
_CODE_FORMAT = "### Format: Write your code in the following format:\n```python\n"
_STARTER = "### Format: Use the following code structure:\n```python\n"
_ANSWER = "\n```\n\n### Answer: (use the provided format with backticks)"


@dataclass(frozen=True)
class Question:
    """A prompt of a task, with its later turns.

    Attributes:
        key: its identifier in every run, a hash of its content.
        prompt: the prompt.
    """

    key: str
    prompt: Prompt


@dataclass(frozen=True)
class Task:
    """Questions measured together.

    Attributes:
        name: in reports.
        domain: its group in the macro average over domains.
        questions: the chosen ones.
        source: file or hub id.
        available: number of questions in the source.
    """

    name: str
    domain: str
    questions: tuple[Question, ...]
    source: str
    available: int

    @classmethod
    def of(cls, name: str, domain: str, prompts: Sequence[Prompt], source: str) -> Task:
        """A task of all these prompts; equal ones get distinct keys."""
        seen: dict[str, int] = {}
        questions = []
        for prompt in prompts:
            key = _digest(prompt)
            seen[key] = seen.get(key, 0) + 1
            questions.append(Question(key if seen[key] == 1 else f"{key}-{seen[key]}", prompt))
        return cls(name, domain, tuple(questions), source, len(questions))

    def chosen(self, most: int | None, seed: int) -> Task:
        """At most `most` of the questions, the first ones after a seeded shuffle."""
        if most is None or most >= len(self.questions):
            return self
        order = list(self.questions)
        random.Random(seed).shuffle(order)
        return replace(self, questions=tuple(order[:most]))

    def with_turns(self, turns: int | None) -> Task:
        """Each question truncated to its first turns; None keeps all."""
        if turns is None:
            return self
        cut = [replace(q.prompt, later=q.prompt.later[: turns - 1]) for q in self.questions]
        return replace(
            self,
            questions=tuple(
                replace(q, prompt=prompt) for q, prompt in zip(self.questions, cut, strict=True)
            ),
        )


@dataclass(frozen=True)
class Benchmark:
    """One of the nine sets.

    Attributes:
        domain: math, code or chat.
        most: number of questions of the published evaluator.
        hub: its data set on the hub.
        column: of the question's text; for mt-bench, of the turns.
        wording: the user turn, from the question and its row; by default the question alone.
    """

    domain: str
    most: int
    hub: DataSet
    column: str
    wording: Callable[[str, Record], str] = lambda question, _: question


def _reasoned(question: str, _: Record) -> str:
    return question + BOXED


def _humaneval(question: str, _: Record) -> str:
    task = "Write a solution to the following problem and make sure that it passes the tests:"
    return f"{task}\n```python\n{question}\n```"


def _livecodebench(question: str, row: Record) -> str:
    starter = row.get("starter_code")
    shape = f"{_STARTER}{starter}" if starter else f"{_CODE_FORMAT}# YOUR CODE HERE"
    return f"{_LIVECODEBENCH}{question}\n\n{shape}{_ANSWER}"


def _alpaca(question: str, row: Record) -> str:
    return with_input(question, row.get("input"))


BENCHMARKS: Mapping[str, Benchmark] = {
    "gsm8k": Benchmark("math", 500, DataSet("openai/gsm8k", "main", "test"), "question", _reasoned),
    "math500": Benchmark(
        "math", 500, DataSet("HuggingFaceH4/MATH-500", split="test"), "problem", _reasoned
    ),
    "aime25": Benchmark("math", 30, DataSet("math-ai/aime25", split="test"), "problem", _reasoned),
    "mbpp": Benchmark(
        "code", 256, DataSet("google-research-datasets/mbpp", "sanitized", "test"), "prompt"
    ),
    "humaneval": Benchmark(
        "code", 164, DataSet("openai/openai_humaneval", split="test"), "prompt", _humaneval
    ),
    "livecodebench": Benchmark(
        "code", 500, DataSet("livecodebench/code_generation_lite", files="test*.jsonl"),
        "question_content", _livecodebench,
    ),
    "mt-bench": Benchmark("chat", 80, DataSet("HuggingFaceH4/mt_bench_prompts"), "prompt"),
    "alpaca": Benchmark("chat", 500, DataSet("tatsu-lab/alpaca"), "instruction", _alpaca),
    "arena-hard-v2": Benchmark(
        "chat", 500,
        DataSet("lmarena-ai/arena-hard-auto", files="data/arena-hard-v2.0/question.jsonl"),
        "prompt",
    ),
}  # fmt: skip


def load_benchmark(
    name: str,
    data: Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    offline: bool = False,
) -> Task:
    """One of the nine sets.

    Args:
        name: of the set.
        data: a folder with `NAME.jsonl`, each line a prompt (`turns`, `messages` or `prompt`) or a
            row of the set as on the hub; None reads the set from the hub.
        limit: questions at most; None for the published evaluator's number.
        seed: of the choice, if the set has more.
        offline: read only what is on this machine.

    Raises:
        DataError: the name is unknown, the file is missing, malformed or empty, or the hub's set is
            unavailable.
    """
    if name not in BENCHMARKS:
        raise DataError(
            f"There is no task {name!r}; the tasks are {', '.join(BENCHMARKS)}, and any other "
            "prompts are read with --prompts FILE."
        )
    benchmark = BENCHMARKS[name]
    origin, source = benchmark.hub, f"hub: {benchmark.hub.name}"
    if data is not None:
        path = local_file(name, data)
        if path is None:
            raise DataError(
                f"The task {name} is not in {data}: it has neither {name}.jsonl nor "
                f"{name}.jsonl.gz; put one there, or leave --data out to take it from the hub "
                f"({benchmark.hub.name})."
            )
        origin, source = DataSet(str(path)), str(path)
    columns = (*_PROMPT_COLUMNS, benchmark.column)
    prompts = [_prompt(benchmark, row) for row in read_rows(origin, columns, offline=offline)]
    if not prompts:
        raise DataError(f"{source} holds no prompt.")
    task = Task.of(name, benchmark.domain, prompts, source)
    return task.chosen(limit or benchmark.most, seed)


def local_file(name: str, data: Path) -> Path | None:
    """The file of a set in a folder; None if there is none.

    Raises:
        DataError: there is no such folder.
    """
    if not data.is_dir():
        raise DataError(f"The folder {data} does not exist; name one with --data.")
    paths = (data / f"{name}{suffix}" for suffix in JSON_LINES)
    return next((path for path in paths if path.is_file()), None)


def load_file(path: Path, *, limit: int | None = None, seed: int = 0) -> list[Task]:
    """A file of prompts as one task, or as one task per `category` if its lines have one.

    SPEED-Bench has categories, which become tasks and domains of their own.

    Args:
        path: JSON lines with `turns`, `messages` or `prompt`, and perhaps `category`.
        limit: questions of a task at most.
        seed: of the choice.

    Raises:
        DataError: the file is missing, malformed or empty, or has a category on some lines only.
    """
    groups: dict[str | None, list[Prompt]] = {}
    for where, record in read_json_lines(path):
        category = record.get("category")
        if category is not None and (not isinstance(category, str) or not category):
            raise DataError(f"{where}: 'category' must be a non-empty string.")
        groups.setdefault(category, []).append(as_prompt(record, where))
    if not groups:
        raise DataError(f"{path} holds no prompt.")
    if None in groups and len(groups) > 1:
        raise DataError(f"{path} has a 'category' on some lines only; give it on all, or on none.")
    whole = stem(path)
    return [
        Task.of(category or whole, category or whole, prompts, str(path)).chosen(limit, seed)
        for category, prompts in groups.items()
    ]


def _prompt(benchmark: Benchmark, row: Row) -> Prompt:
    """A row that is a prompt already, or one of the set in the published evaluator's wording."""
    record = row.whole()
    if any(column in record for column in _PROMPT_COLUMNS):
        return as_prompt(record, row.where)
    question = record.get(benchmark.column)
    turns: list[Any] = question if isinstance(question, list) else [question]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise DataError(
            f"{row.where}: needs 'turns', 'messages', or {benchmark.column!r} with the text of a "
            f"question, as {benchmark.hub.name} has it."
        )
    return as_prompt({"turns": [benchmark.wording(turn, record) for turn in turns]}, row.where)


def _digest(prompt: Prompt) -> str:
    asked = [prompt.text if prompt.messages is None else list(prompt.messages), *prompt.later]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
