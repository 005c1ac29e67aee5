"""Who listens to rounds, and what a step of the engine has for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark.engine.record import RoundRecord
from dspark.engine.sequence import Event
from dspark.serving.round_events import Owner, RoundEvent, TokenText, plain_event, round_events
from dspark.serving.streams import Subscription


@dataclass
class Step:
    """What a step did.

    Attributes:
        number: of the step, from 1.
        record: of its round; None under plain decoding.
        events: of its requests.
        owners: of those that belong to someone, by the engine's number.
        ms: what it took.
        time_s: when it ended, seconds since 1970.
    """

    number: int
    record: RoundRecord | None
    events: Sequence[Event]
    owners: dict[int, Owner]
    ms: float
    time_s: float = field(default_factory=time.time)


class Listeners:
    """The subscriptions of one service; it belongs to the event loop.

    Args:
        text: of tokens.
        on_change: told whenever someone comes or goes whether anyone is there.
    """

    def __init__(self, text: TokenText, on_change: Callable[[bool], None]) -> None:
        self._text = text
        self._on_change = on_change
        self._all: list[Subscription] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, request_id: str | None, size: int, *, ended: bool) -> Subscription:
        """A new subscription, as `EngineService.subscribe`.

        Args:
            request_id: whose rounds; None for everyone's.
            size: events that wait at most.
            ended: whether none will come any more; it is then closed.
        """
        listener = Subscription(request_id, size, self._remove)
        if ended:
            listener.close()
            return listener
        self._all.append(listener)
        self._on_change(True)
        return listener

    def _remove(self, listener: Subscription) -> None:
        if listener in self._all:
            self._all.remove(listener)
        self._on_change(bool(self._all))

    def close(self) -> None:
        """Let all of them end."""
        for listener in list(self._all):
            listener.close()

    def publish(self, step: Step) -> None:
        """Give a step's rounds to those who want them; nothing is made that nobody wants."""
        wanted = {listener.request_id for listener in self._all}
        owners = {n: o for n, o in step.owners.items() if None in wanted or o[0] in wanted}
        for event in self._events(step, owners) if owners else ():
            for listener in self._all:
                if listener.request_id in (None, event.request_id):
                    listener.put(event)

    def _events(self, step: Step, owners: dict[int, Owner]) -> list[RoundEvent]:
        if step.record is not None:
            pieces = {event.request_id: event.pieces for event in step.events}
            return round_events(step.record, pieces, owners, self._text, step.time_s)
        requests = len(step.events)
        return [
            plain_event(
                owners[event.request_id],
                step.number,
                event.pieces[0],
                requests,
                step.ms,
                step.time_s,
            )
            for event in step.events
            if event.request_id in owners and event.pieces
        ]
