"""What goes wrong with a data set, said in one sentence with the remedy.

Two libraries report it: `huggingface_hub`, which fetches, and `datasets`, which reads tables. What
neither names here is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dspark.errors import DataError, first_line

if TYPE_CHECKING:
    from dspark.data.hub import DataSet

_INSTEAD = "or give JSON lines in its place"


@contextmanager
def hub_errors(data_set: DataSet, offline: bool) -> Iterator[None]:
    """Name what the hub refuses, and that it cannot be reached.

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
    """Name what the library `datasets` cannot read.

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
