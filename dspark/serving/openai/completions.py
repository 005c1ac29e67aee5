"""`/v1/completions`: raw prompts, as text or as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import Field
from starlette.responses import Response

from dspark.engine.sequence import Piece
from dspark.params import MOST_SAMPLES, sample_seed
from dspark.request import Logprob, Output, Request
from dspark.serving.context import Context, context_of
from dspark.serving.openai.chat_template import encode
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.fields import (
    IGNORED_HEADER,
    SharedFields,
    TokenId,
    check_logprobs,
    mask_of,
)
from dspark.serving.openai.logprobs import TokenTexts, text_logprobs
from dspark.serving.openai.models import check_model
from dspark.serving.openai.streaming import Choice, Job, reply

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
        best_of: as many as `n`, which is what happens.
        echo: false: a prompt's own log-probabilities are not computed.
        suffix: none: the model writes on, it does not fill in.
    """

    prompt: Prompt
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Refuse what is not supported, and too much at once.

        Raises:
            ApiError: 400.
        """
        n = self.n or 1
        for name, wrong, sentence in (
            (
                "echo",
                self.echo,
                "echo is not supported; put the prompt in front yourself.",
            ),
            ("suffix", self.suffix is not None, "suffix is not supported; leave it out."),
            ("best_of", self.best_of not in (None, n), "best_of must be n here; leave it out."),
            (
                "n",
                len(self.prompts()) * n > MOST_SAMPLES,
                f"{len(self.prompts())} prompts of {n} answers are more than {MOST_SAMPLES}.",
            ),
        ):
            if wrong:
                raise ApiError(400, sentence, param=name, code="unsupported_value")

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [given]
        return [each for each in given if not isinstance(each, int)]


@router.post("/v1/completions")
async def completions(
    fields: CompletionFields, http: HttpRequest, context: Annotated[Context, Depends(context_of)]
) -> Response:
    """Continue prompts."""
    check_model(fields.model, context)
    fields.check()
    usage = fields.wants_usage()
    logprobs = check_logprobs(fields.logprobs, "logprobs")
    params = fields.params(context, logprobs=logprobs, max_tokens=fields.max_tokens)
    prompts = fields.prompts()
    encoded = await context.prepare(
        lambda: [_encode(each, context) for each in prompts], sum(map(len, prompts))
    )
    requests = tuple(
        [
            Request(
                ids,
                params.with_seed(sample_seed(params.seed, i * params.n)),
                await mask_of(fields, context),
                fields.timeout(context),
                reproducible=fields.seed is not None,
            )
            for i, ids in enumerate(encoded)
        ]
    )
    facts: dict[str, Any] = http.state.facts
    if context.settings.log_prompts:
        facts["prompts"] = prompts
    ignored = fields.ignored()
    job = Job(
        requests=requests,
        writers=tuple(
            TextWriter(i, context.tokens, logprobs=logprobs is not None)
            for i in range(len(requests) * params.n)
        ),
        request_id=http.state.request_id,
        kind="text_completion",
        prefix="cmpl",
        chunked=False,
        stream=bool(fields.stream),
        usage=usage,
        headers={IGNORED_HEADER: ", ".join(ignored)} if ignored else {},
        facts=facts,
    )
    return await reply(job, context, http.receive)


def _encode(prompt: str | list[int], context: Context) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    tokenizer = context.service.engine.target.tokenizer
    if tokenizer is None:
        raise ApiError(400, "This model has no tokenizer; give token ids.", param="prompt")
    return encode(tokenizer, prompt)


class TextWriter:
    """One answer in the shapes of text completions.

    Args:
        index: its number.
        texts: of single tokens.
        logprobs: whether log-probabilities are reported.
    """

    def __init__(self, index: int, texts: TokenTexts, *, logprobs: bool) -> None:
        self._index = index
        self._texts = texts
        self._logprobs = logprobs
        self._streamed = 0

    def stream_delta(self, pieces: Sequence[Piece]) -> list[Choice]:
        """What new tokens add to a stream."""
        text = "".join(piece.text for piece in pieces)
        found = [piece.logprob for piece in pieces if piece.logprob is not None]
        if not text and not (self._logprobs and found):
            return []
        choice = self._choice(text, found, self._streamed)
        self._streamed += len(text)
        return [choice]

    def stream_end(self, output: Output) -> list[Choice]:
        """The last text, and why it ended."""
        return [
            self._choice(output.text[self._streamed :], (), self._streamed, output.finish_reason)
        ]

    def full(self, output: Output) -> Choice:
        """The answer at once."""
        return self._choice(output.text, output.logprobs or (), 0, output.finish_reason)

    def _choice(
        self, text: str, found: Sequence[Logprob], offset: int, reason: str | None = None
    ) -> Choice:
        shown = text_logprobs(found, self._texts, offset) if self._logprobs and found else None
        return {"index": self._index, "text": text, "logprobs": shown, "finish_reason": reason}
