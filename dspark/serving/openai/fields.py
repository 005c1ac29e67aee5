"""Request parameters that all completion routes share, and their translation for the engine.

The rule: a parameter acts, or it is refused by name. Those that can change no output here, such as
labels (`IGNORED`), are accepted and named in the header `Warning`. Unknown ones are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from dspark.params import MOST_LOGPROBS, MOST_SAMPLES, MOST_STOP_STRINGS, SamplingParams
from dspark.request import TokenMask
from dspark.serving.context import Context
from dspark.serving.openai.chat_template import encode
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.grammar import ANY_OBJECT, BannedTokens

IGNORED = (
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
)
"""Parameters that are accepted without effect."""
MOST_BAD_WORDS = 256
ALWAYS_LONG = 1 << 20
"""The size of work that may take long, however short its text: a grammar."""
MOST_NUMBER = (1 << 63) - 1

Count = Annotated[int, Field(ge=1, le=MOST_NUMBER)]
TokenId = Annotated[int, Field(ge=0, le=MOST_NUMBER)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A JSON object without unknown names, whose values are of their very types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Strict):
    """What a stream holds beside its pieces."""

    include_usage: bool | None = None


class JsonSchema(Strict):
    """A schema that the answer is to follow."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """What a JSON schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Strict):
    """What matches a regular expression as a whole (not of OpenAI)."""

    type: Literal["regex"]
    pattern: str


