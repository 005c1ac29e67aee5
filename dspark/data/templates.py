"""Chat templates: rendering by the tokenizer's own template, and which characters an answer is.

An answer is what its rendering adds after the generation prompt, that is, after what the model was
shown when it wrote it. Rendered text is never searched for headers, so a user who writes a
template's header changes nothing.

`train_tokenizer` makes a small tokenizer that has such a template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from dspark.data.conversations import THINKING_KEYS, Dialogue, Message
from dspark.errors import DataError


@dataclass(frozen=True)
class Answer:
    """An assistant's turn as the chat template shows it.

    Attributes:
        index: its index among the messages.
        prompt: the text that the model continued: all earlier turns and the generation prompt.
        through: the prompt and the answer with its end-of-turn token.
        said: earliest offset in `through` at which the message's own text may end.
        options: template variables that it was rendered with.
    """

    index: int
    prompt: str
    through: str
    said: int
    options: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The answer with its end-of-turn token."""
        return self.through[len(self.prompt) :]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
    generation: bool = False,
) -> str:
    """The text of a conversation by the tokenizer's own template.

    Args:
        tokenizer: a transformers tokenizer.
        messages: the turns.
        tools: tools that the assistant may call.
        options: further template variables.
        generation: append the generation prompt.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError("The target's tokenizer has no chat template; train on raw token ids.")
    try:
        text: str = tokenizer.apply_chat_template(
            [_for_template(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=generation,
            **dict(options or {}),
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"The chat template refuses a conversation: {error}.") from error
    return text


def _for_template(message: Message) -> Message:
    shown = dict(message)
    if thinking := shown.pop("thinking", ""):
        shown |= dict.fromkeys(THINKING_KEYS, thinking)
    return shown


def answers_of(tokenizer: Any, dialogue: Dialogue) -> list[Answer]:
    """Every assistant turn of a dialogue, each rendered as it was when it was the last turn.

    If the dialogue does not record its template options, an answer with thinking is taken to be
    written with `enable_thinking` true, one without with it false.

    Raises:
        DataError: there is no assistant turn; or the template omits an answer, rewrites it, or does
            not place it after its own generation prompt.
    """
    found = [
        answer_of(tokenizer, dialogue, index)
        for index, message in enumerate(dialogue.messages)
        if message["role"] == "assistant"
    ]
    if not found:
        raise DataError("A conversation has no assistant turn; there is nothing to learn from it.")
    return found


def answer_of(tokenizer: Any, dialogue: Dialogue, index: int) -> Answer:
    """One assistant turn, rendered as the last turn.

    Raises:
        DataError: as `answers_of`.
    """
    message = dialogue.messages[index]
    thinking, content = thinking_and_content(message)
    options = dialogue.template_options
    if options is None:
        options = {"enable_thinking": bool(thinking)}
    shown = dialogue.messages[: index + 1]
    prompt = render(tokenizer, shown[:-1], tools=dialogue.tools, options=options, generation=True)
    through = render(tokenizer, shown, tools=dialogue.tools, options=options)
    if not through.startswith(prompt):
        raise DataError(
            f"The chat template does not put the answer in message {index + 1} behind its own "
            "generation prompt, so its tokens cannot be identified; leave the conversation out, "
            "or use a template that keeps every turn."
        )
    said = None
    if "thinking" not in message:
        said = _end_of([message["content"]], through, len(prompt))
    if said is None:
        said = _end_of([thinking, content], through, len(prompt))
    if said is None:
        raise DataError(
            f"The chat template leaves out a part of the answer in message {index + 1}, or "
            "rewrites it, so that it would not be trained as it was written; leave the "
            "conversation out."
        )
    return Answer(index, prompt, through, said, options)


def _end_of(texts: Sequence[str], rendered: str, begin: int) -> int | None:
    """Offset at which consecutive texts end in a rendering; None if it lacks one."""
    for text in texts:
        found = rendered.find(text.strip(), begin)
        if found < 0:
            return None
        begin = found + len(text.strip())
    return begin


def kept_answers(
    tokenizer: Any, dialogue: Dialogue, earlier: Sequence[Answer], later: Answer
) -> list[Answer]:
    """The earlier answers that a later answer's rendering shows exactly as they were written.

    One token sequence can train these together with it. Templates that drop the thinking of earlier
    answers, or show only the last turns, do not preserve them.
    """
    alike = [a for a in earlier if later.through.startswith(a.through)]
    if not alike:
        return []
    # User text could look like the earlier turns, so a marker at the end of each of these must be
    # rendered exactly there.
    marked, begin = "", 0
    for answer in alike:
        marked += later.prompt[begin : answer.said] + "."
        begin = answer.said
    if _prompt_with_marks(tokenizer, dialogue, alike, later) == marked + later.prompt[begin:]:
        return alike
    # If the template trims trailing white space, each marker must at least change the text.
    return [a for a in alike if _prompt_with_marks(tokenizer, dialogue, [a], later) != later.prompt]


def _prompt_with_marks(
    tokenizer: Any, dialogue: Dialogue, answers: Sequence[Answer], later: Answer
) -> str:
    """A later answer's prompt with a full stop appended to some earlier answers."""
    messages = list(dialogue.messages[: later.index])
    for answer in answers:
        said = messages[answer.index]
        messages[answer.index] = {**said, "content": said["content"] + "."}
    try:
        return render(
            tokenizer, messages, tools=dialogue.tools, options=later.options, generation=True
        )
    except DataError:
        return later.prompt  # undecidable: treated as not shown


