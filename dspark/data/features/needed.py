"""Which of the target's rows training can use; the others are not stored.

A context row is seen by anchors behind it, and the last anchor is the token before the last
supervised one. A teacher row stands before a supervised token, whose law it gives. Both hold for
block drafters (FORMAT_FACTS.md B.1) as for chains (B.3), whose row i predicts token i + 2.
"""

from __future__ import annotations

from dspark.data.samples import Sample


def num_context_rows(sample: Sample) -> int:
    """How many rows, from the first on, a drafter may see: those before the last anchor."""
    supervised = [i for i, counts in enumerate(sample.loss_mask) if counts]
    return max(supervised[-1] - 1, 0) if supervised else 0


def teacher_rows(sample: Sample) -> list[int]:
    """Ascending: the rows whose next token is supervised."""
    return [i - 1 for i, counts in enumerate(sample.loss_mask) if counts and i > 0]
