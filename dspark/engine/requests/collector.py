"""Collector: what the engine hands to who learns from its traffic."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dspark.engine.requests.sequence import ActiveRequest


class Collector(Protocol):
    """Is told about requests that may be learned from (`Request.learn`), in the engine's thread."""

    def rows(
        self, request: ActiveRequest, start: int, features_LF: Tensor, hidden_LH: Tensor
    ) -> None:
        """Take note of rows that stay, the captured features and the states after the final norm.

        They are views that the next round may overwrite. A request that is read again begins again
        at position 0.

        Args:
            request: whose; its tokens are not yet committed.
            start: position of the first row.
            features_LF: features of the drafter's layers.
            hidden_LH: the target's states, whose logits the head gives.
        """
        ...

    def ended(self, request: ActiveRequest) -> None:
        """Take note that a request has ended, whatever the reason."""
        ...
