"""Constrained answers: JSON schemas, regular expressions and grammars as masks of the engine.

By llguidance, which comes with the extra `json`.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark.engine.requests.prompt import check_text
from dspark.errors import RequestError
from dspark.request import TokenMask
from dspark.targets.target import Target

MISSING = (
    "Constrained answers need the package llguidance, which is not installed here; install the "
    "extra dspark[json], or leave {parameter} out."
)
ANY_OBJECT = {"type": "object"}
# A model that may write white space for ever sometimes does.
WHITE_SPACE = r"[ \n]{0,2}"


class GrammarMask:
    """Allows what a grammar allows after the output so far: a `TokenMask`.

    The matcher goes back and forth between neighbouring prefixes, which is how a round asks: for
    the committed output, and for that with one, two, ... drafts behind it.

    Args:
        matcher: an llguidance matcher at the beginning.
        vocab_size: V.
        end_ids: the model's end tokens, all of which end the answer where it may end.
    """

    def __init__(self, matcher: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._consumed: tuple[int, ...] = ()

    def allowed(self, output_ids: Sequence[int], /) -> npt.NDArray[np.bool_]:
        """Which tokens may follow, bool [V].

        Raises:
            RequestError: the output has left the grammar, or it outgrew the matcher's limits.
        """
        self._move_to(tuple(output_ids))
        allowed_V = np.zeros(self._vocab_size, dtype=np.bool_)
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            known_V = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
            allowed_V[: len(known_V)] = known_V
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:200].rstrip(".")
            raise RequestError(f"The grammar failed: {reason}.")
        may_end = self._matcher.is_stopped() or self._matcher.is_accepting()
        allowed_V[self._end_ids] = may_end
        return allowed_V

    def _move_to(self, output_ids: tuple[int, ...]) -> None:
        pairs = enumerate(zip(self._consumed, output_ids, strict=False))
        both = min(len(self._consumed), len(output_ids))
        shared = next((i for i, (a, b) in pairs if a != b), both)
        back = len(self._consumed) - shared
        if back and not self._matcher.rollback(back):
            self._matcher.reset()
            shared = 0
        rest = list(output_ids[shared:])
        taken = self._matcher.try_consume_tokens(rest)
        self._consumed = output_ids[: shared + taken]
        if taken != len(rest):
            raise RequestError("The output has left the grammar that it was to follow.")


class BannedTokens:
    """Bans the last token of each of some sequences where the others stand before it.

    A `TokenMask`.

    Args:
        sequences: of token ids, none empty.
        vocab_size: V.
        other: a mask that holds too.
    """

    def __init__(
        self, sequences: Sequence[tuple[int, ...]], vocab_size: int, other: TokenMask | None = None
    ) -> None:
        self._sequences = tuple(sequences)
        self._vocab_size = vocab_size
        self._other = other

    def allowed(self, output_ids: Sequence[int], /) -> npt.NDArray[np.bool_]:
        """Which tokens may follow, bool [V]."""
        allowed_V = np.ones(self._vocab_size, dtype=np.bool_)
        if self._other is not None:
            allowed_V = np.array(self._other.allowed(output_ids), dtype=np.bool_)
        for *before, last in self._sequences:
            if list(output_ids[len(output_ids) - len(before) :]) == before:
                allowed_V[last] = False
        return allowed_V


class Grammars:
    """Makes masks for a target; its tokenizer is read once, at the first.

    Args:
        target: whose answers are to be constrained.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def json_schema(self, schema: Mapping[str, Any] | bool) -> GrammarMask:
        """A mask for answers that a JSON schema describes.

        Raises:
            RequestError: llguidance is missing, or cannot follow the schema.
        """
        from llguidance import LLMatcher

        return self._mask(
            LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": WHITE_SPACE}
            )
        )

    def regex(self, pattern: str) -> GrammarMask:
        """A mask for answers that match a regular expression as a whole.

        Raises:
            RequestError: as `json_schema`.
        """
        from llguidance import LLMatcher

        check_text(pattern)
        return self._mask(LLMatcher.grammar_from_regex(pattern))

    def lark(self, grammar: str, *, what: str = "response format") -> GrammarMask:
        """A mask for answers of a context-free grammar in Lark's notation.

        Args:
            grammar: in which `%json` introduces a JSON schema.
            what: it was made from, for errors.

        Raises:
            RequestError: as `json_schema`.
        """
        from llguidance import LLMatcher

        check_text(grammar)
        return self._mask(LLMatcher.grammar_from_lark(grammar), what)

    def check_installed(self, parameter: str) -> None:
        """Refuse where the extra is missing.

        Args:
            parameter: what asks for it.

        Raises:
            RequestError: it is, or the model has no tokenizer.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise RequestError(MISSING.format(parameter=parameter))
        if self._target.tokenizer is None:
            raise RequestError("Constrained answers need a tokenizer, and this model has none.")

    def _mask(self, grammar: str, what: str = "response format") -> GrammarMask:
        from llguidance import LLMatcher

        check_text(grammar)
        ends = self._target.eos_token_ids
        matcher = LLMatcher(self._tokens(ends), grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300].rstrip(".")
            raise RequestError(f"The {what} cannot be followed: {reason}.")
        return GrammarMask(matcher, self._target.vocab_size, ends)

    def _tokens(self, ends: frozenset[int]) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._tokenizer is None:
                if not ends:
                    raise RequestError(
                        "A constrained answer ends with the model's end token, and this model has "
                        "none."
                    )
                self._tokenizer = from_tokenizer(self._target.tokenizer, eos_token=sorted(ends))
            return self._tokenizer
