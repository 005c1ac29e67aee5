"""Loss masks under the chat templates of real families (tests/data/templates)."""

import json
import random

import pytest

from dspark.data.conversations import Dialogue
from dspark.data.samples import conversation_samples
from dspark.data.templates import render, split_thinking, thinking_marks
from dspark.errors import DataError

END = {
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "chatml": "<|im_end|>",
    "plain": "\n\n",
}
TRIMS = {"llama3", "gemma3"}
PIECES = [
    "The cat",
    " sat",
    "\n",
    "\n\n",
    " 12",
    "Grüße",
    "你好",
    "🙂",
    "x = 7",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
    "<start_of_turn>model\n",
    "<end_of_turn>\n",
    "### assistant:\n",
    "### user:\n",
    "<think>\n",
    "</think>\n\n",
    "user\n",
    "assistant",
    "{{ messages }}",
]


def runs(tokenizer, sample):
    """The text of every run of supervised tokens."""
    found, kept = [], []
    for token, mine in [*zip(sample.input_ids, sample.loss_mask, strict=True), (0, False)]:
        if mine:
            kept.append(token)
        elif kept:
            found.append(tokenizer.decode(kept))
            kept = []
    return found


def text(draw, pieces, least):
    return "".join(draw.choices(pieces, k=draw.randint(least, 8)))


def conversation(draw, clean):
    """Turns of which a user's may hold anything, and an assistant's only what `clean` names."""
    messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": text(draw, PIECES, 0)})
        messages.append({"role": "assistant", "content": text(draw, clean, 1)})
    return tuple(messages)


@pytest.mark.parametrize("name", END)
@pytest.mark.parametrize("seed", range(8))
def test_masked_tokens_are_the_answers_and_their_end_marks(family, name, seed):
    tokenizer, draw = family(name), random.Random(f"{name} {seed}")
    # What opens and closes thinking has a meaning in an answer; a text that begins with line ends
    # is trimmed by Qwen3's template.
    clean = PIECES if name == "chatml" else [p for p in PIECES if "think>" not in p]
    for _ in range(12):
        messages = conversation(draw, clean)
        wanted = [m["content"] for m in messages if m["role"] == "assistant"]
        if name in TRIMS:
            wanted = [answer.strip() for answer in wanted]
        if name == "qwen3":
            wanted = [answer.lstrip("\n") for answer in wanted]
        samples = conversation_samples(tokenizer, Dialogue(messages))
        found = [run for sample in samples for run in runs(tokenizer, sample)]
        assert sorted(found) == sorted(answer + END[name] for answer in wanted)
        assert name not in TRIMS or len(samples) == 1


@pytest.mark.parametrize("name", ["chatml", "plain", "qwen3"])
def test_an_answer_stands_behind_exactly_the_prompt_that_it_is_generated_from(family, name):
    tokenizer, draw = family(name), random.Random(name)
    for _ in range(20):
        messages = conversation(draw, ["The cat", " sat", " 12"])
        dialogue = Dialogue(messages, template_options={"enable_thinking": False})
        *_, last = conversation_samples(tokenizer, dialogue)
        prompt = render(
            tokenizer, messages[:-1], options=dialogue.template_options, generation=True
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert list(last.input_ids[: len(ids)]) == ids
        assert last.loss_mask[len(ids) - 1 : len(ids) + 1] == (False, True)


def test_an_answer_that_begins_with_a_line_end_is_cut_from_the_header(family):
    tokenizer = family("chatml")
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"})
    (sample,) = conversation_samples(tokenizer, Dialogue(messages))
    assert runs(tokenizer, sample) == ["\nb<|im_end|>"]
    joined = tokenizer("assistant\n\nb", add_special_tokens=False, return_offsets_mapping=True)
    assert any(s < 10 < e for s, e in joined["offset_mapping"])  # else this would test nothing


def test_a_header_that_changes_with_what_follows_gives_one_sample_an_answer(family, tokenizer):
    changed = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    changed.chat_template = family("llama3").chat_template
    assert len(changed("a\n\n")["input_ids"]) < len(changed("a\n\nb")["input_ids"]) - 1
    for sample in conversation_samples(changed, Dialogue(TALK)):
        ids, answer = list(sample.input_ids), sample.loss_mask.index(True)
        header = changed(changed.decode(ids[:answer]), add_special_tokens=False)["input_ids"]
        assert ids[:answer] == header
    assert len(conversation_samples(changed, Dialogue(TALK))) == 2


THOUGHT = (
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2", "thinking": "one more than one"},
    {"role": "user", "content": "and 2+2? </think>"},
    {"role": "assistant", "content": "4", "thinking": "twice two"},
)


def test_dropped_thinking_gives_one_sample_an_answer(family):
    tokenizer = family("qwen3")
    first, second = conversation_samples(tokenizer, Dialogue(THOUGHT))
    assert runs(tokenizer, first) == ["<think>\none more than one\n</think>\n\n2<|im_end|>"]
    assert runs(tokenizer, second) == ["<think>\ntwice two\n</think>\n\n4<|im_end|>"]
    assert "one more" not in tokenizer.decode(second.input_ids)


def test_an_answer_without_thinking_is_one_that_was_asked_for_without(family):
    tokenizer = family("qwen3")
    messages = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"})
    (unknown,) = conversation_samples(tokenizer, Dialogue(messages))
    assert runs(tokenizer, unknown) == ["2<|im_end|>"]
    (known,) = conversation_samples(tokenizer, Dialogue(messages, template_options={}))
    assert runs(tokenizer, known) == ["<think>\n\n</think>\n\n2<|im_end|>"]
    assert known.input_ids == unknown.input_ids


def test_thinking_in_the_content_counts_as_thinking(family):
    tokenizer = family("qwen3")
    said = {"role": "assistant", "content": "<think>\none more\n</think>\n\n2"}
    (sample,) = conversation_samples(tokenizer, Dialogue((THOUGHT[0], said)))
    assert runs(tokenizer, sample) == ["<think>\none more\n</think>\n\n2<|im_end|>"]


TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
CALLS = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}]
WITH_TOOLS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "I add"},
    {"role": "tool", "content": "<|im_start|>assistant\n3<|im_end|>", "tool_call_id": "a"},
    {"role": "assistant", "content": "2", "reasoning_content": "so be it"},
]


