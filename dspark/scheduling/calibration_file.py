"""calibration.json: the temperature scalings of a drafter, stored beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from dspark.errors import CompatibilityError, DataError
from dspark.request import VERIFIERS, Verifier
from dspark.scheduling.calibration import (
    Rounds,
    TemperatureClass,
    TemperatureScaling,
    assess,
    fit,
)
from dspark.scheduling.json_files import read_json, write_json
from dspark.scheduling.reliability import BINS, Reliability

FILE_NAME = "calibration.json"
VERSION = 1
FALLBACK = "calibrate again (dspark calibrate); until then confidences are used uncalibrated"


@dataclass(frozen=True)
class CalibrationEntry:
    """One scaling, what it is for, and how it fared.

    Attributes:
        block_size: K.
        verifier: whose rounds it was fitted on.
        temperature_class: `greedy` or `sampled` requests.
        scaling: K temperatures.
        rounds: how many rounds it was fitted on.
        before: reliability of the uncalibrated survivals per position, on rounds held out from
            the fit where there were any.
        after: the same, calibrated.
        child_rates: of draft trees, how often the second, third, ... child of a node stays where
            those before it do not, the last of all further ones; empty where none were recorded.

    Raises:
        DataError: a field does not fit the others.
    """

    block_size: int
    verifier: Verifier
    temperature_class: TemperatureClass
    scaling: TemperatureScaling
    rounds: int
    before: tuple[Reliability, ...]
    after: tuple[Reliability, ...]
    child_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.scaling.temperatures), len(self.before), len(self.after)}
        if lengths != {self.block_size} or self.rounds < 1:
            raise DataError(
                f"A calibration of block size {self.block_size} on {self.rounds} rounds has "
                f"{len(self.scaling.temperatures)} temperatures and reliabilities of "
                f"{len(self.before)} and {len(self.after)} positions; {FALLBACK}."
            )
        if not all(0 <= rate <= 1 for rate in self.child_rates):
            raise DataError(
                f"A calibration has child rates {list(self.child_rates)}, which must lie in "
                f"[0, 1]; {FALLBACK}."
            )
        if self.verifier not in VERIFIERS:
            raise DataError(f"A calibration is for the verifier {self.verifier!r}; {FALLBACK}.")
        if self.temperature_class not in get_args(TemperatureClass):
            raise DataError(
                f"A calibration is for the temperature class {self.temperature_class!r}; "
                f"{FALLBACK}."
            )

    @property
    def key(self) -> tuple[int, str, str]:
        """What tells entries apart."""
        return self.block_size, self.verifier, self.temperature_class

    @property
    def mean_survival(self) -> tuple[float, ...]:
        """Mean calibrated survival per position: what a request without a history may expect."""
        means, least = [], 1.0
        for after in self.after:
            total = sum(n * p for n, p in zip(after.bin_counts, after.bin_predicted, strict=True))
            # Trimmed positions were observed in other rounds: keep the row from rising.
            least = min(least, total / after.count if after.count else least)
            means.append(least)
        return tuple(means)


def calibrate(
    rounds: Rounds,
    verifier: Verifier,
    temperature_class: TemperatureClass,
    held_out: Rounds | None = None,
    *,
    shifts: bool = True,
) -> CalibrationEntry:
    """Fit a scaling, with shifts or without, and assess it, on held-out rounds where there are any.

    Raises:
        DataError: too few rounds were observed.
        UsageError: the verifier is unknown.
    """
    scaling = fit(rounds, verifier, shifts=shifts)
    test = rounds if held_out is None else held_out
    return CalibrationEntry(
        block_size=len(scaling.temperatures),
        verifier=verifier,
        temperature_class=temperature_class,
        scaling=scaling,
        rounds=len(rounds.accepted_N),
        before=assess(test, verifier),
        after=assess(test, verifier, scaling),
    )


@dataclass(frozen=True)
class Calibration:
    """All scalings of a drafter, one for each block size, verifier and temperature class.

    Attributes:
        entries: what the file holds.

    Raises:
        DataError: two entries are for the same.
    """

    entries: tuple[CalibrationEntry, ...] = ()

    def __post_init__(self) -> None:
        keys = [entry.key for entry in self.entries]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise DataError(f"There are two calibrations for {_named(*twice[0])}; {FALLBACK}.")

    def entry(
        self, block_size: int, verifier: Verifier, temperature_class: TemperatureClass
    ) -> CalibrationEntry:
        """The entry for these.

        Raises:
            CompatibilityError: there is none.
        """
        for entry in self.entries:
            if entry.key == (block_size, verifier, temperature_class):
                return entry
        known = "; ".join(_named(*entry.key) for entry in self.entries) or "nothing"
        raise CompatibilityError(
            f"The calibration has no entry for {_named(block_size, verifier, temperature_class)} "
            f"(it has {known}); {FALLBACK}."
        )

    def lacks(
        self, block_size: int, verifier: Verifier, kinds: Iterable[TemperatureClass]
    ) -> list[str]:
        """What is not calibrated for requests of these temperature classes, a sentence each."""
        found = []
        for kind in sorted(kinds):
            try:
                self.entry(block_size, verifier, kind)
            except CompatibilityError as error:
                found.append(str(error))
        return found

    def with_entry(self, entry: CalibrationEntry) -> Calibration:
        """The same with an entry added, in the place of an older one for the same.

        Child rates are kept where the new one has none: those of chains are fitted more often. New
        ones take the place of all others of this block size, since they hold for every verifier.
        """
        others = [other for other in self.entries if other.key != entry.key]
        older = [other for other in self.entries if other.key == entry.key]
        if entry.child_rates:
            size = entry.block_size
            others = [replace(o, child_rates=()) if o.block_size == size else o for o in others]
        elif older:
            entry = replace(entry, child_rates=older[0].child_rates)
        return Calibration(tuple(sorted([*others, entry], key=lambda e: e.key)))

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            DataError: the place cannot be written.
        """
        records = []
        for entry in self.entries:
            record = asdict(entry)
            if not entry.child_rates:  # as in files that are older than trees
                del record["child_rates"]
            records.append(record.pop("scaling") | record)
        write_json(path, {"version": VERSION, "entries": records})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read the file.

        Raises:
            DataError: it is missing, damaged, of another version, or holds impossible numbers.
        """
        record = read_json(path, VERSION, FALLBACK)
        try:
            return cls(tuple(_entry(row) for row in record["entries"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a calibration ({error!r}); {FALLBACK}.") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def _named(block_size: int, verifier: str, temperature_class: str) -> str:
    return f"block size {block_size}, verifier {verifier}, {temperature_class} requests"


def _entry(record: Mapping[str, Any]) -> CalibrationEntry:
    values = dict(record)
    scaling = TemperatureScaling(
        tuple(_number(t) for t in values.pop("temperatures")),
        tuple(_number(s) for s in values.pop("shifts", ())),
    )
    values["child_rates"] = tuple(_number(r) for r in values.pop("child_rates", ()))
    for name in ("before", "after"):
        values[name] = tuple(_reliability(row) for row in values[name])
    if not isinstance(values["block_size"], int) or not isinstance(values["rounds"], int):
        raise TypeError("block_size and rounds must be whole numbers")
    return CalibrationEntry(scaling=scaling, **values)


def _reliability(record: Mapping[str, Any]) -> Reliability:
    values = dict(record)
    for field in fields(Reliability):
        value = values[field.name]
        if field.name.startswith("bin_"):
            values[field.name] = tuple(_number(v) for v in value)
            if len(value) != BINS:
                raise ValueError(f"{field.name} has {len(value)} bins, not {BINS}")
        elif field.name != "auc" or value is not None:
            _number(value)
    return Reliability(**values)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return value
