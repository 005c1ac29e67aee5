"""One request in flight: its tokens, what is cached of it, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark.attention.pages import BlockTable
from dspark.engine.text import TextStream
from dspark.request import FinishReason, Output, Request, Stats


@dataclass(frozen=True)
class Piece:
    """One committed token as a stream shows it.

    Attributes:
        text: the text that this token settles; may be empty, or hold earlier tokens' text.
        token_id: the token.
        drafted: whether the drafter proposed it and the target kept it.
    """

    text: str
    token_id: int
    drafted: bool

    def __str__(self) -> str:
        return self.text


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
        slot: its place among the running requests, else -1.
        table: its pages while it runs.
        tokens: prompt and output; the last one is the anchor of the next round.
        cached: tokens whose keys and values the target's cache holds.
        round: number of the next round; randomness is keyed by it.
    """

    request_id: int
    request: Request
    prompt: str
    end_ids: frozenset[int]
    max_tokens: int
    text: TextStream | None
    live: bool = False
    slot: int = -1
    table: BlockTable = field(default_factory=BlockTable)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    round: int = 0
    stats: Stats = field(default_factory=Stats)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def output_ids(self) -> Sequence[int]:
        """Generated tokens."""
        return self.tokens[len(self.request.prompt_ids) :]

    @property
    def room(self) -> int:
        """How many more tokens may be committed."""
        generated = len(self.tokens) - len(self.request.prompt_ids)
        return min(
            self.request.params.max_new_tokens - generated, self.max_tokens - len(self.tokens)
        )

    def commit(self, tokens: Sequence[int], accepted: int, verified: int) -> tuple[Piece, ...]:
        """Commit a round's tokens one by one, up to where the request ends.

        Args:
            tokens: kept drafts and the token after them.
            accepted: how many of them are drafts.
            verified: drafts that the target checked.

        Returns:
            The pieces of the tokens that were committed.
        """
        is_prefill = self.cached == 0
        self.cached = len(self.tokens) + accepted
        pieces: list[Piece] = []
        for index, token in enumerate(tokens):
            self.tokens.append(token)
            pieces.append(Piece(self._push(token), token, drafted=index < accepted))
            if self.finish_reason is not None:
                break
        if not is_prefill:
            cut = len(pieces) <= accepted
            self.stats.record_round(verified, min(accepted, len(pieces)), len(pieces), cut=cut)
        self.round += 1
        return tuple(pieces)

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

    def cancel(self) -> Output:
        """End the request as it is."""
        self.finish_reason = "cancelled"
        self._finish_text()
        return self.output()

    def output(self) -> Output:
        """The finished request."""
        assert self.finish_reason is not None
        return Output(
            prompt=self.prompt,
            text=self.text.text if self.text else "",
            token_ids=tuple(self.output_ids),
            finish_reason=self.finish_reason,
            stats=self.stats,
        )
