"""Prompt sources: JSON-lines files, folders of them, and data sets in a folder or on the hub.

Prompt collection and evaluation share this reader. The library `datasets` reads tables of every
kind; JSON-lines files on the hub are downloaded and read as local ones, because the library
requires all lines to have the same columns. Errors of `huggingface_hub` and `datasets` become one
sentence with a remedy; an error that is not named here is a bug and keeps its traceback.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.data.files.json_lines import JSON_LINES, Row, json_lines_files, scan_json_lines
from dspark.errors import DataError, first_line
from dspark.sources.cache import why_unreachable

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_rows(
    source: DataSet,
    columns: Sequence[str] = (),
    *,
    offline: bool = False,
    stream: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a source, including damaged ones.

    Args:
        source: a JSON-lines file or a folder of them (only the name counts), another folder that
            holds a data set, or a data set on the hub.
        columns: a data set must have one of these; JSON lines are not checked.
        offline: read only what is on this machine.
        stream: fetch a data set's rows as they are read instead of downloading it first.

    Raises:
        DataError: the source does not exist or is empty, or as `data_set_rows`.
    """
    path = Path(source.name).expanduser()
    if (path.exists() and not path.is_dir()) or (
        path.is_dir() and any(map(_is_json_lines, path.rglob("*")))
    ):
        for file in json_lines_files(path):
            yield from scan_json_lines(file)
        return
    if not path.is_dir() and (_is_json_lines(path) or not _HUB_ID.fullmatch(source.name)):
        raise DataError(
            f"{source.name} does not exist; give a JSON-lines file, a folder, or a data set's name "
            "on the hub (owner/name)."
        )
    yield from data_set_rows(source, columns, offline=offline, stream=stream)


def _is_json_lines(path: Path) -> bool:
    return path.name.endswith(JSON_LINES)


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """A data set and a selection of its rows.

    Attributes:
        name: its hub id (owner/name), or a folder.
        config: its configuration; None for the only one.
        split: in the library's notation: test, train[:1000], train+test.
        revision: branch, tag or commit on the hub; None for the newest.
        files: a pattern of JSON-lines files on the hub, read instead of configuration and split.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    files: str | None = None


def data_set_rows(
    data_set: DataSet,
    columns: Sequence[str] = (),
    *,
    offline: bool = False,
    stream: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a data set.

    Args:
        data_set: the data set.
        columns: it must have one of these; no requirement by default.
        offline: read only what is on this machine.
        stream: fetch rows as they are read, if only the first ones are needed, instead of
            downloading all files of the configuration first.

    Raises:
        DataError: there is no such data set, configuration, split, revision or column; it is gated
            or damaged; the hub cannot be reached; or `datasets` is needed but not installed.
    """
    if data_set.files is not None:
        yield from _rows_of_files(data_set, data_set.files, offline)
        return
    offline = offline or _away(data_set)
    with hub_errors(data_set, offline), table_errors(data_set):
        for number, record in enumerate(_table(data_set, offline, stream), 1):
            if number == 1 and columns and not set(columns) & set(record):
                raise _no_column(data_set, columns, record)
            where = f"{data_set.name}, {data_set.split}, row {number}"
            yield Row(where, _with_lists_of_objects(record), number=number)


def _rows_of_files(data_set: DataSet, pattern: str, offline: bool) -> Iterator[Row]:
    from huggingface_hub import snapshot_download

    offline = offline or _away(data_set)
    with hub_errors(data_set, offline):
        folder = Path(
            snapshot_download(
                data_set.name,
                repo_type="dataset",
                revision=data_set.revision,
                allow_patterns=pattern,
                local_files_only=offline,
            )
        )
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataError(
            f"The data set {data_set.name} has no file {pattern}; give JSON lines in its place."
        )
    for file in files:
        yield from scan_json_lines(file)


def _away(data_set: DataSet) -> bool:
    """Whether the hub is needed but unreachable, which is logged; then only its cache is read."""
    why = None if Path(data_set.name).exists() else why_unreachable()
    if why is not None:
        _logger.info("The hub cannot be reached (%s); %s is looked for here.", why, data_set.name)
    return why is not None


def _table(data_set: DataSet, offline: bool, stream: bool) -> Any:
    """The library's iterable of a data set's rows."""
    builder = _builder(data_set, offline)
    splits = [str(name) for name in builder.info.splits or builder.config.data_files or ()]
    parts = {part.split("[")[0].strip() for part in data_set.split.split("+")}
    if splits and not parts <= {*splits, "all"}:
        raise _no_split(data_set, splits)
    if stream and "[" not in data_set.split:  # the library cuts no streams
        return builder.as_streaming_dataset(split=data_set.split)
    builder.download_and_prepare()
    try:
        return builder.as_dataset(split=data_set.split)
    except ValueError as error:
        raise _no_split(data_set, [str(name) for name in builder.info.splits]) from error


