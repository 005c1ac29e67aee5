"""Small JSON files that are whole or absent, with errors a user can act on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dspark.errors import DataError


def write_json(path: str | Path, value: Mapping[str, object]) -> None:
    """Write a JSON object that takes its place once it is complete; folders are made.

    Raises:
        DataError: the place cannot be written.
        ValueError: a number is NaN or infinite, which JSON lacks.
    """
    path = Path(path)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several processes may measure the same table at once.
        handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(fresh, 0o666 & ~umask)  # mkstemp lets nobody else read
            os.replace(fresh, path)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}); name another place."
        ) from error


def read_json(path: str | Path, version: int, remedy: str) -> dict[str, Any]:
    """Read a JSON object of the given version.

    Args:
        path: the file.
        version: what its `version` must say.
        remedy: ends each error, without its full stop.

    Raises:
        DataError: it is missing, no JSON object, or of another version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; {remedy}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} is not a JSON object; {remedy}.")
    if record.get("version") != version:
        raise DataError(
            f"{path} is of version {record.get('version')!r}, but version {version} is needed; "
            f"{remedy}."
        )
    return record


def typed_fields(record: object, kind: type) -> dict[str, Any]:
    """The fields of a record for a dataclass of numbers and strings.

    Raises:
        TypeError: it is no object, or its fields are not exactly those of the class.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"{record!r} is not an object")
    known = fields(kind)
    if set(record) != {field.name for field in known}:
        raise TypeError(f"its fields are {sorted(record)}, not {sorted(f.name for f in known)}")
    kinds = {"int": (int,), "float": (int, float), "str": (str,)}
    for field in known:
        value = record[field.name]
        if not isinstance(value, kinds[str(field.type)]) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {value!r}")
    return dict(record)
