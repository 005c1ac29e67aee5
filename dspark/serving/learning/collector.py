"""What a learning server gathers: rows and outcomes of consenting requests, and a ring of samples.

The collector, in the engine's thread, hands over what it gathers of a request in one piece when the
request ends; it neither waits, computes nor writes. The ring on disk is a feature cache whose
oldest segment gives way to the newest; a segment is one writer of the cache (`data.features`), so
that readers need not know of the ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark.data.features.encoder import Encoder
from dspark.data.features.manifest import MANIFEST, Coding, Manifest, Origin, SampleRecipe
from dspark.data.features.shards import index_path, shards_of, writers_of
from dspark.data.features.writer import CacheWriter
from dspark.data.samples import Sample
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.round_record import FloatArray, RoundRecord
from dspark.request import Request, Verifier
from dspark.scheduling.calibration import temperature_class
from dspark.serving.learning.directory import Outcome

FEWEST_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Harvest:
    """What a request brought.

    Attributes:
        sample: its tokens, as far as there are rows of them; None where they are too few.
        features_LF: features of these tokens; the last one's row is 0.
        hidden_LH: the target's states after the final norm, likewise.
        outcomes: of its rounds.
    """

    sample: Sample | None
    features_LF: Tensor
    hidden_LH: Tensor
    outcomes: tuple[Outcome, ...]


@dataclass
class _Gathering:
    """What has come of a request so far."""

    request: Request
    features: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    length: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    def cut(self, length: int) -> None:
        """Keep the first rows only."""
        if length >= self.length:
            return
        self.features = [torch.cat(self.features)[:length]] if length else []
        self.hidden = [torch.cat(self.hidden)[:length]] if length else []
        self.length = length


@dataclass(eq=False, repr=False)
class TrafficCollector:
    """Gathers the rows and outcomes of requests that may be learned from.

    Attributes:
        verifier: of the engine.
        num_drafts: drafts of a whole block, K.
        most: requests that are gathered at once; others are served and not learned from.
        deliver: told what each brought, in the engine's thread.
        features: whether features are wanted, or outcomes alone.
        generation: number of the drafter at work.
    """

    verifier: Verifier
    num_drafts: int
    most: int
    deliver: Callable[[Harvest], None]
    features: bool
    generation: int = 0
    _gathered: dict[int, _Gathering] = field(default_factory=dict)

    def admit(self, request: Request) -> Request:
        """The request, less its consent where there is no place, or its law is not the model's."""
        params = request.params
        other_law = params.has_penalties or params.logit_bias or request.mask
        if request.learn and (other_law or len(self._gathered) >= self.most):
            return replace(request, learn=False)
        return request

    def rows(
        self, request: ActiveRequest, start: int, features_LF: Tensor, hidden_LH: Tensor
    ) -> None:
        """Keep copies of rows that stay."""
        found = self._gathered.get(request.request_id)
        if found is None:
            if len(self._gathered) >= self.most:
                return
            found = self._gathered[request.request_id] = _Gathering(request.request)
        if not self.features or start > found.length:  # rows between are missing: it ends there
            return
        found.cut(start)
        found.features.append(features_LF.clone())
        found.hidden.append(hidden_LH.clone())
        found.length += len(features_LF)

    def note(self, record: RoundRecord) -> None:
        """Take note of a finished round's outcomes."""
        logits_RK = record.confidence_logits_RK
        if logits_RK is None or record.are_margins or record.parents is not None:
            return
        if not self._gathered or logits_RK.shape[1] != self.num_drafts:
            return
        for row, request_id in enumerate(record.request_ids[: len(logits_RK)]):
            found = self._gathered.get(request_id)
            if found is not None and record.lengths[row] and np.isfinite(logits_RK[row]).all():
                found.outcomes.append(self._outcome(found.request, record, row, logits_RK[row]))

    def _outcome(
        self, request: Request, record: RoundRecord, row: int, logits_K: FloatArray
    ) -> Outcome:
        return Outcome(
            logits_K=np.array(logits_K),
            accepted=record.accepted[row],
            verified=record.lengths[row],
            verifier="coupled" if request.reproducible else self.verifier,
            kind=temperature_class(request.params.temperature),
            generation=self.generation,
        )

    def ended(self, request: ActiveRequest) -> None:
        """Hand over what the request brought; nothing of one that ended with an error."""
        found = self._gathered.pop(request.request_id, None)
        if found is None or request.finish_reason == "error":
            return
        count = min(len(request.tokens), found.length + 1)
        prompt = len(request.request.prompt_ids)
        empty = torch.zeros(0, 0)
        if count - prompt < FEWEST_ANSWER_TOKENS:
            if found.outcomes:
                self.deliver(Harvest(None, empty, empty, tuple(found.outcomes)))
            return
        sample = Sample(tuple(request.tokens[:count]), tuple(i >= prompt for i in range(count)))
        found.cut(count - 1)
        features_LF, hidden_LH = (
            torch.cat([*part, part[0].new_zeros(1, part[0].shape[1])])
            for part in (found.features, found.hidden)
        )
        self.deliver(Harvest(sample, features_LF, hidden_LH, tuple(found.outcomes)))


