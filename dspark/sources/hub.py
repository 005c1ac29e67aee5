"""The hub: reached, or known within one try not to be.

`huggingface_hub` tries five times with growing pauses, for every file. Whoever is about to fetch
asks here first, so that a machine without the hub waits once, and briefly.
"""

from __future__ import annotations

import logging
import re
import time

from dspark.errors import CheckpointError, first_line

_TIMEOUT_S = 5.0
_REMEMBERED_S = 60.0
_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_logger = logging.getLogger(__name__)
_unreachable: dict[str, tuple[float, str]] = {}
"""Endpoint -> when it could not be reached, and why."""


def why_unreachable() -> str | None:
    """Why the hub cannot be reached, after one try; None where it answers.

    A failure holds for a minute, so that one command does not wait several times.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    endpoint = constants.ENDPOINT
    when, why = _unreachable.get(endpoint, (-_REMEMBERED_S, ""))
    if time.monotonic() - when < _REMEMBERED_S:
        return why
    try:
        get_session().head(endpoint, timeout=_TIMEOUT_S)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # of whichever HTTP library the hub's own uses
        _unreachable[endpoint] = time.monotonic(), first_line(error)
        return first_line(error)
    return None


def is_cached(name: str, revision: str | None = None) -> bool:
    """Whether the hub's cache on this machine holds a model, at least its configuration."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def use_cache_only(name: str, revision: str | None, offline: bool) -> bool:
    """Whether a model is to be taken from the hub's cache without asking the hub.

    Args:
        name: a hub id.
        revision: branch, tag or commit.
        offline: the user says so.

    Raises:
        CheckpointError: the hub cannot be reached, and the cache does not hold the model.
    """
    if offline:
        return True
    if not _ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is neither a directory nor a hub id (owner/name); check the name."
        )
    why = why_unreachable()
    if why is None:
        return False
    if not is_cached(name, revision):
        raise CheckpointError(
            f"{name} is no directory, the hub cannot be reached ({why}), and its cache on this "
            "machine does not hold it; check name and network (--offline does not try the hub)."
        )
    _logger.info("The hub cannot be reached (%s): %s is the copy on this machine.", why, name)
    return True
