"""One request in flight: its tokens, what is cached of it, and when it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.attention.paged_cache import BlockTable
from dspark.engine.requests.detokenizer import TextStream
from dspark.errors import DSparkError, RequestError
from dspark.request import FinishReason, Logprob, Output, Request, Stats
from dspark.targets.target import Target


class Piece(str):
    """The text that one committed token settles, with the token; streams are made of these.

    A string like any other: `"".join(model.stream(...))` is the text. It may be empty, or hold
    earlier tokens' text.

    Attributes:
        token_id: the token.
        drafted: whether the drafter proposed it and the target kept it.
        logprob: what the model thought of it, if the request asked.
    """

    __slots__ = ("drafted", "logprob", "token_id")
    token_id: int
    drafted: bool
    logprob: Logprob | None

    def __new__(
        cls, text: str, token_id: int, drafted: bool, logprob: Logprob | None = None
    ) -> Piece:
        """A piece of a stream."""
        made = super().__new__(cls, text)
        made.token_id, made.drafted, made.logprob = token_id, drafted, logprob
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return self.text, self.token_id, self.drafted, self.logprob

    @property
    def text(self) -> str:
        """The text alone."""
        return str(self)


@dataclass(frozen=True)
class Event:
    """What a step did for one request: its new pieces, and its output once it has ended."""

    request_id: int
    pieces: tuple[Piece, ...]
    output: Output | None


@dataclass(eq=False)
class ActiveRequest:
    """The state of a request between rounds.

    Attributes:
        request_id: the engine's name for it.
        request: what was asked.
        prompt: the prompt's text, for the output.
        end_ids: tokens that end it.
        max_tokens: prompt and output together never exceed this.
        text: decodes committed tokens.
        live: decode at every token (for a stream, or for stop strings), not at the end.
        table: its pages while it runs.
        admitted: the how-manieth admission was its last: who came last gives way first.
        tokens: prompt and output; the last one is the anchor of the next round.
        shared: tokens at its beginning whose pages another request has filled.
        cached: tokens whose keys and values the target's cache holds.
        round: number of the next round; randomness is keyed by it.
        first_id: number of the first of the answers that were asked for together.
        deadline: when it ends at the latest, on the engine's clock; None for never.
        plain: whether it decodes plainly to its end: the drafter has failed it, or pauses for so
            long that it could not draft again.
        observed: tokens whose rows the drafter has nevertheless, where it is plain.
        logprobs: of the generated tokens, if it asked.
        fault: what ended it, if that was an error.
        prompt_logprobs: of its prompt's tokens from the second on, as far as they are read, if it
            asked.
    """

    request_id: int
    request: Request
    prompt: str
    end_ids: frozenset[int]
    max_tokens: int
    text: TextStream | None
    live: bool = False
    table: BlockTable = field(default_factory=BlockTable)
    admitted: int = -1
    shared: int = 0
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    round: int = 0
    stats: Stats = field(default_factory=Stats)
    finish_reason: FinishReason | None = None
    first_id: int = -1
    deadline: float | None = None
    plain: bool = False
    observed: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    fault: DSparkError | None = None
    prompt_logprobs: list[Logprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @classmethod
    def waiting(
        cls,
        request: Request,
        request_id: int,
        target: Target,
        max_length: int,
        prompt: str = "",
        *,
        live: bool = False,
    ) -> ActiveRequest:
        """A request that has not begun: decoded by `target`, of `max_length` tokens at most."""
        params, tokenizer = request.params, target.tokenizer
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= target.eos_token_ids
        text = None
        if tokenizer is not None:
            text = TextStream(tokenizer, params.stop, params.min_tokens)
        live = live or bool(params.stop)
        return cls(request_id, request, prompt, ends, max_length, text, live)

    @property
    def output_ids(self) -> Sequence[int]:
        """Generated tokens."""
        return self.tokens[len(self.request.prompt_ids) :]

    @property
    def resumed(self) -> bool:
        """Whether its first token has been drawn: what is uncached is then read for no draw."""
        return len(self.tokens) > len(self.request.prompt_ids)

    @property
    def ready(self) -> bool:
        """Whether all but the anchor is cached, so that it drafts and verifies."""
        return self.resumed and self.cached == len(self.tokens) - 1

    @property
    def unread(self) -> int:
        """Tokens to be read before it is ready, the anchor of a first round included."""
        return len(self.tokens) - self.cached - self.resumed

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        wanted = self.request.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.request.prompt_ids) - 1

    @property
    def reads_all(self) -> bool:
        """Whether every row of it is to be computed, also where the cache holds it."""
        return self.scores_prompt or self.request.learn

    @property
    def longest(self) -> int:
        """Tokens of prompt and output at most."""
        wanted = len(self.request.prompt_ids) + self.request.params.max_new_tokens
        return min(wanted, self.max_tokens)

    @property
    def drafts(self) -> bool:
        """Whether the drafter has its context, and may propose."""
        return self.ready and not self.plain

    @property
    def room(self) -> int:
        """How many more tokens may be committed."""
        return self.longest - len(self.tokens)

    def commit(
        self,
        tokens: Sequence[int],
        accepted: int,
        verified: int,
        logprobs: Sequence[Logprob] | None = None,
        reach: int | None = None,
    ) -> tuple[Piece, ...]:
        """Commit a round's tokens one by one, up to where the request ends.

        Args:
            tokens: kept drafts and the token after them.
            accepted: how many of them are drafts.
            verified: drafts that the target checked.
            logprobs: of the tokens, if the request asked.
            reach: depth of the deepest draft whose test the round came to; None in a chain.

        Returns:
            The pieces of the tokens that were committed.
        """
        is_prefill = not self.resumed
        self.cached = len(self.tokens) + accepted
        pieces: list[Piece] = []
        for index, token in enumerate(tokens):
            self.tokens.append(token)
            logprob = None if logprobs is None else logprobs[index]
            if logprob is not None:
                self.logprobs.append(logprob)
            shown = self._push_or_fail(token)
            pieces.append(Piece(shown, token, index < accepted, logprob))
            if self.finish_reason is not None:
                break
        if pieces and not is_prefill:
            cut = len(pieces) <= accepted
            kept = min(accepted, len(pieces))
            self.stats.record_round(verified, kept, len(pieces), cut=cut, reach=reach)
        self.round += 1
        return tuple(pieces)

    def skip_round(self) -> tuple[Piece, ...]:
        """Commit nothing of a round that came to nothing, and draft no more."""
        self.decode_plainly()
        self.round += 1
        return ()

    def decode_plainly(self, observed: int = 0) -> None:
        """Draft no more; the drafter has the rows of the first `observed` tokens."""
        self.plain, self.observed = True, observed

    def _push_or_fail(self, token: int) -> str:
        try:
            return self._push(token)
        except Exception as error:  # a tokenizer, or a stop check in it, concerns this one alone
            fault = RequestError(
                f"Decoding the text raised {type(error).__name__} after {len(self.output_ids)} "
                f"tokens of output: {error}"
            )
            fault.__cause__ = error
            self.finish_reason, self.fault = "error", fault
            return ""

    def _push(self, token: int) -> str:
        """Append text and decide whether the request ends at this token."""
        if token in self.end_ids:
            self.finish_reason = "stop"
            return self._finish_text()
        shown = ""
        if self.text and self.live:
            shown = self.text.push(token)
        elif self.text:
            self.text.hold(token)
        if self.room <= 0:
            self.finish_reason = "length"
            shown += self._finish_text()
        if self.text and self.text.stopped:
            self.finish_reason = "stop"
        return shown

    def _finish_text(self) -> str:
        return self.text.finish() if self.text else ""

    def end(self, reason: FinishReason, fault: DSparkError | None = None) -> None:
        """End the request as it is, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason, self.fault = reason, fault
            with contextlib.suppress(Exception):  # the reason stands; text that fails is left out
                self._finish_text()

    def output(self) -> Output:
        """The finished request."""
        assert self.finish_reason is not None
        return Output(
            prompt=self.prompt,
            text=self.text.text if self.text else "",
            token_ids=tuple(self.output_ids),
            finish_reason=self.finish_reason,
            stats=self.stats,
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
            fault=self.fault,
            prompt_logprobs=None
            if self.request.prompt_logprobs is None
            else tuple(self.prompt_logprobs),
        )
