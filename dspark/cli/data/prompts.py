"""`dspark data prompts`: collects prompts, or lets a model write them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dspark.cli.groups import Batch, Common, Loading
from dspark.cli.inputs import use_threads
from dspark.cli.options import Command, option, pick, picked
from dspark.cli.screen import Screen
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.data.prompts.collect import CollectReport

COUNT, BATCH_SIZE = 1000, 16
_OF_SOURCES = ("heldout", "heldout_share", "against", "ngram", "split", "config", "limit", "strict")
EXAMPLE = """\
  dspark data prompts mlabonne/open-perfectblend --against eval/ --out prompts.jsonl \\
    --heldout heldout.jsonl
  dspark data prompts --self bundled --count 200 --out prompts.jsonl"""


@dataclass(frozen=True)
class _Self:
    TITLE: ClassVar = "prompts by the model itself, in place of sources"

    writer: str | None = option(
        None,
        "a directory, a hub id or bundled, which writes prompts behind the user header of its own "
        "chat template",
        flag="--self",
        metavar="MODEL",
    )
    count: int | None = option(
        None, f"number of prompts to write (default: {COUNT})", metavar="N", least=1
    )
    batch_size: int | None = pick(
        Batch, "batch_size", None, help=f"requests at once (default: {BATCH_SIZE})"
    )


@dataclass(frozen=True)
class Options(_Self, Common):
    """Options of `data prompts`."""

    sources: tuple[str, ...] = option(
        (),
        "a JSON-lines file, a folder of them, or a data set: a folder, or its name on the hub",
        positional=True,
        nargs="*",
        metavar="SOURCE",
    )
    out: Path = option(None, "JSON lines, .gz compresses", metavar="FILE", required=True)
    heldout: Path | None = option(None, "file for held-out prompts", metavar="FILE")
    heldout_share: float | None = option(
        None, "share of the prompts that is held out (default: 0.05)", metavar="S"
    )
    against: tuple[str, ...] = option(
        (),
        "an evaluation set whose prompts are left out, or a folder of them; repeatable",
        metavar="PATH",
    )
    ngram: int | None = option(
        None,
        "leave out prompts that share N neighbouring words with --against (default: 13)",
        metavar="N",
        least=1,
    )
    split: str | None = option(None, "split of a data set (default: train)")
    config: str | None = option(
        None, "configuration of a data set that has several", metavar="NAME"
    )
    revision: str | None = pick(
        Loading, "revision", help="branch, tag or commit of a data set, or of MODEL"
    )
    offline: bool = pick(Loading, "offline")
    limit: int | None = option(
        None,
        "read at most N lines; no more of a data set is fetched than that needs",
        metavar="N",
        least=1,
    )
    strict: bool = option(False, "stop at the first malformed line")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    if options.writer is not None:
        _check_self(options)
        return _write_prompts(options.writer, options, screen)
    _check(options)
    from dspark.data.conversations import RECORD_KEYS
    from dspark.data.prompts.collect import Split, collect_prompts
    from dspark.data.prompts.dedup import evaluation_texts
    from dspark.data.prompts.sources import DataSet, read_rows

    share = 0.05 if options.heldout_share is None else options.heldout_share
    rows = chain.from_iterable(
        read_rows(
            DataSet(source, options.config, options.split or "train", options.revision),
            RECORD_KEYS,
            offline=options.offline,
            stream=options.limit is not None,
        )
        for source in options.sources
    )
    out = options.out
    with screen.log.status("Reading ...") as status:
        report = collect_prompts(
            islice(rows, options.limit),
            out,
            split=Split(options.heldout, share, options.seed or 0) if options.heldout else None,
            against=evaluation_texts(options.against, options.ngram or 13)
            if options.against
            else None,
            strict=options.strict,
            progress=lambda so_far: status.update(f"{so_far.input:,} lines ..."),
        )
    screen.say(_sentence(report, out, options.heldout))
    counts = ("records", "input", "heldout", "duplicates", "near_duplicates", "contaminated")
    return picked(report, *counts, "malformed", "bytes") | {
        "failed": report.malformed,
        "bytes_per_token": None,
        "dropped_turns": dict(report.dropped_turns),
        "out": str(out),
    }


def _check_self(options: Options) -> None:
    if options.sources:
        raise UsageError("--self writes prompts and reads none; leave SOURCE or --self out.")
    for name in _OF_SOURCES:
        if getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} acts only without --self.")


def _check(options: Options) -> None:
    if not options.sources:
        raise UsageError("There is no SOURCE; name one, or a MODEL with --self.")
    for name in ("count", "batch_size"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} acts only together with --self.")
    share = options.heldout_share
    if share is not None and not 0 < share < 1:
        raise UsageError(f"--heldout-share is {share}, but must be between 0 and 1.")
    if share is not None and not options.heldout:
        raise UsageError("--heldout-share needs --heldout FILE, where held-out prompts go.")
    if options.ngram is not None and not options.against:
        raise UsageError("--ngram needs --against PATH, the evaluation sets to compare with.")
    if options.heldout and options.heldout == options.out:
        raise UsageError(f"--heldout and --out are both {options.out}; name two files.")


def _sentence(report: CollectReport, out: Path, heldout: Path | None) -> str:
    left_out = [
        f"{count:,} {what}"
        for what, count in (
            ("duplicate", report.duplicates),
            ("nearly duplicate", report.near_duplicates),
            ("contaminated", report.contaminated),
            ("malformed", report.malformed),
        )
        if count
    ]
    kept = f"{report.records:,} prompts in {out}"
    if heldout:
        kept += f", {report.heldout:,} in {heldout}"
    rest = f"; left out: {', '.join(left_out)}" if left_out else ""
    dropped = sum(report.dropped_turns.values())
    turns = f"; {dropped:,} turns of other roles dropped" if dropped else ""
    return f"{report.input:,} lines: {kept}{rest}{turns}."


def _write_prompts(name: str, options: Options, screen: Screen) -> dict[str, Any]:
    """Let a model write prompts."""
    from dspark.data.answers.regenerate import journal_path
    from dspark.data.prompts.self_prompting import SelfPrompts, write_self_prompts
    from dspark.engine.loading import load

    use_threads(options)
    with screen.log.status(f"Loading {name} ..."):
        model = load(
            name,
            "none",
            **picked(options, "device", "dtype", "revision", "offline"),
        )
    out = options.out
    writer = SelfPrompts(model, options.seed or 0, options.batch_size or BATCH_SIZE)
    if journal_path(out).exists():
        screen.remark(f"Going on with {journal_path(out)}.")
    with screen.progress("prompts", counted=True) as tell:
        report = write_self_prompts(writer, out, count=options.count or COUNT, progress=tell)
    for sentence in report.sentences(name):
        screen.say(sentence)
    return picked(report, "records", "bytes", "tries", "cut") | {
        "failed": 0,
        "bytes_per_token": None,
        "dropped": dict(report.dropped),
        "chat_template": report.is_chat,
        "out": str(out),
    }


COMMAND = Command(
    "prompts",
    "collect prompts, without duplicates and without those of evaluation sets",
    EXAMPLE,
    Options,
    run,
)
