"""Self-prompting: prompts written by the model itself (Magpie; Xu et al. 2024, arXiv 2406.08464).

A chat model given its template up to the start of a user message continues with a user message. A
model without a template continues from its beginning-of-text token; its text does not end as a
prompt would, so it is cut at a random length.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.data.answers.regenerate import journal_path
from dspark.data.answers.replay import repeats_gram
from dspark.data.files.atomic import Journal
from dspark.data.files.json_lines import write_json_lines
from dspark.data.prompts.dedup import digest, near_text, words_of
from dspark.data.templates import render, special_ids
from dspark.engine.model import Model
from dspark.errors import DataError
from dspark.params import SamplingParams
from dspark.request import Request
from dspark.targets.target import Target

MOST_TOKENS = 160
"""Token limit of a prompt; longer ones count as unfinished."""
CUT_TOKENS = (8, 48)
"""Range of lengths at which prompts without an end are cut."""
FEWEST_CHARACTERS, REPEATED_WORDS = 8, 6
ENDING_SHARE = 0.25
"""If a smaller share of a model's prompts ends by itself, all are cut."""
BATCHES_PER_CHUNK = 2
TRIES_PER_PROMPT = 8
_MARK = "qxsentinelxq"


@dataclass(frozen=True)
class Opening:
    """The prefix that makes a model write a user message.

    Attributes:
        ids: tokens of the prefix.
        stop_ids: tokens that end the message, besides the model's end tokens.
        stop: texts that end it, if the template has no such token.
        marks: template texts that a prompt must not contain.
        is_chat: whether there is a template; otherwise a prompt is raw text.
    """

    ids: tuple[int, ...]
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    is_chat: bool = True