class GrammarFormat(Strict):
    """What a grammar in Lark's notation derives (not of OpenAI)."""

    type: Literal["grammar"]
    grammar: str


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class CommonFields(Strict):
    """What chat and text completions and responses all take.

    Attributes:
        model: the served model's name, or nothing.
        temperature: 0, the default, takes the most likely token.
        top_p, top_k, min_p: filters; 1, 0 and 0 are off. OpenAI has only the first.
        seed: names the randomness, and has the request verified by `coupled`; without one it is
            drawn.
        stream: server-sent events.
        store: true lets a server that learns (`dspark serve --learn`) learn from a completion;
            nothing else is stored, and of a response nothing at all.
        metadata, user, service_tier, safety_identifier, prompt_cache_key,
            prompt_cache_retention: without effect.
    """

    model: str | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_NUMBER)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-MOST_NUMBER - 1, le=MOST_NUMBER)] | None = None
    stream: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class SharedFields(CommonFields):
    """What chat and text completions both take.

    Attributes:
        max_tokens: new tokens at most; by default the server's limit.
        repetition_penalty: 1 is off (not of OpenAI).
        presence_penalty, frequency_penalty: 0 is off.
        logit_bias: token id, as a string, -> number added to its logit.
        stop: strings that end the answer.
        stop_token_ids: token ids that end the answer (not of OpenAI).
        ignore_eos: go on at the model's own end tokens (not of OpenAI).
        min_tokens: tokens before an end token or a stop string may end the answer (not of OpenAI).
        bad_words: words that the answer must not have, as the tokens that the tokenizer makes of
            them at the beginning of a text and after a space (not of OpenAI).
        truncate_prompt_tokens: keep so many tokens of the prompt, its last ones; -1 for as many as
            fit (not of OpenAI).
        n: answers.
        timeout_s: seconds after which the answer ends as it is (not of OpenAI).
        stream_options: whether a stream ends with the usage.
        response_format: what the answer must look like.
        prediction: without effect.
        skip_special_tokens, include_stop_str_in_output, use_beam_search: accepted with the only
            value that is supported.
    """

    max_tokens: Count | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOP_STRINGS)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_NUMBER)] | None = None
    bad_words: Annotated[list[str], Field(max_length=MOST_BAD_WORDS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MOST_NUMBER)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    timeout_s: Annotated[Number, Field(gt=0)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    prediction: dict[str, Any] | None = None
    skip_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None

    same_names: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "ignore_eos",
        "min_tokens",
        "n",
    )

    def learns(self, context: Context) -> bool:
        """Whether its client lets this server learn from it, and it does."""
        return self.store is True and context.service.learner is not None

    def ignored(self, context: Context) -> list[str]:
        """Parameters without effect that were given."""
        names = [name for name in IGNORED if getattr(self, name, None) is not None]
        idle = self.store is not None and not self.learns(context)
        return [*names, "store"] if idle else names

    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage.

        Raises:
            ApiError: stream options without a stream.
        """
        if self.stream_options is not None and not self.stream:
            sentence = "stream_options needs stream to be true; leave it out."
            raise ApiError(400, sentence, param="stream_options", code="invalid_combination")
        return bool(self.stream_options and self.stream_options.include_usage)

    def truncated(
        self, prompt_ids: tuple[int, ...], new_tokens: int, context: Context
    ) -> tuple[int, ...]:
        """The prompt, cut at its beginning to what `truncate_prompt_tokens` leaves.

        Args:
            prompt_ids: the prompt.
            new_tokens: at most, for which -1 leaves room.
            context: whose engine decodes it.

        Raises:
            ApiError: nothing is to be left.
        """
        most = self.truncate_prompt_tokens
        if most is None:
            return prompt_ids
        if most == 0:
            sentence = "truncate_prompt_tokens is 0, but must be -1 or at least 1."
            raise ApiError(422, sentence, param="truncate_prompt_tokens", code="invalid_value")
        if most < 0:
            most = max(context.service.engine.max_length - new_tokens, 1)
        return prompt_ids[-most:]

    def timeout(self, context: Context) -> float | None:
        """Seconds that the answer may take: the request's or the server's, whichever is less."""
        limits = (self.timeout_s, context.settings.request_timeout_s)
        return min((limit for limit in limits if limit is not None), default=None)

    def params(
        self, context: Context, *, logprobs: int | None, max_tokens: int | None
    ) -> SamplingParams:
        """The engine's parameters.

        Args:
            context: whose defaults hold.
            logprobs: how many most likely tokens are reported; None for no log-probabilities.
            max_tokens: new tokens at most; None for the server's default.

        Raises:
            UsageError: a value is outside its range.
            ApiError: a token id of the logit bias is no number.
        """
        values = {
            name: value for name in self.same_names if (value := getattr(self, name)) is not None
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=max_tokens or context.settings.default_max_tokens,
            top_k=max(self.top_k or 0, 0),
            logit_bias=_bias(self.logit_bias or {}),
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=self._seed(context),
            logprobs=logprobs,
            **values,
        )

    def _seed(self, context: Context) -> int:
        return next(context.seeds) if self.seed is None else self.seed


def _bias(given: dict[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) < 20):
            sentence = f"logit_bias has {token[:50]!r}, but token ids are integers from 0."
            raise ApiError(422, sentence, param="logit_bias", code="invalid_value")
    return {int(token): value for token, value in given.items()}


def check_logprobs(count: int | None, name: str) -> int | None:
    """Refuse more most likely tokens than the engine reports.

    Raises:
        ApiError: 422.
    """
    if count is not None and not 0 <= count <= MOST_LOGPROBS:
        sentence = f"{name} is {count}, but must be from 0 to {MOST_LOGPROBS}."
        raise ApiError(422, sentence, param=name, code="invalid_value")
    return count


async def mask_of(fields: SharedFields, context: Context) -> TokenMask | None:
    """The mask that a request's response format asks for; None for any text.

    Raises:
        RequestError: the package for it is missing, or it cannot be followed.
        ApiError: the answer could not end.
    """
    wanted, grammars = fields.response_format, context.grammars
    if isinstance(wanted, JsonObjectFormat):
        make = partial(grammars.json_schema, ANY_OBJECT)
    elif isinstance(wanted, JsonSchemaFormat):
        make = partial(grammars.json_schema, wanted.json_schema.schema_)
    elif isinstance(wanted, RegexFormat):
        make = partial(grammars.regex, wanted.pattern)
    elif isinstance(wanted, GrammarFormat):
        make = partial(grammars.lark, wanted.grammar)
    else:
        return None
    for name in ("ignore_eos", "min_tokens"):
        if getattr(fields, name):
            sentence = f"{name} and response_format exclude each other; leave one out."
            raise ApiError(400, sentence, param=name, code="invalid_combination")
    grammars.check_installed("response_format")
    return await context.prepare(make, ALWAYS_LONG)


def without_bad_words(
    fields: SharedFields, mask: TokenMask | None, context: Context
) -> TokenMask | None:
    """A mask that also holds a request to its `bad_words`.

    Raises:
        ApiError: a word is empty, or the model has no tokenizer.
    """
    if not fields.bad_words:
        return mask
    target = context.service.engine.target
    if target.tokenizer is None:
        sentence = "bad_words needs a tokenizer, and this model has none; leave it out."
        raise ApiError(400, sentence, param="bad_words", code="unsupported_value")
    banned = set[tuple[int, ...]]()
    for word in fields.bad_words:
        if not word.strip():
            sentence = "bad_words has an empty word; give at least one character."
            raise ApiError(422, sentence, param="bad_words", code="invalid_value")
        for text in (word.lstrip(), " " + word.lstrip()):
            banned.add(encode(target.tokenizer, text, special=False))
    return BannedTokens(sorted(banned), target.vocab_size, mask)


def warning(names: Sequence[str]) -> dict[str, str]:
    """The header that names parameters without effect; none where there are none."""
    if not names:
        return {}
    return {"warning": f'299 dspark "Ignored, without effect here: {", ".join(names)}"'}
