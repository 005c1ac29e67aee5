"""Reader of the published training code's feature cache (version 2).

Little endian: `samples.idx` holds 56-byte records; a shard holds per sample, unpadded, input_ids
int32 [S], attention_mask u8 [S], loss_mask u8 [S], the taps' states bf16 [S, P H] and the states
after the final norm bf16 [S, H].
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dspark.data.features.manifest import MANIFEST, read_manifest, sample_key
from dspark.data.features.shards import StoredRows
from dspark.data.samples import Sample
from dspark.errors import DataError

VERSION = 2
INDEX = "samples.idx"
_RECORD = struct.Struct("<QIIQQQQQ")
_DTYPES = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}


@dataclass(frozen=True)
class _Place:
    """A sample's shard, its tokens, and where its arrays begin."""

    shard: int
    num_tokens: int
    ids: int
    mask: int
    features: int
    teacher: int


class ReferenceCache:
    """A version-2 cache; read only.

    Args:
        directory: with manifest.json, samples.idx and the shards.

    Raises:
        DataError: it is of another version, or a file is missing, short or malformed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        manifest = read_manifest(directory)
        wanted = {"version": VERSION, "index_record_size": _RECORD.size, **_DTYPES}
        for name, value in wanted.items():
            if manifest.get(name) != value:
                raise DataError(
                    f"{directory / MANIFEST} has {name} {manifest.get(name)!r}, but a feature "
                    f"cache that can be read has {value!r}; build one with `dspark data cache`."
                )
        try:
            self.taps = tuple(int(i) for i in manifest["target_layer_ids"])
            self.hidden_size = int(manifest["hidden_size"])
            files = {int(s["shard_id"]): str(s["file_name"]) for s in manifest["shards"]}
            count = int(manifest["num_samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{directory / MANIFEST} lacks what a version-2 cache says ({error!r}); copy it "
                "again."
            ) from error
        self.target_fingerprint = None
        self._shards = {number: _map(directory / name) for number, name in files.items()}
        self._places = self._read_index(count)
        self._known: dict[bytes, _Place] = {}

    def __contains__(self, sample: Sample) -> bool:
        return sample_key(sample) in self._known

    def samples(self, max_length: int) -> Iterator[Sample]:
        """All samples, by id; longer ones are cut. Only what was given here can be read."""
        for place in self._places:
            length = min(place.num_tokens, max_length)
            shard = self._shards[place.shard]
            ids = np.frombuffer(shard, dtype="<i4", count=length, offset=place.ids)
            mask = np.frombuffer(shard, dtype=np.uint8, count=length, offset=place.mask)
            sample = Sample(tuple(ids.tolist()), tuple((mask != 0).tolist()))
            self._known[sample_key(sample)] = place
            yield sample

    def rows(self, sample: Sample, device: torch.device) -> StoredRows:
        """A sample's rows in bf16, on a device: all of them.

        Raises:
            DataError: the cache does not hold it.
        """
        place = self._known.get(sample_key(sample))
        if place is None:
            raise DataError(
                f"The cache {self.directory} does not hold one of the samples; a reference cache "
                "is trained on with its own: set samples.paths to []."
            )
        length, width = len(sample.input_ids), self.hidden_size
        planes = len(self.taps)
        shard = self._shards[place.shard]

        def states(offset: int, numbers: int) -> torch.Tensor:
            raw = np.frombuffer(shard, dtype="<i2", count=numbers, offset=offset)
            return torch.from_numpy(raw.astype(np.int16)).to(device).view(torch.bfloat16)

        features = states(place.features, length * planes * width)
        teacher = states(place.teacher, length * width)
        return StoredRows(
            features.view(length, planes, width), teacher.view(length, width), list(range(length))
        )

    def _read_index(self, count: int) -> list[_Place]:
        path = self.directory / INDEX
        data = path.read_bytes() if path.is_file() else b""
        if len(data) != count * _RECORD.size:
            raise DataError(
                f"{path} holds {len(data)} bytes, but {count} samples take "
                f"{count * _RECORD.size}; copy the cache again."
            )
        return [self._place(fields) for fields in _RECORD.iter_unpack(data)]

    def _place(self, fields: tuple[int, ...]) -> _Place:
        sample_id, shard, length, ids, _, mask, features, teacher = fields
        mapped = self._shards.get(shard)
        if mapped is None or teacher + 2 * length * self.hidden_size > len(mapped):
            raise DataError(
                f"{self.directory} is cut short: sample {sample_id} lies beyond the end of shard "
                f"{shard}; copy the cache again."
            )
        return _Place(shard, length, ids, mask, features, teacher)


def _map(path: Path) -> mmap.mmap | bytes:
    """A shard, mapped into memory; no file may be empty to be mapped."""
    if not path.is_file():
        raise DataError(f"{path} is missing, though {MANIFEST} names it; copy the cache again.")
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
