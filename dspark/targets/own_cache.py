"""Models that keep more than keys and values: each request runs through the model's own cache.

Recurrent, hybrid and compressed-attention layers hold a state that paged keys and values cannot
express, and that cannot be cut to a prefix. So a request's state is saved before its drafts are
verified; where some are rejected, the kept prefix is replayed from there. Requests take turns:
outputs are exact, and slower than a ragged forward of them all.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import CompatibilityError, NumericsError
from dspark.targets.families import Anatomy
from dspark.targets.forward import apply_head, tapped
from dspark.targets.probe import relative_distance

# Under which names the decoders of transformers take their cache, and give it back.
_NAMES = ("past_key_values", "cache_params")
_EXACT, _SHORT = 1e-4, 0.05
_PROBE, _CUT = 24, 13


@dataclass
class RequestState:
    """A request's state.

    Attributes:
        tokens: those that `live` has read.
        live: the model's cache; None before the first token.
        saved: a copy from before the last tokens; None where there is none.
        saved_at: how many tokens that one has read.
    """

    tokens: list[int] = field(default_factory=list)
    live: Any = None
    saved: Any = None
    saved_at: int = 0


class StateCache(PagedCache):
    """Pages without rows, for the engine's book-keeping, and the states of who holds them."""

    def __init__(
        self, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Start without any request."""
        super().__init__((), pages, page_size, dtype, device)
        self.states: WeakKeyDictionary[BlockTable, RequestState] = WeakKeyDictionary()


class OwnCacheRunner:
    """Runs the segments of a batch one after the other.

    Args:
        model: of transformers.
        anatomy: its parts.

    Attributes:
        chunks: whether the model reads several tokens behind a state at once. Where it does not,
            as where a recurrent kernel starts anew with each chunk, it reads them one by one.

    Raises:
        CompatibilityError: the model's own cache does not give the logits of its whole forward.
        NumericsError: the model computes NaN or infinite logits.
    """

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        taken = inspect.signature(anatomy.decoder.forward).parameters
        names = [name for name in _NAMES if name in taken]
        if not names:
            raise CompatibilityError(
                f"{anatomy.architecture} is not supported as a target: it has no cache of a name "
                f"that is known ({', '.join(_NAMES)}); use another target."
            )
        self._name = names[0]
        self.chunks = True
        self._probe(model)

    def run(
        self, batch: RaggedBatch, cache: PagedCache | None, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Normed hidden states [T, H] of a batch, and its features [T, F] if any are wanted.

        Args:
            batch: its segments follow on what their states have read, or on less of it.
            cache: holds the states; None runs whole sequences and keeps nothing.
            taps: as `Target.forward`.
        """
        hidden, features = [], []
        tokens = batch.input_ids_T.tolist()
        for segment, begin, end in zip(
            batch.segments, batch.offsets[:-1], batch.offsets[1:], strict=True
        ):
            if begin == end:
                continue
            state = RequestState()
            if isinstance(cache, StateCache):
                state = cache.states.setdefault(segment.table, state)
            self._rewind(state, segment.start)
            hidden_TH, features_TF = self._read(state, tokens[begin:end], taps)
            hidden.append(hidden_TH)
            features.append(features_TF)
        if not hidden:
            width = self._anatomy.embedding.embedding_dim
            empty = self._anatomy.embedding.weight.new_empty(0, width)
            return empty, empty.new_empty(0, width * len(taps)) if taps else None
        return torch.cat(hidden), torch.cat(features) if taps else None

    def _rewind(self, state: RequestState, start: int) -> None:
        """Have a state that has read the first `start` tokens."""
        assert start <= len(state.tokens), "a request's tokens follow on one another"
        if start == len(state.tokens):
            return
        tokens = state.tokens[:start]
        if state.saved is not None and state.saved_at <= start:
            state.live, state.tokens = state.saved, tokens[: state.saved_at]
        else:
            state.live, state.tokens = None, []
        state.saved = None
        rest = tokens[len(state.tokens) :]
        if rest:
            self._advance(state, rest)

    def _read(
        self, state: RequestState, tokens: list[int], taps: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        state.saved = None
        if state.tokens and len(tokens) > 1:  # the first of them stays, the others are drafts
            state.saved, state.saved_at = copy.deepcopy(state.live), len(state.tokens)
        if not taps:
            hidden_TH = self._advance(state, tokens)
            return hidden_TH, hidden_TH
        steps: list[Tensor] = []
        with tapped(self._anatomy, taps) as taken:
            hidden_TH = self._advance(
                state, tokens, lambda: steps.append(torch.cat([taken[tap] for tap in taps], -1))
            )
        features_TF = torch.cat(steps)
        if features_TF.dim() != 2:
            raise CompatibilityError(
                f"{self._anatomy.architecture} passes several streams between its layers, of which "
                "it is not declared what a drafter reads (targets/families.py); use one that reads "
                "no features, such as ngram."
            )
        return hidden_TH, features_TF

    def _advance(self, state: RequestState, tokens: list[int], then: Any = None) -> Tensor:
        """Read tokens; normed hidden states [T, H]. `then` is called after every forward."""
        whole = self.chunks or not state.tokens
        parts = [tokens] if whole else [[token] for token in tokens]
        device, hidden = self._anatomy.embedding.weight.device, []
        for part in parts:
            out = self._anatomy.decoder(
                input_ids=torch.tensor([part], device=device),
                use_cache=True,
                **({self._name: state.live} if state.live is not None else {}),
            )
            state.live = getattr(out, self._name)
            state.tokens += part
            hidden.append(out.last_hidden_state[0])
            if then is not None:
                then()
        return torch.cat(hidden)

    @torch.no_grad()
    def _probe(self, model: Any) -> None:
        """Compare a sequence in pieces, drafts rejected among them, with the whole forward."""
        vocab = self._anatomy.embedding.num_embeddings
        tokens = [(11 + 17 * i) % vocab for i in range(_PROBE)]
        device = self._anatomy.embedding.weight.device
        ids_1T = torch.tensor([tokens], device=device)
        expected_TV = model(input_ids=ids_1T, use_cache=False).logits[0]
        if not bool(expected_TV.isfinite().all()):
            raise NumericsError(
                f"{self._anatomy.architecture} computes logits that are not finite in "
                f"{self._anatomy.embedding.weight.dtype}; use another dtype or check the weights."
            )
        exact = self._anatomy.embedding.weight.dtype == torch.float32
        found = []
        for chunks in (True, False):
            self.chunks = chunks
            distance = relative_distance(self._in_pieces(tokens), expected_TV)
            if distance <= (_EXACT if exact else _SHORT):
                return
            found.append(distance)
        raise CompatibilityError(
            f"{self._anatomy.architecture} is not supported as a target: with its own cache, fed "
            f"in pieces, its logits differ from its whole forward's (by {min(found):.2g} of them); "
            "use another target."
        )

    def _in_pieces(self, tokens: list[int]) -> Tensor:
        state, wrong = RequestState(), [(token + 1) % 3 for token in tokens[_CUT:]]
        try:
            pieces = [self._read(state, tokens[:_CUT], ())[0]]
            # Of these all but the first are rejected.
            pieces.append(self._read(state, [tokens[_CUT], *wrong], ())[0][:1])
            self._rewind(state, _CUT + 1)
            pieces.append(self._read(state, tokens[_CUT + 1 :], ())[0])
        except (RuntimeError, ValueError, IndexError, TypeError):
            if not self.chunks:
                raise
            return torch.full((1, 1), torch.nan)  # whoever cannot read chunks may say so
        return apply_head(self._anatomy, torch.cat(pieces))
