"""Masks of constrained requests: every row sees the mask of its own prefix, each asked for once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.engine.requests.sequence import ActiveRequest
from dspark.errors import DSparkError, RequestError
from dspark.request import TokenMask


@dataclass(frozen=True)
class RowMasks:
    """What one round asks the masks of R requests.

    A draft row and the verified row of the same prefix get the same answer: it is remembered.

    Attributes:
        masks: of each request; None allows everything.
        outputs: committed output tokens of each request.
        end_ids: tokens that end each request; nothing is asked about what follows them.
        vocab_size: V.
        device: where the masks go.
    """

    masks: tuple[TokenMask | None, ...]
    outputs: tuple[tuple[int, ...], ...]
    end_ids: tuple[frozenset[int], ...]
    vocab_size: int
    device: torch.device
    _known: dict[tuple[int, tuple[int, ...]], Tensor | RequestError] = field(default_factory=dict)

    @classmethod
    def of(
        cls, requests: Sequence[ActiveRequest], vocab_size: int, device: torch.device
    ) -> RowMasks | None:
        """The masks of these requests, where they now stand; None if no request has one."""
        masks = tuple(_mask_of(r, vocab_size) for r in requests)
        if all(mask is None for mask in masks):
            return None
        return cls(
            masks,
            tuple(
                tuple(r.output_ids) if mask is not None else ()
                for r, mask in zip(requests, masks, strict=True)
            ),
            tuple(r.end_ids for r in requests),
            vocab_size,
            device,
        )

    def first(self, count: int) -> RowMasks:
        """The masks of the first `count` requests, with the same memory."""
        return replace(
            self,
            masks=self.masks[:count],
            outputs=self.outputs[:count],
            end_ids=self.end_ids[:count],
        )

    def rows(
        self, prefixes: Sequence[tuple[int, tuple[int, ...] | None]]
    ) -> tuple[Tensor, dict[int, DSparkError]]:
        """The masks of ragged rows.

        Args:
            prefixes: per row its request and the drafts before it; None allows everything.

        Returns:
            (bool [N, V], what is wrong with the rows that have no usable mask; there, everything
            is allowed).
        """
        answers = [self._answer(request, drafted) for request, drafted in prefixes]
        faults: dict[int, DSparkError] = {
            row: answer for row, answer in enumerate(answers) if isinstance(answer, RequestError)
        }
        every_V = torch.ones(self.vocab_size, dtype=torch.bool)
        rows = [answer if isinstance(answer, Tensor) else every_V for answer in answers]
        return torch.stack(rows).to(self.device), faults

    def _answer(
        self, request: int, drafted: tuple[int, ...] | None
    ) -> Tensor | RequestError | None:
        mask = self.masks[request]
        if mask is None or drafted is None or not self.end_ids[request].isdisjoint(drafted):
            return None
        key = (request, drafted)
        if key not in self._known:
            self._known[key] = _ask(mask, self.outputs[request] + drafted, self.vocab_size)
        return self._known[key]


@dataclass(frozen=True)
class MinTokensMask:
    """Bans a request's end tokens until it has so many tokens of output: a `TokenMask`.

    Attributes:
        min_tokens: tokens before the first that may be an end token.
        end_ids: what is banned.
        vocab_size: V.
        other: the request's own mask, which holds too.
    """

    min_tokens: int
    end_ids: frozenset[int]
    vocab_size: int
    other: TokenMask | None = None

    def allowed(self, output_ids: Sequence[int], /) -> npt.NDArray[np.bool_]:
        """Which tokens may follow, bool [V]."""
        allowed_V = np.ones(self.vocab_size, dtype=np.bool_)
        if self.other is not None:
            allowed_V = np.array(self.other.allowed(output_ids), dtype=np.bool_)
        if len(output_ids) < self.min_tokens:
            allowed_V[sorted(self.end_ids)] = False
        return allowed_V


def _mask_of(request: ActiveRequest, vocab_size: int) -> TokenMask | None:
    """The mask of a request where it now stands."""
    own, least = request.request.mask, request.request.params.min_tokens
    if len(request.output_ids) >= least:
        return own
    known = frozenset(token for token in request.end_ids if token < vocab_size)
    return MinTokensMask(least, known, vocab_size, own)


def _ask(mask: TokenMask, output_ids: tuple[int, ...], vocab_size: int) -> Tensor | RequestError:
    where = f"after {len(output_ids)} tokens of output"
    try:
        allowed_V = np.array(mask.allowed(output_ids), dtype=bool)
    except Exception as error:  # whatever a user's mask raises concerns this request alone
        fault = RequestError(f"The mask raised {type(error).__name__} {where}: {error}")
        fault.__cause__ = error
        return fault
    if allowed_V.shape != (vocab_size,):
        return RequestError(
            f"The mask's answer has shape {allowed_V.shape} {where}, but must be one truth value "
            f"for each of the {vocab_size} tokens of the vocabulary."
        )
    if not allowed_V.any():
        return RequestError(
            f"The mask allows no token {where}; let it allow one at least, such as an end token."
        )
    return torch.from_numpy(allowed_V)
