"""`dspark convert`: rewrites a drafter's checkpoint in another layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.cli.groups import TARGET_HELP, Common, Loading
from dspark.cli.inputs import use_threads
from dspark.cli.options import Command, option, pick
from dspark.cli.screen import Screen
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.drafters.checkpoints.files import Written
    from dspark.drafters.checkpoints.registry import AnyDrafter

GGUF, WEIGHT_TYPES = "gguf", ("bf16", "f16", "q8_0")
EXAMPLE = """\
  dspark convert runs/drafter runs/for_vllm --to speculators --target models/target
  dspark convert runs/drafter models/target --to attached
  dspark convert bundled bundled_drafter --to deepspec
  dspark convert runs/drafter drafter.gguf --to gguf --type q8_0 --target target.gguf"""


@dataclass(frozen=True)
class Options(Common):
    """Options of `convert`."""

    source: str = option(
        "",
        "a drafter: a directory, a GGUF file, a hub id, smollm2 or bundled",
        positional=True,
        metavar="SRC",
    )
    destination: str = option(
        "",
        "directory to write; for attached, the target's directory; for gguf, a file",
        positional=True,
        metavar="DST",
    )
    to: str = option(
        "",
        "the layout to write: deepspec, speculators, sglang, attached, gguf, deepseek_v4 (mtp.*, "
        "as inside DeepSeek-V4's own checkpoints), or one that an installed package brings",
        required=True,
        metavar="LAYOUT",
    )
    weight_type: str | None = option(
        None,
        "type of the matrices in a GGUF file (default: bf16)",
        flag="--type",
        choices=WEIGHT_TYPES,
    )
    target: str | None = option(
        None,
        f"{TARGET_HELP}; lends embedding and head where SRC lacks them, and its tokenizer to a "
        "GGUF file, and says how many layers it has and what it is called; by default DST for "
        "attached, and SRC where that is a target with a drafter attached",
        metavar="TARGET",
    )
    revision: str | None = pick(Loading, "revision", help="branch, tag or commit of SRC on the hub")
    offline: bool = pick(Loading, "offline")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.drafters.checkpoints.checkpoint import (
        borrow_tables,
        has_attached_drafter,
        load_drafter,
    )
    from dspark.drafters.checkpoints.from_target import TargetTables
    from dspark.drafters.checkpoints.registry import SGLANG, layouts

    use_threads(options)
    known = {name: layout for name, layout in layouts().items() if layout.writers}
    if options.to not in (*known, GGUF):
        names = ", ".join((*known, GGUF))
        raise UsageError(f"--to is {options.to}, but the layouts that are written are {names}.")
    _refuse_options_without_effect(options)
    with screen.log.status(f"Reading {options.source} ..."):
        source = options.source
        hub: dict[str, Any] = {"revision": options.revision, "offline": options.offline}
        drafter = load_drafter(source, **hub)
        target = options.target
        if target is None and options.to == "attached":
            target = options.destination
        elif target is None and has_attached_drafter(source, **hub):
            target = source
        if target is not None:
            revision = options.revision if target == source else None
            tables = TargetTables.read(target, revision=revision, offline=options.offline)
            borrow_tables(drafter, tables)
        elif options.to == GGUF:
            raise UsageError(
                "A GGUF file holds its target's tokenizer; name the target's GGUF file or "
                "directory with --target."
            )
        elif known[options.to].holds_tables and (
            drafter.own_embedding_VH is None or drafter.own_head_VH is None
        ):
            raise UsageError(
                f"{options.source} holds no embedding or no head, which the layout {options.to} "
                "does; name its target with --target."
            )
    with screen.log.status(f"Writing {options.destination} ..."):
        written = _save(drafter, target, options)
    line = f"Wrote {written.directory}: {written.tensors} tensors, {written.bytes / 1e6:.1f} MB."
    screen.say(line)
    report = {"format": options.to, "tensors": written.tensors, "bytes": written.bytes}
    if options.to == GGUF:
        from dspark.drafters.checkpoints.gguf_writer import spec_flags

        report["llama_cpp"] = f"-md {options.destination} {spec_flags(drafter)}"
        screen.say(f"For llama.cpp: {report['llama_cpp']}")
    if options.to == SGLANG:
        report["sglang"] = _add_temperatures(drafter, options, screen)
        screen.say(f"For SGLang: {report['sglang']}")
    return report


def _add_temperatures(drafter: AnyDrafter, options: Options, screen: Screen) -> str:
    """Write the temperatures of a calibration beside SRC, if any; SGLang's arguments."""
    from pathlib import Path

    from dspark.drafters.checkpoints.files import ATTACHED_FOLDER
    from dspark.errors import CompatibilityError
    from dspark.integrations.engines import (
        sglang_arguments,
        takes_temperatures,
        write_temperatures,
    )
    from dspark.scheduling.calibration_file import FILE_NAME, Calibration
    from dspark.sources.names import drafter_source

    sts: str | None = None
    source = Path(drafter_source(options.source))
    beside = [path for path in (source / ATTACHED_FOLDER, source) if (path / FILE_NAME).is_file()]
    for folder in beside[:1] if takes_temperatures(drafter) else ():
        try:
            # SGLang keeps drafts by the token rule.
            calibration = Calibration.load(folder / FILE_NAME)
            entry = calibration.entry(drafter.block_size, "token", "sampled")
            sts = str(write_temperatures(entry, Path(options.destination)))
        except CompatibilityError as error:
            screen.say(f"{FILE_NAME} is left out: {error}")
    return sglang_arguments(drafter, options.destination, sts)


def _refuse_options_without_effect(options: Options) -> None:
    if options.to == GGUF and options.dtype != "auto":
        raise UsageError(
            f"--dtype {options.dtype} has no effect on a GGUF file; choose a --type: "
            f"{', '.join(WEIGHT_TYPES)}."
        )
    if options.to != GGUF and options.weight_type is not None:
        raise UsageError(f"--type {options.weight_type} is for --to {GGUF} only; choose a --dtype.")
    if options.to == GGUF and not options.destination.endswith(".gguf"):
        raise UsageError(f"{options.destination} must end in .gguf, since it is a file to write.")


def _save(drafter: AnyDrafter, target: str | None, options: Options) -> Written:
    import torch

    if options.to == GGUF:
        from dspark.drafters.checkpoints.checkpoint import save_gguf
        from dspark.drafters.checkpoints.from_target import refuse_other_tokens, tokenizer_fields
        from dspark.drafters.checkpoints.gguf import TOKENS
        from dspark.sources.gguf import is_gguf

        assert target is not None  # refused above
        vocab = drafter.config.vocab_size
        fields = tokenizer_fields(target, vocab, offline=options.offline)
        if is_gguf(options.source):
            tokens = enumerate(fields[TOKENS].value)
            refuse_other_tokens(options.source, {text: id_ for id_, text in tokens})
        kind = options.weight_type or WEIGHT_TYPES[0]
        return save_gguf(drafter, options.destination, fields, weight_type=kind)

    from dspark.drafters.checkpoints.checkpoint import save, save_attached

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.to == "attached":
        return save_attached(drafter, options.destination, dtype=dtype)
    return save(drafter, options.destination, options.to, dtype=dtype)


COMMAND = Command("convert", "rewrite a drafter's checkpoint", EXAMPLE, Options, run)