def opening_of(target: Target) -> Opening:
    """A target's opening: its template up to the user's text, or its beginning-of-text token.

    Raises:
        DataError: it has no tokenizer, or neither a suitable template nor a token that begins or
            ends a text.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise DataError(f"{target.name} has no tokenizer; give prompts.")
    if tokenizer.chat_template:
        return _chat_opening(target.name, tokenizer)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return Opening((int(token),), is_chat=False)
    raise DataError(
        f"{target.name} has no chat template and no beginning-of-text token to write prompts from; "
        "give prompts."
    )


def _chat_opening(name: str, tokenizer: Any) -> Opening:
    shown = render(tokenizer, [{"role": "user", "content": _MARK}], generation=True)
    before, found, after = shown.partition(_MARK)
    ids = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    if not found or not ids:
        raise DataError(
            f"The chat template of {name} does not show a user's words behind a header, so it "
            "cannot be made to write prompts; give prompts."
        )
    special = special_ids(tokenizer)
    behind = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    ends_by_token = bool(behind) and behind[0] in special
    line = after.strip().partition("\n")[0].strip()
    headers = [part.strip() for part in (*before.splitlines(), *after.splitlines())]
    return Opening(
        tuple(ids),
        stop_ids=(behind[0],) if ends_by_token else (),
        stop=(line,) if line and not ends_by_token else (),
        marks=tuple({part for part in headers if len(part) > 3 and not part.isalpha()}),
    )


@dataclass(frozen=True)
class Written:
    """The output of one try.

    Attributes:
        ids: tokens without an end token.
        ended: whether the model ended it.
    """

    ids: tuple[int, ...]
    ended: bool


def reason_against(text: str, written: Written, opening: Opening, tokenizer: Any) -> str:
    """Why a prompt is rejected; empty if it is kept. Duplicates are not checked."""
    if len(text) < FEWEST_CHARACTERS or len(words_of(text)) < 2:
        return "too short"
    if special_ids(tokenizer) & set(written.ids) or any(mark in text for mark in opening.marks):
        return "imitates the template"
    if any(line.strip().lower() in _ROLES for line in text.splitlines()):
        return "imitates the template"
    if repeats_gram(text.split(), REPEATED_WORDS):
        return "repeats itself"
    return ""


_ROLES = {f"{role}{end}" for role in ("user", "assistant", "system") for end in ("", ":")}


@dataclass
class SelfPromptReport:
    """Outcome of every try: records + the sum of `dropped` = tries.

    Attributes:
        tries: messages begun.
        records: prompts kept.
        dropped: rejected prompts, by reason.
        cut: whether prompts were cut at a length because the model does not end them.
        is_chat: whether the model has a chat template.
        bytes: size of the file.
    """

    tries: int = 0
    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: bool = False
    is_chat: bool = True
    bytes: int = 0

    def sentences(self, name: str) -> list[str]:
        """The report in sentences."""
        found = []
        if not self.is_chat:
            found.append(
                f"{name} has no chat template: its prompts start from its beginning-of-text token "
                f"and are cut after {CUT_TOKENS[0]} to {CUT_TOKENS[1]} tokens."
            )
        elif self.cut:
            found.append(
                f"{name} does not end its prompts itself: they are cut after {CUT_TOKENS[0]} to "
                f"{CUT_TOKENS[1]} tokens."
            )
        left = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        kept = f"{self.records:,} of {self.tries:,} self-written prompts are kept"
        return [*found, f"{kept}{f'; left out: {left}' if left else ''}."]


@dataclass
class SelfPrompts:
    """A model that writes prompts.

    Attributes:
        model: the model.
        seed: try i uses seed + i.
        batch_size: tries at once.
        temperature, top_p: of sampling.
        most_tokens: token limit of a prompt.
    """

    model: Model
    seed: int = 0
    batch_size: int = 16
    temperature: float = 1.0
    top_p: float = 0.95
    most_tokens: int = MOST_TOKENS

    def __post_init__(self) -> None:
        self.opening = opening_of(self.model.target)
        room = self.model.target.max_context - len(self.opening.ids)
        most = self.most_tokens if self.opening.is_chat else CUT_TOKENS[1]
        if room < CUT_TOKENS[0]:
            raise DataError(
                f"The chat template of {self.model.target.name} leaves {room} tokens of its "
                "context for a prompt; give a model with a longer context."
            )
        self.most_tokens = min(most, room)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that determine the prompts, as JSON values."""
        return {
            "target": self.model.target.name,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.most_tokens,
            "opening": list(self.opening.ids),
        }

    @property
    def chunk(self) -> int:
        """Tries between two counts of the prompts, at least."""
        return BATCHES_PER_CHUNK * self.batch_size

    def requests(self, numbers: Sequence[int]) -> list[Request]:
        """The requests of some tries."""
        params = SamplingParams(
            self.most_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=self.opening.stop,
            stop_token_ids=self.opening.stop_ids,
        )
        return [Request(self.opening.ids, params.with_seed(self.seed + i)) for i in numbers]

    def write(self, numbers: Sequence[int]) -> Iterator[tuple[int, Written]]:
        """Yield (number, output) of some tries, in the order in which they end."""
        if not numbers:
            return
        requests = self.requests(numbers)
        engine = self.model.engine(requests, batch_size=self.batch_size, schedule="fixed")
        flying = {engine.add(request): i for i, request in zip(numbers, requests, strict=True)}
        ends = self.model.target.eos_token_ids | set(self.opening.stop_ids)
        while engine.has_work:
            for event in engine.step():
                if event.output is None:
                    continue
                output = event.output.checked()
                ended = output.finish_reason == "stop"
                ids = output.token_ids
                if ended and ids and ids[-1] in ends:
                    ids = ids[:-1]
                yield flying.pop(event.request_id), Written(tuple(ids), ended)

    def select(self, written: Sequence[Written]) -> tuple[list[str], SelfPromptReport]:
        """The prompts kept from some outputs, and the report."""
        report = SelfPromptReport(is_chat=self.opening.is_chat)
        ended = sum(each.ended for each in written)
        report.cut = not self.opening.is_chat or ended < ENDING_SHARE * len(written)
        kept, seen = list[str](), set[int]()
        for number, each in enumerate(written):
            report.tries += 1
            text, reason = self._prompt(number, each, cut=report.cut)
            near = digest((near_text(text),))
            if not reason and near in seen:
                reason = "duplicate"
            if reason:
                report.dropped[reason] += 1
                continue
            seen.add(near)
            kept.append(text)
        report.records = len(kept)
        return kept, report

    def _prompt(self, number: int, written: Written, *, cut: bool) -> tuple[str, str]:
        """The text of a try, and why it is rejected."""
        tokenizer = self.model.target.tokenizer
        if cut:
            length = random.Random(self.seed * 1_000_003 + number).randint(*CUT_TOKENS)
            written = Written(written.ids[:length], ended=True)
        text = tokenizer.decode(written.ids, skip_special_tokens=True)
        for stop in self.opening.stop:
            text = text.partition(stop)[0]
        text = text.strip()
        if not written.ended:
            return text, "unfinished"
        return text, reason_against(text, written, self.opening, tokenizer)