def _builder(data_set: DataSet, offline: bool) -> Any:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with _offline(offline):
            builder = datasets.load_dataset_builder(
                data_set.name, data_set.config, revision=data_set.revision
            )
    except (HfHubHTTPError, HFValidationError):  # a ValueError too, if the hub says 400
        raise
    except ValueError as error:
        raise _no_config(data_set, offline) from error
    # Without the hub, the library takes any revision in its cache.
    if data_set.revision is not None and isinstance(builder, Cache):
        raise DataError(
            f"Without the hub it is unknown whether the {data_set.name} on this machine is of "
            f"revision {data_set.revision}; read it online, or without a revision."
        )
    return builder


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Set the library's global offline switch; its functions have no such argument."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = wanted or before
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _no_config(data_set: DataSet, offline: bool) -> DataError:
    import datasets

    name, config = data_set.name, data_set.config
    if offline:
        which = "the only configuration" if config is None else f"configuration {config!r}"
        return DataError(
            f"The data set {name} is not on this machine with {which}; name another one with "
            "--config, or read it once online."
        )
    known = ", ".join(datasets.get_dataset_config_names(name, revision=data_set.revision))
    if config is None:
        return DataError(f"The data set {name} has several configurations; name one of {known}.")
    return DataError(f"The data set {name} has no configuration {config!r}; it has {known}.")


def _no_split(data_set: DataSet, known: Sequence[str]) -> DataError:
    return DataError(
        f"The data set {data_set.name} has no split {data_set.split!r}; it has {', '.join(known)}."
    )


def _no_column(data_set: DataSet, columns: Sequence[str], record: Mapping[str, Any]) -> DataError:
    wanted = " or ".join(repr(column) for column in columns)
    return DataError(
        f"The data set {data_set.name}, split {data_set.split!r}, has no column {wanted}, but "
        f"{', '.join(map(repr, record))}; name another configuration, or give JSON lines that "
        "have one."
    )


def _with_lists_of_objects(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert objects of lists, as older data sets have them, to lists of objects."""
    return {key: _as_list_of_objects(value) for key, value in record.items()}


def _as_list_of_objects(value: object) -> object:
    if not isinstance(value, dict) or not value:
        return value
    if not all(isinstance(column, list) for column in value.values()):
        return value
    return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]


_INSTEAD = "or give JSON lines in its place"


@contextmanager
def hub_errors(data_set: DataSet, offline: bool) -> Iterator[None]:
    """Translate the hub's refusals and connection errors.

    Raises:
        DataError: in place of the errors of `huggingface_hub` and of its connection.
    """
    # HTTPError is that of the HTTP library that the hub's own uses, httpx or its successor.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:  # a RepositoryNotFoundError too
        raise _gated(data_set) from error
    except RepositoryNotFoundError as error:
        raise _absent(data_set) from error
    except RevisionNotFoundError as error:
        raise _no_revision(data_set) from error
    except HFValidationError as error:
        raise DataError(
            f"{data_set.name} is no name of a data set; give owner/name, a folder, or JSON lines."
        ) from error
    except HfHubHTTPError as error:
        raise DataError(
            f"The hub does not hand out the data set {data_set.name} ({first_line(error)}); try "
            f"again later, {_INSTEAD}."
        ) from error
    except (LocalEntryNotFoundError, ConnectionError, HTTPError) as error:
        raise _unreachable(data_set, offline, error) from error


@contextmanager
def table_errors(data_set: DataSet) -> Iterator[None]:
    """Translate errors of the library `datasets`.

    Raises:
        DataError: in place of its errors, or where it is not installed.
    """
    try:
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    except ImportError as error:
        raise DataError(
            f"The data set {data_set.name} needs the library datasets, which is not installed; "
            f"install it with pip install 'dspark[data]', {_INSTEAD}."
        ) from error
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except DatasetNotFoundError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise _no_revision(data_set) from error
        # The library drops the hub's own error and keeps a sentence of it.
        raise (_gated if "gated" in str(error) else _absent)(data_set) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):  # for hub_errors
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"The data set {data_set.name} holds no file that can be read as a table; name another "
            f"one, {_INSTEAD}."
        ) from error
    except RuntimeError as error:
        raise DataError(
            f"The data set {data_set.name} cannot be read ({first_line(error)}); try its revision "
            f"refs/convert/parquet, {_INSTEAD}."
        ) from error
    except (DatasetGenerationError, ValueError) as error:
        raise DataError(
            f"The data set {data_set.name}, split {data_set.split!r}, is damaged or no table "
            f"({first_line(error.__cause__ or error)}); fetch it again, {_INSTEAD}."
        ) from error


def _gated(data_set: DataSet) -> DataError:
    return DataError(
        f"The data set {data_set.name} is gated; ask for access at "
        f"https://huggingface.co/datasets/{data_set.name}, then log in with `hf auth login` or set "
        "HF_TOKEN."
    )


def _absent(data_set: DataSet) -> DataError:
    return DataError(
        f"There is no data set {data_set.name} on the hub, or it is private; check the name, or "
        "log in with `hf auth login`."
    )


def _no_revision(data_set: DataSet) -> DataError:
    return DataError(
        f"The data set {data_set.name} has no revision {data_set.revision!r}; give one of its "
        "branches, tags or commits."
    )


def _unreachable(data_set: DataSet, offline: bool, error: BaseException) -> DataError:
    if offline:
        return DataError(
            f"The data set {data_set.name} is not on this machine; read it once online, {_INSTEAD}."
        )
    return DataError(
        f"The hub cannot be reached for the data set {data_set.name} ({first_line(error)}); check "
        f"the network, {_INSTEAD}."
    )
