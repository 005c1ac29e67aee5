"""How the tokens of a request are drawn: the parameters, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from dspark.errors import UsageError

MOST_SAMPLES = 128
MOST_LOGPROBS = 20
MOST_STOP_STRINGS = 64
MOST_STOP_CHARACTERS = 1 << 16  # of all stop strings of a request together
_INT64 = 1 << 63


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    Processors act in this order: penalties, logit bias, the request's mask, temperature, top-k,
    top-p, min-p.

    Attributes:
        max_new_tokens: limit on generated tokens.
        temperature: 0 takes the argmax; above 0 divides the logits.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every token of
            prompt and output (Keskar et al. 2019); 1 does nothing.
        presence_penalty: subtracted once from the logits of every token of the output.
        frequency_penalty: subtracted from a token's logit once per occurrence in the output.
        logit_bias: token id -> number added to its logit; minus infinity bans it.
        stop: strings that end the output; the string itself is not part of the output. At most 64,
            of 65,536 characters together.
        stop_token_ids: token ids that end the output, beside the model's own.
        ignore_eos: do not end at the model's own end tokens.
        seed: names this request's randomness, within int64.
        n: answers to the same prompt, each of its own randomness, at most 128; at temperature 0
            they are all the same.
        logprobs: report each token's log-probability, and those of this many most likely tokens
            in its place, 0 to 20; None reports nothing. Taken from the model's raw logits.
        min_tokens: tokens to generate before an end token may be drawn, or a stop string ends the
            output; at most `max_new_tokens`.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            UsageError: a value is outside its range, or not of its kind.
        """
        self._check_integers()
        self._check_numbers()
        _need(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        _check_stop(self.stop)
        _need(
            _is_list(self.stop_token_ids) and all(map(is_token, self.stop_token_ids)),
            "stop_token_ids",
            self.stop_token_ids,
            "token ids, integers from 0",
        )
        _check_bias(self.logit_bias)

    def _check_integers(self) -> None:
        for name, low, high, remedy in (
            ("max_new_tokens", 1, None, "an integer of at least 1"),
            ("min_tokens", 0, self.max_new_tokens, "an integer from 0 to max_new_tokens"),
            ("top_k", 0, None, "0 (off) or a positive integer"),
            ("seed", -_INT64, _INT64 - 1, "an integer from -2^63 to 2^63 - 1"),
            ("n", 1, MOST_SAMPLES, f"an integer from 1 to {MOST_SAMPLES}"),
            ("logprobs", 0, MOST_LOGPROBS, f"None or an integer from 0 to {MOST_LOGPROBS}"),
        ):
            value = getattr(self, name)
            if name == "logprobs" and value is None:
                continue
            holds = is_integer(value) and value >= low and (high is None or value <= high)
            _need(holds, name, value, remedy)

    def _check_numbers(self) -> None:
        for name, remedy, holds in (
            ("temperature", "0 or a positive number", lambda value: value >= 0),
            ("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1),
            ("min_p", "between 0 and 1", lambda value: 0 <= value <= 1),
            ("repetition_penalty", "a positive number", lambda value: value > 0),
            ("presence_penalty", "a finite number", math.isfinite),
            ("frequency_penalty", "a finite number", math.isfinite),
        ):
            value = getattr(self, name)
            _need(_is_number(value) and math.isfinite(value) and holds(value), name, value, remedy)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping of field names to values.

        Raises:
            UsageError: a name is no field, or a value is outside its range.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(f"There is no option {name!r}; sampling has {', '.join(known)}.")
        values = dict(options)
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        return cls(**values)

    def with_seed(self, seed: int) -> SamplingParams:
        """The same parameters with another seed."""
        return self if seed == self.seed else replace(self, seed=seed)

    def sample(self, index: int) -> SamplingParams:
        """The parameters of answer `index` alone, with its own seed."""
        if self.n == 1 and index == 0:
            return self
        return replace(self, n=1, seed=sample_seed(self.seed, index))

    @property
    def has_penalties(self) -> bool:
        """Whether a distribution depends on the tokens before it beyond the model itself."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def has_filters(self) -> bool:
        """Whether tokens are cut off: top-k, top-p or min-p."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def sample_seed(seed: int, index: int) -> int:
    """The seed of answer `index` to one prompt: the seed itself for the first, else a hash of both.

    Output `index` of the splitmix64 generator (Steele, Lea & Flood 2014) that starts at a hash of
    the seed, so that neighbouring seeds and answers share nothing.
    """
    if index == 0:
        return seed
    state = _mix((seed ^ 0x5851F42D4C957F2D) % (1 << 64))
    mixed = _mix((state + index * 0x9E3779B97F4A7C15) % (1 << 64))
    return (mixed + _INT64) % (1 << 64) - _INT64


def _mix(bits: int) -> int:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return bits ^ (bits >> 31)


def is_integer(value: object) -> bool:
    """Whether a value is an integer, truth values not counted."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_token(value: object) -> bool:
    """Whether a value could be a token id."""
    return is_integer(value) and value >= 0  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _need(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {_shown(value)}, but must be {remedy}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_stop(stop: tuple[str, ...]) -> None:
    holds = _is_list(stop) and all(isinstance(each, str) and each for each in stop)
    _need(holds, "stop", stop, "a tuple of strings, none of them empty")
    characters = sum(map(len, stop))
    if len(stop) > MOST_STOP_STRINGS or characters > MOST_STOP_CHARACTERS:
        raise UsageError(
            f"stop has {len(stop)} strings of {characters} characters together, but may have "
            f"{MOST_STOP_STRINGS} strings of {MOST_STOP_CHARACTERS} characters; give fewer."
        )


def _check_bias(bias: Mapping[int, float]) -> None:
    _need(isinstance(bias, Mapping), "logit_bias", bias, "a mapping of token ids to numbers")
    for token, value in bias.items():
        if not is_token(token) or not _is_number(value) or not value < math.inf:
            raise UsageError(
                f"logit_bias has {token!r}: {value!r}, but token ids are integers from 0 and "
                "values must be finite or minus infinity."
            )