def write_self_prompts(
    writer: SelfPrompts,
    out: str | Path,
    *,
    count: int,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SelfPromptReport:
    """Let a model write prompts until `count` are kept, as JSON lines that `regenerate` reads.

    A journal beside the output holds the tries, so that an interrupted run resumes. The run gives
    up after 8 tries per prompt.

    Args:
        writer: the model.
        out: file of prompts, as `turns`, or as `prompt` without a chat template; `.gz` compresses.
        count: number of prompts.
        seconds: start no new tries after this time; None for no limit.
        progress: called with (prompts so far, count): of a running chunk those that have ended,
            of which some may be left out.

    Raises:
        DataError: nothing was kept; or a file cannot be written.
        UsageError: another run is writing the same file.
    """
    out = Path(out)
    started = time.perf_counter()
    with Journal(journal_path(out), writer.settings) as journal:
        noted = {
            int(entry["try"]): Written(tuple(entry["ids"]), bool(entry["ended"]))
            for _, entry in journal.entries()
        }
        written, kept, report = list[Written](), list[str](), SelfPromptReport()
        while report.records < count and len(written) < TRIES_PER_PROMPT * count + writer.chunk:
            if written and seconds is not None and time.perf_counter() - started > seconds:
                break
            # At a chunk's end few slots are busy, so half of what is missing is tried at once, as
            # far as the time allows.
            chunk = (count - report.records) // 2
            if seconds is not None:
                spent = time.perf_counter() - started
                chunk = min(chunk, int(len(written) * (seconds / max(spent, 1e-9) - 1)))
            chunk = max(chunk, writer.chunk)
            numbers, ended = range(len(written), len(written) + chunk), report.records
            for number, each in writer.write([n for n in numbers if n not in noted]):
                journal.append({"try": number, "ids": each.ids, "ended": each.ended})
                noted[number] = each
                ended += each.ended
                if progress is not None:
                    progress(min(ended, count), count)
            written += [noted[number] for number in numbers]
            kept, report = writer.select(written)
            if progress is not None:
                progress(min(report.records, count), count)
        if not kept:
            raise DataError(_nothing(writer, report))
        _save(out, kept[:count], is_chat=report.is_chat)
        journal.remove()
    report.dropped["not needed"] += max(report.records - count, 0)
    report.dropped = +report.dropped
    report.records = min(report.records, count)
    report.bytes = out.stat().st_size
    return report


def _save(out: Path, prompts: Sequence[str], *, is_chat: bool) -> None:
    with write_json_lines(out) as write:
        for text in prompts:
            name = {"id": f"{digest((text,)):016x}"}
            write(name | ({"turns": [text]} if is_chat else {"prompt": text}))


def _nothing(writer: SelfPrompts, report: SelfPromptReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.most_common())
    return (
        f"{writer.model.target.name} wrote no usable prompt in {report.tries} tries ({reasons}); "
        "give prompts."
    )