def thinking_and_content(message: Message) -> tuple[str, str]:
    """A message's thinking, from its own field or leading `<think>` tags, and its content."""
    content = str(message["content"])
    if thinking := message.get("thinking"):
        return str(thinking), content
    return split_thinking(content, "<think>", "</think>")


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of added and special tokens, which ordinary text never encodes to."""
    return frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)


def split_thinking(text: str, opening: str, closing: str) -> tuple[str, str]:
    """Split a text that begins with thinking between two tags: (thinking, rest).

    Without an opening tag, or if nothing closes it, everything is the rest; an empty opening tag
    always matches.
    """
    head, mark, rest = text.partition(closing)
    if not mark or not head.lstrip().startswith(opening):
        return "", text
    return head.lstrip().removeprefix(opening).strip("\n"), rest.lstrip("\n")


@lru_cache(maxsize=8)
def _marks(tokenizer: Any, template: str) -> tuple[str, str] | None:
    assert template, "part of the cache key"
    thought, said = "ssthoughtss", "sssaidss"
    user: Message = {"role": "user", "content": "a"}
    assistant: Message = {"role": "assistant", "content": said, "thinking": thought}
    options = {"enable_thinking": True}
    try:
        prompt = render(tokenizer, [user], options=options, generation=True)
        through = render(tokenizer, [user, assistant], options=options)
    except DataError:
        return None
    opening, found, rest = through.removeprefix(prompt).partition(thought)
    closing, also_found, _ = rest.partition(said)
    if not found or not also_found or not closing.strip() or not through.startswith(prompt):
        return None
    return opening.strip(), closing.strip()


def thinking_marks(tokenizer: Any) -> tuple[str, str] | None:
    """The tags that a model writes before and after its thinking, according to its template.

    The opening tag is empty if the generation prompt contains it. None if the template does not
    render thinking.
    """
    template = tokenizer.chat_template
    return _marks(tokenizer, str(template)) if template else None


START, END, TEXT_END, MASK = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|mask|>"
SPECIAL_TOKENS = (TEXT_END, START, END, MASK)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer; digits are single tokens, no text is ever unknown.

    Args:
        texts: the training text.
        vocab_size: tokens in all, the four special ones and 256 bytes included.

    Returns:
        A `PreTrainedTokenizerFast` with the ChatML template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=TEXT_END,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