SEGMENTS = 8
_MOST_WRITERS = 1000


class SampleRing:
    """Writes samples and their features, and keeps the latest ones.

    Args:
        directory: of the cache; created if absent.
        origin: of the rows.
        max_length: tokens of a sample at most.
        max_bytes: size of the ring at most.

    Raises:
        DataError: the directory holds another cache, or another process writes to it.
    """

    def __init__(self, directory: Path, origin: Origin, max_length: int, max_bytes: int) -> None:
        nothing = SampleRecipe("", ("traffic",), max_length, 1, 0, 0)
        manifest = Manifest(origin, nothing, Coding("bfloat16", 0.0, 0.0), None)
        if (directory / MANIFEST).is_file():
            Manifest.read(directory).refuse_other(manifest, directory)
        else:
            manifest.write(directory)
        self._directory = directory
        self._segment_bytes = max(max_bytes // SEGMENTS, 1)
        self._encoder = Encoder(manifest)
        self._drop_oldest()
        self._writer = self._open(self._by_age()[-1] if self._by_age() else 0)

    def add(self, sample: Sample, features_LF: Tensor, hidden_LH: Tensor) -> bool:
        """Append a sample; `commit` makes it durable.

        Returns:
            False if its rows are not finite, or it is too large for a segment.

        Raises:
            DataError: it cannot be written.
        """
        encoded = self._encoder.encode([sample], features_LF, hidden_LH)
        if not encoded.entries:
            return False
        entry = encoded.entries[0].result()
        if self._writer.add(entry):
            return True
        self._next()
        return self._writer.add(entry)

    def commit(self) -> None:
        """Make added samples durable.

        Raises:
            DataError: they cannot be written.
        """
        self._writer.commit()

    def close(self) -> None:
        """Commit and release the lock."""
        self._writer.close()
        self._encoder.close()

    @property
    def bytes(self) -> int:
        """Size of all segments."""
        paths = [
            path
            for writer in writers_of(self._directory)
            for path in (index_path(self._directory, writer), *self._shards(writer))
        ]
        return sum(path.stat().st_size for path in paths)

    def _open(self, writer: int) -> CacheWriter:
        return CacheWriter(self._directory, writer=writer, max_bytes=self._segment_bytes)

    def _next(self) -> None:
        """Begin a segment, in the place of the oldest one."""
        newest = self._writer.writer
        self._writer.close()
        self._writer = self._open((newest + 1) % _MOST_WRITERS)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        for writer in self._by_age()[:-SEGMENTS]:
            for path in (index_path(self._directory, writer), *self._shards(writer)):
                path.unlink(missing_ok=True)

    def _by_age(self) -> list[int]:
        """Numbers of the segments, the oldest first: numbers begin again at 0."""
        found = writers_of(self._directory)
        pairs = enumerate(itertools.pairwise(found), start=1)
        gap = next((place for place, (a, b) in pairs if b - a > SEGMENTS), 0)
        return [*found[gap:], *found[:gap]]

    def _shards(self, writer: int) -> list[Path]:
        return [path for _, path in shards_of(self._directory, writer)]
