"""A target with its drafter, ready to generate: what `dspark.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from jinja2 import TemplateError

from dspark.drafters.base import Drafter
from dspark.drafters.checkpoint import has_attached_drafter, load_drafter
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.engine import Engine
from dspark.engine.schedule import Schedule, ScheduleName
from dspark.engine.sequence import Piece
from dspark.errors import CheckpointError, RequestError, UsageError
from dspark.request import Output, Request, SamplingParams, Verifier
from dspark.targets.target import Target

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "bundled"
Messages = Sequence[Mapping[str, str]]


def load(
    target: str | Path,
    draft: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Load a target and its drafter.

    Args:
        target: a directory, a hub id, or "bundled".
        draft: a directory or hub id; "none" for plain decoding, "ngram" for prompt lookup; None
            takes the drafter attached to the target's directory, or none where there is none.
        device: auto, cpu, cuda, cuda:i or mps.
        dtype: auto, float32, bfloat16 or float16.
        revision: branch, tag or commit on the hub, for the target.
        offline: use only what is on this machine.
        trust_remote_code: run code that a checkpoint brings along.

    Raises:
        CheckpointError: a checkpoint is missing, incomplete or damaged.
        CompatibilityError: the architecture is not supported, or drafter and target do not fit.
    """
    if target == "bundled":
        target = BUNDLED
        if not BUNDLED.is_dir():
            raise CheckpointError(f"The bundled model is missing from {BUNDLED}; reinstall dspark.")
    loaded = Target.load(
        target,
        device=device,
        dtype=dtype,
        revision=revision,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    return Model(loaded, _load_draft(target, draft, loaded, revision, offline))


def _load_draft(
    source: str | Path,
    draft: str | Path | None,
    target: Target,
    revision: str | None,
    offline: bool,
) -> Drafter | None:
    if draft == "none":
        return None
    if draft == "ngram":
        lookup = NgramDrafter()
        lookup.bind(target.parts())
        return lookup
    if draft is None:
        if not has_attached_drafter(source, revision=revision, offline=offline):
            return None
        draft = source
    drafter = load_drafter(draft, revision=revision if draft == source else None, offline=offline)
    drafter.to(target.device)
    drafter.bind(target.parts(), num_target_layers=target.num_layers)
    drafter.eval()
    return drafter


class Model:
    """A target with its drafter.

    Args:
        target: the model whose outputs are wanted.
        drafter: who proposes, bound to the target; None decodes plainly.
    """

    def __init__(self, target: Target, drafter: Drafter | None = None) -> None:
        self.target = target
        self.drafter = drafter

    def engine(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        verifier: Verifier = "block",
        schedule: ScheduleName = "fixed",
        threshold: float | None = None,
        block_size: int | None = None,
    ) -> Engine:
        """An engine with room for these requests, `batch_size` of them at once.

        Raises:
            RequestError: there are no requests.
            UsageError: an option has a value that cannot be used.
        """
        if not requests:
            raise RequestError("There are no requests; give at least one prompt.")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, but must be at least 1.")
        longest = max(len(r.prompt_ids) + r.params.max_new_tokens for r in requests)
        return Engine(
            self.target,
            self.drafter,
            max_requests=min(batch_size, len(requests)),
            max_length=longest,
            verifier=verifier,
            schedule=Schedule(schedule, threshold),
            block_size=block_size,
        )

    def encode(self, prompt: str | Messages, *, raw: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt.

        Args:
            prompt: text, or chat messages, which always go through the chat template.
            raw: take text as it is; else as a user turn of the chat template, where there is one.

        Raises:
            RequestError: there is no tokenizer, no chat template for messages, or nothing to
                encode; or the chat template refuses the messages.
        """
        tokenizer = self.target.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.target.name} has no tokenizer; give token ids.")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("The prompt is empty; give at least one word.")
            if raw or not tokenizer.chat_template:
                return tuple(tokenizer(prompt)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        if not tokenizer.chat_template:
            raise RequestError(f"{self.target.name} has no chat template; give a plain prompt.")
        _check_messages(prompt)
        try:
            encoded = tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise RequestError(f"The chat template refuses the messages: {error}.") from error
        return tuple(encoded["input_ids"])

    @overload
    def generate(
        self, prompt: str | None = ..., *, messages: Messages | None = ..., **options: Any
    ) -> Output: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[Output]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: Messages | None = None,
        **options: Any,
    ) -> Output | list[Output]:
        """Continue one prompt, or several.

        Args:
            prompt: raw text, or a list of texts.
            messages: chat messages, in place of `prompt`.
            **options: fields of `SamplingParams` (max_new_tokens, temperature, seed, ...) and
                `batch_size`, `verifier`, `schedule`, `threshold`, `block_size`. Prompt i of a
                list draws with seed + i.

        Returns:
            An output, or a list of them for a list of prompts.

        Raises:
            RequestError: a prompt is empty or does not fit the context.
            UsageError: an option is unknown or has a value that cannot be used.
        """
        params, engine_options = split_options(options)
        if isinstance(prompt, str) or prompt is None:
            one = _one_prompt(prompt, messages)
            request = Request(self.encode(one), params)
            text = one if isinstance(one, str) else one[-1]["content"]
            return self.engine([request], **engine_options).run([request], [text])[0]
        if messages is not None:
            raise RequestError("Give either prompts or messages.")
        requests = [
            Request(self.encode(p), params.with_seed(params.seed + i)) for i, p in enumerate(prompt)
        ]
        if not requests:
            return []
        return self.engine(requests, **engine_options).run(requests, prompt)

    def stream(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Any
    ) -> Iterator[Piece]:
        """Continue one prompt, yielding each token's text as it is decided.

        Takes what `generate` takes, for one prompt.
        """
        params, engine_options = split_options(options)
        request = Request(self.encode(_one_prompt(prompt, messages)), params)
        yield from stream_pieces(self.engine([request], **engine_options), request)


def stream_pieces(engine: Engine, request: Request) -> Iterator[Piece]:
    """Yield the pieces of one request from an engine that has nothing else to do."""
    engine.add(request, live=True)
    while engine.has_work:
        for event in engine.step():
            yield from event.pieces


def split_options(options: Mapping[str, Any]) -> tuple[SamplingParams, dict[str, Any]]:
    """Part the options of `generate` into sampling parameters and the engine's options.

    Raises:
        UsageError: an option is unknown, or has a value that cannot be used.
    """
    engine_names = ("batch_size", "verifier", "schedule", "threshold", "block_size")
    engine_options = {name: options[name] for name in engine_names if name in options}
    rest = {name: value for name, value in options.items() if name not in engine_options}
    return SamplingParams.of(rest), engine_options


def _one_prompt(prompt: str | None, messages: Messages | None) -> str | Messages:
    if prompt is not None and messages is None:
        return prompt
    if messages is not None and prompt is None:
        return messages
    raise RequestError("Give either a prompt or messages.")


def _check_messages(messages: Messages) -> None:
    if not messages:
        raise RequestError("The list of messages is empty; give at least one user message.")
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestError(
                f"A message is {dict(message)!r}, but must have a 'role' and a 'content', both "
                "text."
            )
