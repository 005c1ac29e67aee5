"""A simulated request: its lengths, how far it is, and when its tokens came."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.request import Request

_ANY = Request((0,))  # greedy, without mask, penalty or bias


@dataclass(eq=False)
class Job:
    """A request, and what became of it; `ActiveRequest` has the same attributes.

    Attributes:
        request_id: its number.
        prompt_tokens, answer_tokens: its lengths.
        sent_s: when it arrived.
        stream: which stream of the acceptance profile it follows; None lets the server draw one.
        first_s, end_s: when its first and its last token were there.
        tokens: committed.
        cached: rows of prompt and answer that the cache holds.
        place: of its stream in the acceptance profile: where it starts, and how long it is.
        admitted: the how-manieth admission was its last.
        ready, drafts: whether all but the anchor is cached.
        room: how many more tokens may be committed, as far as anybody knows: answers end by a stop
            token, and not for room.
    """

    request_id: int
    prompt_tokens: int
    answer_tokens: int
    sent_s: float
    stream: int | None = None
    first_s: float = 0.0
    end_s: float = 0.0
    tokens: int = 0
    cached: int = 0
    place: tuple[int, int] = (0, 1)
    admitted: int = -1
    request: Request = _ANY
    ready: bool = False
    drafts: bool = False
    room: int = 1 << 20
    plain: bool = False
    scores_prompt: bool = False

    @property
    def resumed(self) -> bool:
        """Whether its first token has been drawn."""
        return self.tokens > 0

    def read(self, rows: int) -> None:
        """Note that so many more rows are cached."""
        self.cached += rows
        self.ready = self.drafts = self.tokens > 0 and not self.unread

    def commit(self, gained: int) -> None:
        """Note that so many more tokens are there, all but the last of them cached."""
        self.tokens += gained
        self.cached = self.prompt_tokens + self.tokens - 1
        self.ready = self.drafts = True

    def give_way(self) -> None:
        """Lose what is cached."""
        self.cached, self.ready, self.drafts = 0, False, False

    @property
    def unread(self) -> int:
        """Tokens to be read before it is ready."""
        return self.prompt_tokens + self.tokens - self.cached - (self.tokens > 0)

    @property
    def left(self) -> int:
        """How many more tokens there will be."""
        return self.answer_tokens - self.tokens
