"""Engine backend: answers by our own engine, many conversations in flight, turn after turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from dspark.data.answers.regenerate import Done
from dspark.data.answers.replay import AnswerFilters, Replay, Reply
from dspark.data.conversations import Dialogue
from dspark.data.templates import answer_of, render, split_thinking, thinking_marks
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.errors import DataError, RequestError
from dspark.params import sample_seed
from dspark.request import Output, Request, SamplingParams

# Conversations per engine and batch slot: enough that the end, when slots are empty, is short.
_CONVERSATIONS_PER_PLACE = 32
# Allowance for template tokens around a message.
_AROUND_MESSAGE = 32


@dataclass(frozen=True)
class EngineResponder:
    """Answers with a model in this process.

    Implements `regenerate.Responder`.

    Attributes:
        model: the target, optionally with a drafter.
        params: sampling parameters; line i uses seed + i - 1, its later turns hashes of that.
        filters: which answers are kept.
        template_options: chat-template variables.
        batch_size: requests at once.
    """

    model: Model
    params: SamplingParams
    filters: AnswerFilters = field(default_factory=AnswerFilters)
    template_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that determine the answers."""
        drawn = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {
            "target": self.model.target.name,
            **{name: getattr(self.params, name) for name in drawn},
            "seed": self.params.seed,
            "template": dict(self.template_options),
            "wanted": repr(self.filters),
        }

    def answer(self, replays: Iterator[Replay], done: Done) -> None:
        """Answer every turn of every replay."""
        while chunk := list(islice(replays, self.batch_size * _CONVERSATIONS_PER_PLACE)):
            _Chunk(self, done).run(chunk)


@dataclass
class _Chunk:
    """Conversations that share one engine."""

    responder: EngineResponder
    done: Done
    flying: dict[int, Replay] = field(default_factory=dict)

    def run(self, replays: Sequence[Replay]) -> None:
        """Answer all of them."""
        model, batch_size = self.responder.model, self.responder.batch_size
        opened = [(replay, self._open(replay)) for replay in replays]
        asked = [(replay, request) for replay, request in opened if request is not None]
        if not asked:
            return
        longest = max(self._longest(replay, request) for replay, request in asked)
        room = Request((0,) * max(longest - self.responder.params.max_new_tokens, 1), self._params)
        requests = [request for _, request in asked]
        engine = model.engine([*requests, room], batch_size=batch_size, schedule="fixed")
        for replay, request in asked:
            self._add(engine, replay, request)
        while engine.has_work:
            for event in engine.step():
                if event.output is not None:
                    self._ended(engine, self.flying.pop(event.request_id), event.output)

    @property
    def _params(self) -> SamplingParams:
        return self.responder.params

    def _open(self, replay: Replay) -> Request | None:
        """The request for the next answer; None if the replay is done."""
        if not replay.next_turn():
            self.done(replay)
            return None
        try:
            ids = self._prompt_ids(replay)
            if len(ids) >= self.responder.model.target.max_context:
                replay.stop("The prompt fills the model's whole context.")
            else:
                seed = sample_seed(self._params.seed + replay.line - 1, replay.answers)
                return Request(ids, self._params.with_seed(seed))
        except (DataError, RequestError) as error:
            replay.stop(str(error))
        self.done(replay)
        return None

    def _prompt_ids(self, replay: Replay) -> tuple[int, ...]:
        model = self.responder.model
        if replay.dialogue is None:
            replay.input_ids = model.encode(replay.raw)
            replay.prompt_len = len(replay.input_ids)
            return replay.input_ids
        tokenizer = model.target.tokenizer
        if tokenizer is None:
            raise DataError(f"{model.target.name} has no tokenizer; give raw token ids.")
        text = render(
            tokenizer, replay.said, tools=replay.tools, options=replay.options, generation=True
        )
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _longest(self, replay: Replay, request: Request) -> int:
        """Estimated largest length of a conversation, tokens."""
        target = self.responder.model.target
        texts = [m["content"] for m in replay.to_come if m["role"] != "assistant"]
        more = sum(len(target.tokenizer(text)["input_ids"]) + _AROUND_MESSAGE for text in texts)
        answers = 1 + sum(m["role"] == "assistant" for m in replay.to_come)
        longest = len(request.prompt_ids) + more + answers * self._params.max_new_tokens
        return int(min(longest, target.max_context))

    def _add(self, engine: Engine, replay: Replay, request: Request) -> None:
        try:
            self.flying[engine.add(request)] = replay
        except RequestError as error:
            replay.stop(str(error))
            self.done(replay)

    def _ended(self, engine: Engine, replay: Replay, output: Output) -> None:
        if output.error is not None:
            replay.fail(output.error)
        else:
            reply = self._reply(replay, output)
            replay.take(reply, keep=self.responder.filters.keeps(reply))
        request = self._open(replay)
        if request is not None:
            self._add(engine, replay, request)

    def _reply(self, replay: Replay, output: Output) -> Reply:
        ids = output.token_ids
        reply = Reply(output.text, output.finish_reason, len(ids), token_ids=ids)
        if replay.dialogue is None:
            return reply
        reply = self._with_thinking(replay, reply)
        if replay.place is not None and replay.place.get("tool_calls"):
            return self._with_calls(replay, replay.place, reply)
        return reply

    def _with_thinking(self, replay: Replay, reply: Reply) -> Reply:
        target = self.responder.model.target
        marks = thinking_marks(target.tokenizer)
        if marks is None or replay.options.get("enable_thinking") is False:
            return reply
        opening, closing = marks
        # Thinking tags may be special tokens, which an answer's text omits.
        own = [token for token in reply.token_ids if token not in target.eos_token_ids]
        shown = target.tokenizer.decode(own, clean_up_tokenization_spaces=False).lstrip()
        if closing in shown:
            thinking, text = split_thinking(shown, opening, closing)
            return replace(reply, text=text, thinking=thinking) if text != shown else reply
        began = shown.startswith(opening) if opening else reply.finish_reason == "length"
        return replace(reply, text="", thinking=shown.removeprefix(opening)) if began else reply

    def _with_calls(self, replay: Replay, place: Mapping[str, Any], reply: Reply) -> Reply:
        """The reply with the source's tool calls, if its text renders the same."""
        dialogue = Dialogue((*replay.said, dict(place)), tuple(replay.tools), replay.options)
        tokenizer = self.responder.model.target.tokenizer
        try:
            answer = answer_of(tokenizer, dialogue, len(replay.said))
        except DataError:
            return reply
        whole = tokenizer.decode(reply.token_ids, clean_up_tokenization_spaces=False)
        if whole.strip() != answer.text.strip():
            return reply
        return replace(reply, text=place["content"], tool_calls=tuple(place["tool_calls"]))
