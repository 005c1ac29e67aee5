"""`/v1/completions`: raw prompts, as text or as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from dspark.engine.requests.sequence import Piece
from dspark.params import MOST_SAMPLES, sample_seed
from dspark.request import Logprob, Output, Request, SamplingParams
from dspark.serving.context import Context, Its
from dspark.serving.openai.chat_template import encode
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import (
    MOST_NUMBER,
    SharedFields,
    TokenId,
    check_logprobs,
    mask_of,
    warning,
    without_bad_words,
)
from dspark.serving.openai.output_parser import TokenTexts, text_logprobs
from dspark.serving.openai.streaming import Choice, CompletionFraming, Job, reply

router = APIRouter(tags=["completions"])
Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompt = (
    str
    | Ids
    | Annotated[list[str], Field(min_length=1, max_length=MOST_SAMPLES)]
    | Annotated[list[Ids], Field(min_length=1, max_length=MOST_SAMPLES)]
)


class CompletionFields(SharedFields):
    """The body of a text completion.

    Attributes:
        prompt: a text, token ids, or several of one kind; answer j to prompt i has the index
            i n + j.
        logprobs: report log-probabilities, with those of so many most likely tokens.
        best_of: accepted if it equals `n`.
        echo: put the prompt in front of each answer; with `logprobs`, report the prompt's
            log-probabilities too.
        max_tokens: with `echo` also 0, which scores the prompt and generates nothing.
        suffix: accepted if empty; the model continues a text and fills no gap.
    """

    prompt: Prompt
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_NUMBER)] | None = None
    suffix: Literal[""] | None = None

    def check(self) -> None:
        """Refuse unsupported combinations, and too many answers at once.

        Raises:
            ApiError: 400.
        """
        n = self.n or 1
        for name, wrong, sentence in (
            (
                "echo",
                self.echo and self.stream and self.logprobs is not None,
                "echo with logprobs cannot be streamed; leave out stream.",
            ),
            ("best_of", self.best_of not in (None, n), "best_of must be n here; leave it out."),
            (
                "n",
                len(self.prompts()) * n > MOST_SAMPLES,
                f"{len(self.prompts())} prompts of {n} answers are more than {MOST_SAMPLES}.",
            ),
        ):
            if wrong:
                raise ApiError(400, sentence, param=name, code="unsupported_value")
        if self.max_tokens == 0 and (not self.echo or self.stream):
            sentence = "max_tokens is 0, which needs echo, and no stream."
            raise ApiError(422, sentence, param="max_tokens", code="invalid_value")

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return [each for each in given if not isinstance(each, int)]


@router.post("/v1/completions")
async def completions(fields: CompletionFields, http: HttpRequest, context: Its) -> Response:
    """Continue prompts."""
    context.check_model(fields.model)
    fields.check()
    usage = fields.wants_usage()
    logprobs = check_logprobs(fields.logprobs, "logprobs")
    scores_only = fields.max_tokens == 0
    params = fields.params(
        context, logprobs=logprobs, max_tokens=1 if scores_only else fields.max_tokens
    )
    prompts = fields.prompts()
    encoded = await context.prepare(
        lambda: [
            fields.truncated(_encode(each, context), params.max_new_tokens, context)
            for each in prompts
        ],
        sum(map(len, prompts)),
    )
    requests = [await _request(fields, params, i, ids, context) for i, ids in enumerate(encoded)]
    echoed = [
        _text_of(prompt, ids, context) if fields.echo else ""
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]
    facts: dict[str, Any] = http.state.facts
    if context.settings.log_prompts:
        facts["prompts"] = prompts
    name, kind = f"cmpl-{http.state.request_id}", "text_completion"
    job = Job(
        requests=tuple(requests),
        writers=tuple(
            TextWriter(
                i,
                context.tokens,
                logprobs=logprobs is not None,
                echoed=echoed[i // params.n],
                prompt_ids=encoded[i // params.n] if fields.echo else (),
            )
            for i in range(len(requests) * params.n)
        ),
        framing=CompletionFraming(name, context.settings.model_name, kind, kind, usage=usage),
        request_id=http.state.request_id,
        stream=bool(fields.stream),
        headers=warning(fields.ignored(context)),
        facts=facts,
        scores_only=scores_only,
    )
    return await reply(job, context, http.receive)


async def _request(
    fields: CompletionFields,
    params: SamplingParams,
    index: int,
    prompt_ids: tuple[int, ...],
    context: Context,
) -> Request:
    """The request of one of several prompts."""
    return Request(
        prompt_ids,
        params.with_seed(sample_seed(params.seed, index * params.n)),
        without_bad_words(fields, await mask_of(fields, context), context),
        fields.timeout(context),
        reproducible=fields.seed is not None,
        prompt_logprobs=params.logprobs if fields.echo else None,
        learn=fields.learns(context) and fields.max_tokens != 0,
    )


def _encode(prompt: str | list[int], context: Context) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    tokenizer = context.service.engine.target.tokenizer
    if tokenizer is None:
        raise ApiError(400, "This model has no tokenizer; give token ids.", param="prompt")
    return encode(tokenizer, prompt)


def _text_of(prompt: str | list[int], ids: tuple[int, ...], context: Context) -> str:
    """The text of a prompt, as far as it was not cut."""
    tokenizer = context.service.engine.target.tokenizer
    if isinstance(prompt, str) and ids == encode(tokenizer, prompt):
        return prompt
    if tokenizer is None:
        raise ApiError(400, "This model has no tokenizer, so echo has no text.", param="echo")
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


@dataclass
class TextWriter:
    """One answer in the format of text completions.

    Attributes:
        index: its number.
        texts: of single tokens.
        logprobs: whether log-probabilities are reported.
        echoed: the prompt's text, if it is put in front of the answer.
        prompt_ids: the prompt's tokens, if their log-probabilities are reported too.
    """

    index: int
    texts: TokenTexts
    _: KW_ONLY
    logprobs: bool
    echoed: str = ""
    prompt_ids: tuple[int, ...] = ()
    _streamed: int = field(default=0, init=False)

    def stream_delta(self, pieces: Sequence[Piece]) -> list[Choice]:
        """What new tokens add to a stream."""
        text = "".join(piece.text for piece in pieces)
        found = [piece.logprob for piece in pieces if piece.logprob is not None]
        if not text and not (self.logprobs and found):
            return []
        choice = self._choice(self._take_echo() + text, found, self._streamed)
        self._streamed += len(text)
        return [choice]

    def stream_end(self, output: Output) -> list[Choice]:
        """The last text, and why it ended."""
        rest = self._take_echo() + output.text[self._streamed :]
        return [self._choice(rest, (), self._streamed, output.finish_reason)]

    def full(self, output: Output) -> Choice:
        """The answer at once."""
        found: list[Logprob | None] = list(output.logprobs or ())
        if self.prompt_ids and output.prompt_logprobs is not None:
            found = [None, *output.prompt_logprobs, *found]
        return self._choice(self.echoed + output.text, found, 0, output.finish_reason)

    def _take_echo(self) -> str:
        echoed, self.echoed = self.echoed, ""
        return echoed

    def _choice(
        self, text: str, found: Sequence[Logprob | None], offset: int, reason: str | None = None
    ) -> Choice:
        shown = None
        if self.logprobs and found:
            first_id = self.prompt_ids[0] if self.prompt_ids else -1
            shown = text_logprobs(found, self.texts, offset, first_id)
        return {"index": self.index, "text": text, "logprobs": shown, "finish_reason": reason}
