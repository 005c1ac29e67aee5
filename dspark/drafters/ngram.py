"""Prompt lookup: propose what followed the last n tokens where they stood before.

No model at all: the longest suffix of the request's own tokens, of at most `max_ngram` tokens,
that occurs earlier; of several places the latest (Saxena 2023, prompt lookup decoding).

Its confidence is the share of one-token lookups that were right over the last tokens, with the
length of the match as prior: a function of the request's committed tokens alone, so nothing
outlives a request and neighbours in a batch do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.attention.paged_cache import CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import BorrowedParts, DraftBatch, DrafterKind, Draw, Proposal
from dspark.errors import CompatibilityError, UsageError

# The last tokens whose lookups tell how this request is going, and how many such lookups the
# length of the present match counts for.
_WINDOW_TOKENS = 16
_PRIOR_LOOKUPS = 2


class NgramDrafter:
    """A drafter without parameters, taps or cache.

    Its distribution is one-hot: it hands `draw` the logit of the proposed token alone.
    Every processor of the engine (temperature, penalties, finite biases, filters) leaves that
    distribution as it is, so verification sees the very q that was drawn from. A request without a
    match proposes nothing (`Proposal.lengths` is 0 there).

    Args:
        block_size: most tokens of a round.
        max_ngram: longest suffix to look for, in tokens.
        min_ngram: shortest.

    Raises:
        UsageError: not 1 <= min_ngram <= max_ngram, or block_size below 1.
    """

    def __init__(self, block_size: int = 7, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if block_size < 1 or not 1 <= min_ngram <= max_ngram:
            raise UsageError(
                f"block_size {block_size}, min_ngram {min_ngram} and max_ngram {max_ngram} must "
                "satisfy block_size >= 1 and 1 <= min_ngram <= max_ngram."
            )
        self.block_size = block_size
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.taps: tuple[int, ...] = ()
        self.context_shapes: tuple[CacheShape, ...] = ()
        self.reads_next_token = False
        self.rows_ahead = 0
        self._bound = False

    def bind(self, parts: BorrowedParts) -> None:  # noqa: ARG002
        """Nothing to borrow: it proposes tokens that it has seen."""
        self._bound = True

    def observe(
        self, context: PagedCache, batch: RaggedBatch, features_TF: Tensor, next_tokens_T: Tensor
    ) -> None:
        """Nothing to keep: the tokens come with every batch."""

    def propose(
        self,
        context: PagedCache,  # noqa: ARG002
        batch: DraftBatch,
        draw: Draw,
    ) -> Proposal:
        """Look every request's suffix up and draw the tokens that followed it.

        Raises:
            CompatibilityError: the drafter is not bound.
        """
        if not self._bound:
            raise CompatibilityError("The n-gram drafter is not bound; call bind(target.parts()).")
        matches = [self._match(tokens) for tokens in batch.tokens]
        drafts = [
            _copy(tokens, lag, batch.num_drafts)
            for tokens, (lag, _) in zip(batch.tokens, matches, strict=True)
        ]
        lengths = tuple(len(draft) for draft in drafts)
        for step in range(max(lengths, default=0)):
            # A row past its request's end needs some distribution; its draw is ignored.
            proposed_R1 = batch.anchors_R.new_tensor(
                [draft[step] if step < len(draft) else 0 for draft in drafts]
            ).unsqueeze(1)
            draw(step, torch.zeros_like(proposed_R1, dtype=torch.float32), proposed_R1)
        if not batch.confidences:
            return Proposal(lengths=lengths)
        confidences_R = batch.anchors_R.new_tensor(
            [
                self.confidence_logit(tokens, length) if length else -math.inf
                for tokens, (_, length) in zip(batch.tokens, matches, strict=True)
            ],
            dtype=torch.float32,
        )
        return Proposal(confidences_R[:, None].expand(-1, max(lengths, default=0)), lengths=lengths)

    def lookup(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` tokens proposed after `tokens`; empty without a match.

        A match `lag` tokens back is continued by copying at that lag, so that a match near the
        end repeats its period.
        """
        return _copy(tokens, self._match(tokens)[0], count)

    def confidence_logit(self, tokens: Sequence[int], length: int) -> float:
        """Log-odds that a token copied after a match of `length` tokens is right, uncalibrated.

        (h + 2 m / (m + 1)) / (n + 2) for a match of m tokens, where h of the n lookups of the
        window's tokens that found a match named the token that came.

        Args:
            tokens: the request's committed tokens.
            length: tokens of the present match, at least 1.
        """
        hits, lookups = 0, 0
        for at in range(max(len(tokens) - _WINDOW_TOKENS, 1), len(tokens)):
            lag, _ = self._match(tokens, at)
            lookups += lag > 0
            hits += lag > 0 and tokens[at - lag] == tokens[at]
        right = hits + _PRIOR_LOOKUPS * length / (length + 1)
        return math.log(right / (lookups + _PRIOR_LOOKUPS - right))

    def _match(self, tokens: Sequence[int], count: int | None = None) -> tuple[int, int]:
        """Where the suffix of the first `count` tokens (all by default) stood before.

        Returns:
            How far back its longest, then latest, earlier copy ends, and the copy's length in
            tokens; zeros for none.
        """
        last, best, best_length = (count or len(tokens)) - 1, 0, self.min_ngram - 1
        for end in range(last - 1, -1, -1):
            if tokens[end] != tokens[last]:
                continue
            length = 1
            longest = min(self.max_ngram, end + 1)
            while length < longest and tokens[end - length] == tokens[last - length]:
                length += 1
            if length > best_length:
                best, best_length = last - end, length
                if length == self.max_ngram:
                    break
        return best, best_length if best else 0


def _copy(tokens: Sequence[int], lag: int, count: int) -> list[int]:
    """`count` tokens, each the one `lag` tokens before it; none for lag 0."""
    draft: list[int] = []
    for i in range(count if lag else 0):
        draft.append(draft[i - lag] if i >= lag else tokens[len(tokens) - lag + i])
    return draft


KIND = DrafterKind(create=NgramDrafter)
