"""Fields of a parsed config.json by type, with errors that name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from dspark.errors import CheckpointError, CompatibilityError


class Reader:
    """Fields of a configuration by type, with errors that name them.

    Args:
        data: a parsed config.json.
        where: what to call it in errors.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def integer(self, name: str, *, minimum: int = 1, default: int | None = None) -> int:
        """An integer of at least `minimum`."""
        value = self.data.get(name, default)
        if type(value) is not int or value < minimum:
            raise self._error(name, value, f"an integer of at least {minimum}")
        return value

    def number(self, name: str) -> float:
        """A positive number."""
        value = self.data.get(name)
        if not is_positive(value):
            raise self._error(name, value, "a positive number")
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        """True or false."""
        value = self.data.get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of integers."""
        value = self.data.get(name)
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise self._error(name, value, "a list of integers")
        return value

    def only(self, name: str, supported: object) -> None:
        """Refuse a field that is there and has another value than the one that is supported.

        Raises:
            CompatibilityError: naming it.
        """
        value = self.data.get(name, supported)
        if value != supported or type(value) is not type(supported):
            raise CompatibilityError(
                f"{self.where} has {name} {value!r}, but only {supported} is supported yet."
            )

    def _error(self, name: str, value: object, needed: str) -> CheckpointError:
        if value is None:
            return CheckpointError(f"{self.where} lacks {name}, which must be {needed}.")
        return CheckpointError(f"{self.where} has {name} {value!r}, but it must be {needed}.")


def is_positive(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]