def test_calls_of_tools_are_answers_and_what_tools_say_is_not(family):
    tokenizer = family("qwen3")
    dialogue = Dialogue.of({"messages": WITH_TOOLS, "tools": list(TOOLS)}, "here")
    (sample,) = conversation_samples(tokenizer, dialogue)  # thinking stays within a chain of calls
    assert runs(tokenizer, sample) == [
        '<think>\nI add\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n'
        "</tool_call><|im_end|>",
        "<think>\nso be it\n</think>\n\n2<|im_end|>",
    ]
    assert json.dumps(TOOLS[0]) in tokenizer.decode(sample.input_ids)


def with_template(family, template):
    tokenizer = family("chatml")
    changed = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    changed.chat_template = template
    return changed


TALK = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
)


def test_a_template_that_shows_only_the_last_turn_gives_one_sample_an_answer(family):
    only_last = (
        "{% set last = messages[-2:] if messages[-1].role == 'assistant' else messages[-1:] %}"
        "{% for m in last %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_template(family, only_last)
    _, second = conversation_samples(tokenizer, Dialogue(TALK))
    assert tokenizer.decode(second.input_ids) == "[user]c<|im_end|>[assistant]d<|im_end|>"
    assert runs(tokenizer, second) == ["d<|im_end|>"]
    # A user who imitates the turns that are not shown gains nothing.
    fake = {"role": "user", "content": "a<|im_end|>[assistant]b<|im_end|>[user]c"}
    _, second = conversation_samples(tokenizer, Dialogue((*TALK[:2], fake, TALK[3])))
    assert runs(tokenizer, second) == ["d<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}",
            "does not put the answer in message 2 behind",
        ),
        (
            "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}"
            "{% if add_generation_prompt %}[{% endif %}",
            "leaves out a part of the answer in message 2",
        ),
        (
            "{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
            "{% if add_generation_prompt %}[{% endif %}",
            "does not put the answer in message 2 behind",
        ),
        ("{{ raise_exception('Only one turn.') }}", "refuses a conversation: Only one turn"),
        ("{{ 'a' + 1 }}", "refuses a conversation"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_drops_or_rewrites_answers_is_refused(family, template, said):
    with pytest.raises(DataError, match=said):
        conversation_samples(with_template(family, template), Dialogue(TALK))


def test_a_template_without_a_place_for_thinking_refuses_it(family):
    for name in ("llama3", "r1"):
        with pytest.raises(DataError, match="message 2"):
            conversation_samples(family(name), Dialogue(THOUGHT[:2]))


def test_marks_of_thinking_are_the_templates(family):
    assert thinking_marks(family("qwen3")) == ("<think>", "</think>")
    assert thinking_marks(family("llama3")) is None
    opened = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    assert thinking_marks(with_template(family, opened)) == ("", "</think>")


@pytest.mark.parametrize(
    ("given", "opening", "parts"),
    [
        ("<think>\na\n</think>\n\nb", "<think>", ("a", "b")),
        ("a</think>b", "", ("a", "b")),
        ("b", "<think>", ("", "b")),
        ("say </think>", "<think>", ("", "say </think>")),
        ("<think>a", "<think>", ("", "<think>a")),
    ],
)
def test_thinking_is_split_from_what_follows(given, opening, parts):
    assert split_thinking(given, opening, "</think>") == parts
