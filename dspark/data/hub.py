"""Sets of the hub, through the optional library `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dspark.errors import DataError


@dataclass(frozen=True)
class HubSet:
    """Where a set lies on the hub.

    Attributes:
        repository: its id.
        config: its configuration; None for the only one.
        split: of these rows.
        files: JSON-lines files in the repository, read in place of a configuration.
    """

    repository: str
    config: str | None = None
    split: str = "test"
    files: str | None = None


def hub_rows(where: HubSet, *, offline: bool = False) -> list[Mapping[str, Any]]:
    """All rows of a set.

    Raises:
        DataError: `datasets` is not installed, or the set cannot be had.
    """
    if find_spec("datasets") is None:
        raise DataError(
            f"Reading {where.repository} from the hub needs the library datasets; install it with "
            "pip install 'dspark[data]', or name a folder of JSON lines with --data."
        )
    import datasets

    options: dict[str, Any] = {
        "download_config": datasets.DownloadConfig(local_files_only=offline),
    }
    if where.files is None:
        name, options["name"], options["split"] = where.repository, where.config, where.split
    else:
        name, options["split"] = "json", "train"
        options["data_files"] = f"hf://datasets/{where.repository}/{where.files}"
    try:
        return list(datasets.load_dataset(name, **options))
    except Exception as error:  # whatever the library or the network came up with
        raise DataError(
            f"{where.repository} cannot be read from the hub ({error}); name a folder of JSON "
            "lines with --data."
        ) from error
