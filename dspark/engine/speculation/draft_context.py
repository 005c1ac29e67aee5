"""The drafter's context: rows of committed tokens, handed over when the drafter next needs them.

Nothing is computed for a request that ends before it drafts again, and rounds in which the
schedule drafts nothing cost what plain decoding costs, but for keeping the features.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch, Segment
from dspark.drafters.base import Drafter

_MOST_ROWS = 4096  # rows that may wait: 100 MB of features for a 4B target
_NEWEST = 0.1  # weight of the last flush in what one usually takes


@dataclass(slots=True)
class _Round:
    """Waiting rows of a round: the first ones of each segment, in its order.

    They are taken apart when they are written, which most rounds of plain decoding never are.
    """

    segments: Sequence[Segment]
    offsets: Sequence[int]
    lengths: list[int]
    next_tokens: list[int]
    features_TF: Tensor

    def first(self, table: BlockTable) -> int | None:
        """The segment with rows of this request, by its number."""
        for i, segment in enumerate(self.segments):
            if segment.table is table and i < len(self.lengths) and self.lengths[i]:
                return i
        return None

    def drop(self, segment: int) -> int:
        """Leave out a segment's rows; how many these were."""
        count, begin = self.lengths[segment], sum(self.lengths[:segment])
        del self.next_tokens[begin : begin + count]
        self.lengths[segment] = 0
        return count


@dataclass(slots=True)
class _Request:
    """Waiting rows of one request: `next_tokens` from position `start` on, and their features."""

    table: BlockTable
    start: int
    next_tokens: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


class DraftContext:
    """A drafter's cache, and the rows that are still to be written to it.

    A drafter whose row i needs token i + 1 keeps that row where row i + 1 of the target stands
    (`Drafter.reads_next_token`). Where a request takes over the pages of a prefix, the row of the
    prefix's last token is thus its own to write, and the feature for it is kept beside the page.

    Args:
        drafter: bound to its target.
        cache: its cache; rows stand where the target's rows stand, or one behind.
    """

    def __init__(self, drafter: Drafter, cache: PagedCache) -> None:
        self.drafter = drafter
        self.cache = cache
        self._waiting: list[_Round] = []
        self._count = 0
        self._last_features: Tensor | None = None  # [pages, F], of every page's last token
        self._usual_ms = dict[int, float]()  # of a flush after rounds with drafts, by their rows

    def hold(
        self,
        batch: RaggedBatch,
        lengths: Sequence[int],
        features_TF: Tensor,
        next_tokens: Sequence[int],
    ) -> None:
        """Keep the rows of committed tokens for the next `flush`.

        Args:
            batch: what the target has just read.
            lengths: how many rows of each segment stay, from its first on.
            features_TF: captured features of every row of the batch.
            next_tokens: the committed token after each row that stays, segment by segment.
        """
        kept = list(next_tokens)
        if not kept:
            return
        self._waiting.append(
            _Round(batch.segments, batch.offsets, list(lengths), kept, features_TF)
        )
        self._count += len(kept)
        if self.drafter.reads_next_token:
            self._keep_last_features(batch, lengths, features_TF)
        if self._count > _MOST_ROWS:
            self.flush()

    def join(self, table: BlockTable, tokens: Sequence[int], length: int) -> None:
        """Continue behind `length` tokens whose pages were filled by another request.

        Args:
            table: the pages, those of the prefix first.
            tokens: of the request; there are more than `length`.
            length: whole pages.
        """
        if not self.drafter.reads_next_token or self._last_features is None:
            return
        page = table.pages[length // table.page_size - 1]
        features_1F = self._last_features[page : page + 1].clone()
        row = Segment(table, length - 1, 1)
        self._waiting.append(_Round((row,), (0, 1), [1], [tokens[length]], features_1F))
        self._count += 1

    def copy_pages(self, pages: Sequence[int], to: Sequence[int]) -> None:
        """Copy pages that nothing is waiting for, and what is kept beside them."""
        self.cache.copy_pages(pages, to)
        if self._last_features is not None:
            self._last_features[list(to)] = self._last_features[list(pages)]

    def catch_up(self, usual: int) -> float:
        """Write what is waiting, before a draft.

        Args:
            usual: the most rows that a round with drafts leaves.

        Returns:
            Milliseconds that further rows took: what rounds without drafts had left. On an
            accelerator, which works beside, those of launching it.
        """
        started = time.perf_counter()
        rows = self.flush()
        took_ms = (time.perf_counter() - started) * 1e3
        usual_ms = self._usual_ms.get(usual)
        if rows <= usual:
            known = took_ms if usual_ms is None else usual_ms
            self._usual_ms[usual] = known + _NEWEST * (took_ms - known)
            return 0.0
        return max(took_ms - (took_ms * usual / rows if usual_ms is None else usual_ms), 0.0)

    def flush(self) -> int:
        """Write what is waiting; how many rows these are."""
        if not self._waiting:
            return 0
        # Rounds stand one after the other here, but a drafter reads request by request.
        by_request: dict[int, _Request] = {}
        for each in self._waiting:
            begin = 0
            for segment, offset, count in zip(
                each.segments, each.offsets, each.lengths, strict=False
            ):
                if count:
                    fresh = _Request(segment.table, segment.start)
                    mine = by_request.setdefault(id(segment.table), fresh)
                    mine.next_tokens += each.next_tokens[begin : begin + count]
                    mine.features.append(each.features_TF[offset : offset + count])
                    begin += count
        rows, self._waiting, self._count = self._count, [], 0
        waiting = by_request.values()
        parts = [(mine.table, mine.start, mine.next_tokens) for mine in waiting]
        batch = RaggedBatch.build(parts, self.cache.device)
        features = [rows_LF for mine in waiting for rows_LF in mine.features]
        features_TF = features[0] if len(features) == 1 else torch.cat(features)
        self.drafter.observe(self.cache, batch, features_TF, batch.input_ids_T)
        return rows

    def forget(self, table: BlockTable) -> int | None:
        """Drop what is waiting for a request that gives its pages back.

        Returns:
            How many rows of it were written: those before the first that waited; None for all.
        """
        written: int | None = None
        kept = list[_Round]()
        for each in self._waiting:
            segment = each.first(table)
            if segment is not None:
                written = each.segments[segment].start if written is None else written
                self._count -= each.drop(segment)
            if each.next_tokens:
                kept.append(each)
        self._waiting = kept
        return written

    def hand_over(self, drafter: Drafter) -> None:
        """Belong to another drafter of the same shape; no row of the old one may be read again."""
        self.drafter = drafter
        self._waiting, self._count = [], 0

    def clear(self, table: BlockTable, begin: int) -> None:
        """Zero a request's rows from position `begin` on, where they may be no numbers."""
        self.cache.clear(table.rows(begin + self.drafter.reads_next_token, table.capacity))

    def _keep_last_features(
        self, batch: RaggedBatch, lengths: Sequence[int], features_TF: Tensor
    ) -> None:
        if self._last_features is None:
            shape = (self.cache.pages, features_TF.shape[1])
            self._last_features = features_TF.new_zeros(shape)
        rows, pages = list[int](), list[int]()
        for segment, offset, count in zip(batch.segments, batch.offsets, lengths, strict=False):
            size = segment.table.page_size
            first = (segment.start // size + 1) * size - 1
            for position in range(first, segment.start + count, size):
                rows.append(offset + position - segment.start)
                pages.append(segment.table.pages[position // size])
        if rows:
            self._last_features[torch.tensor(pages, device=features_TF.device)] = features_TF[
                torch.tensor(rows, device=features_TF.device)
            ]
