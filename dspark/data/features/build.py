"""Feature cache builds: the missing samples are computed after an estimate of size and time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark.data.features.cache import FeatureCache
from dspark.data.features.encoder import Encoded, Encoder, by_length, learn, spread, target_features
from dspark.data.features.manifest import (
    MANIFEST,
    Coding,
    Manifest,
    Origin,
    SampleRecipe,
    sample_key,
    target_fingerprint,
)
from dspark.data.features.shards import RECORD_BYTES, index_path, parse_records, writers_of
from dspark.data.features.writer import CacheWriter, rewrite_index
from dspark.data.samples import Sample
from dspark.errors import DataError
from dspark.targets.target import Target

_PROBE_TOKENS = 2048
_SLACK = 1.05  # allowance for the estimate's error


@dataclass(frozen=True)
class Estimate:
    """Remaining work, estimated from a probe.

    Attributes:
        samples: missing samples.
        tokens: of these.
        bytes: estimated size, before `max_bytes`.
        seconds: estimated time.
        bytes_per_token: of the probe.
        seconds_per_1000_tokens: of the probe.
        max_bytes: remaining growth allowed; None for no limit.
        free_bytes: on the disk.
    """

    samples: int
    tokens: int
    bytes: int
    seconds: float
    bytes_per_token: float
    seconds_per_1000_tokens: float
    max_bytes: int | None
    free_bytes: int


@dataclass(frozen=True)
class BuildReport:
    """Content of a cache after a build.

    Attributes:
        records: number of samples.
        failed: samples with non-finite features.
        left_out: samples that exceeded `max_bytes`.
        bytes: of its files.
        tokens: of its samples.
    """

    records: int
    failed: int
    left_out: int
    bytes: int
    tokens: int


def wanted_manifest(
    target: Target,
    source: str,
    taps: Sequence[int],
    samples: SampleRecipe,
    coding: Coding,
) -> Manifest:
    """The manifest of a cache to be built, without learned parameters.

    Args:
        target: that computes the features.
        source: directory or hub id of its weights.
        taps: layers to capture.
        samples: the samples.
        coding: of the rows.
    """
    origin = Origin(
        target=source,
        target_fingerprint=target_fingerprint(source),
        num_layers=target.num_layers,
        hidden_size=target.hidden_size,
        taps=tuple(taps),
        dtype=str(target.dtype).removeprefix("torch."),
    )
    return Manifest(origin, samples, coding, None)


def start_cache(
    directory: Path, wanted: Manifest, target: Target, samples: Sequence[Sample]
) -> Manifest:
    """The manifest of a cache to write to: the existing one, or a new one.

    Raises:
        DataError: the existing cache differs from `wanted`.
    """
    if (directory / MANIFEST).is_file():
        found = Manifest.read(directory)
        found.refuse_other(wanted, directory)
        return found
    for torn in directory.glob(f".{MANIFEST}.*.tmp"):  # of an interrupted build
        torn.unlink()
    if directory.is_dir() and any(directory.iterdir()):
        raise DataError(
            f"{directory} holds files but no {MANIFEST}; give features.path an empty or a new "
            "directory."
        )
    learned = learn(target, samples, wanted.origin.taps, wanted.coding)
    manifest = Manifest(wanted.origin, wanted.samples, wanted.coding, learned)
    try:
        manifest.write(directory)
    except OSError as error:
        raise DataError(
            f"The cache {directory} cannot be written ({error.strerror}); give features.path "
            "another directory, or make room there."
        ) from error
    return manifest


def build_cache(
    directory: Path,
    wanted: Manifest,
    target: Target,
    samples: Sequence[Sample],
    *,
    tokens_per_forward: int,
    max_bytes: int | None = None,
    announce: Callable[[Estimate], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> BuildReport:
    """Add missing samples to a cache; an interrupted build resumes.

    Args:
        directory: of the cache; created if absent.
        wanted: its manifest, see `wanted_manifest`.
        target: that computes the features.
        samples: its samples; equal ones are stored once.
        tokens_per_forward: tokens per target forward pass.
        max_bytes: size limit of the cache; samples that fit are kept.
        announce: called with the estimate before the work starts.
        progress: called with (tokens done, tokens in all) after every batch.

    Raises:
        DataError: the existing cache differs from `wanted`, or the disk is too small.
        DiskFullError: the disk became full; committed samples are whole.
    """
    manifest = start_cache(directory, wanted, target, samples)
    cache = FeatureCache(directory)
    missing = list({sample_key(s): s for s in samples if s not in cache}.values())
    failed = 0
    if missing:
        with CacheWriter(directory, max_bytes=max_bytes) as writer, Encoder(manifest) as encoder:
            work = _Work(target, manifest.origin.taps, encoder, writer)
            rest, estimate, probe = work.probe(missing)
            announce(estimate)
            _refuse_small_disk(estimate, directory)
            work.store(probe)
            failed = len(probe.failed) + work.fill(by_length(rest, tokens_per_forward), progress)
    cache.refresh()
    return BuildReport(
        records=len(cache.records),
        failed=failed,
        left_out=sum(s not in cache for s in missing) - failed,
        bytes=cache.bytes + (directory / MANIFEST).stat().st_size,
        tokens=cache.tokens,
    )


def mend(directory: Path) -> int:
    """Check every payload and drop the records of damaged ones, so that a build recomputes them.

    Returns:
        The number of damaged payloads.
    """
    cache = FeatureCache(directory)
    whole = {record for record in cache.records if cache.is_whole(record)}
    damaged = len(cache.records) - len(whole)
    if damaged:
        for writer in writers_of(directory):
            path = index_path(directory, writer)
            records = parse_records(path.read_bytes(), writer)
            rewrite_index(path, [record for record in records if record in whole])
    return damaged


@dataclass
class _Work:
    """Computes, encodes and writes batches."""

    target: Target
    taps: tuple[int, ...]
    encoder: Encoder
    writer: CacheWriter

    def encode(self, samples: Sequence[Sample]) -> Encoded:
        return self.encoder.encode(samples, *target_features(self.target, samples, self.taps))

    def probe(self, missing: Sequence[Sample]) -> tuple[list[Sample], Estimate, Encoded]:
        """Encode and time one batch; the remaining samples, the estimate, and the batch."""
        some = spread(missing, _PROBE_TOKENS)
        target_features(self.target, some[:1], self.taps)  # warm-up
        started = time.perf_counter()
        encoded = self.encode(some)
        size = sum(len(future.result().payload) + RECORD_BYTES for future in encoded.entries)
        seconds = time.perf_counter() - started
        tokens, total = (sum(len(s.input_ids) for s in row) for row in (some, missing))
        writer = self.writer
        estimate = Estimate(
            samples=len(missing),
            tokens=total,
            bytes=round(size / tokens * total),
            seconds=seconds / tokens * total,
            bytes_per_token=size / tokens,
            seconds_per_1000_tokens=1000 * seconds / tokens,
            max_bytes=None if writer.max_bytes is None else writer.max_bytes - writer.bytes,
            free_bytes=shutil.disk_usage(writer.directory).free,
        )
        probed = {sample_key(s) for s in some}
        return [s for s in missing if sample_key(s) not in probed], estimate, encoded

    def store(self, encoded: Encoded) -> bool:
        """Write a batch; whether any sample fitted."""
        stored = [self.writer.add(future.result()) for future in encoded.entries]
        self.writer.commit()
        return any(stored) or not stored

    def fill(self, batches: Sequence[list[Sample]], progress: Callable[[int, int], None]) -> int:
        """Add batches until one does not fit; the number of failed samples."""
        total = sum(len(s.input_ids) for batch in batches for s in batch)
        seen = failed = 0
        before: Encoded | None = None
        progress(seen, total)
        for batch in batches:
            encoded = self.encode(batch)
            # The previous batch is written while this one is packed.
            if before is not None and not self.store(before):
                return failed
            before, failed = encoded, failed + len(encoded.failed)
            seen += sum(len(s.input_ids) for s in batch)
            progress(seen, total)
        if before is not None:
            self.store(before)
        return failed


def _refuse_small_disk(estimate: Estimate, directory: Path) -> None:
    needed = round(estimate.bytes * _SLACK)
    if estimate.max_bytes is not None:
        needed = min(needed, estimate.max_bytes)
    if needed > estimate.free_bytes:
        raise DataError(
            f"The cache of {estimate.samples} samples takes about {needed / 1e9:.3g} GB, but the "
            f"disk of {directory} has {estimate.free_bytes / 1e9:.3g} GB free; free space, or set "
            "features.max_bytes to keep what fits and features.source to hybrid to compute the "
            "rest."
        )
