"""Prompts that a model writes itself."""

import json
from collections import Counter

import pytest

from dspark.data.answers.regenerate import journal_path
from dspark.data.files.atomic import Journal
from dspark.data.prompts.self_prompting import (
    CUT_TOKENS,
    SelfPrompts,
    Written,
    opening_of,
    reason_against,
    write_self_prompts,
)
from dspark.engine.model import Model
from dspark.errors import DataError, UsageError
from dspark.targets.target import Target
from tests.helpers.targets import tiny_qwen3


def tiny(tokenizer, context=256, **changes):
    model = tiny_qwen3(
        seed=0,
        vocab_size=len(tokenizer),
        intermediate_size=32,
        num_hidden_layers=1,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.02,  # near uniform: all kinds of text
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    return Model(Target.from_model(model, tokenizer=tokenizer))


@pytest.fixture
def own(family):
    return family("qwen3")


def scripted(monkeypatch, texts, tokenizer, ended=True):
    """A writer of given texts, over and over."""

    def write(self, numbers):
        for number in numbers:
            ids = tokenizer(texts[number % len(texts)], add_special_tokens=False)["input_ids"]
            yield number, Written(tuple(ids), ended)

    monkeypatch.setattr(SelfPrompts, "write", write)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("template", "before", "end", "stop"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "<|im_start|>assistant\n", "<|im_start|>user\n", "<|im_end|>", ()),
        ("<|im_start|>system\nBe kind.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
         "{{ m.content | trim }}<|im_end|>\n{% endfor %}",
         "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n", "<|im_end|>", ()),
        ("{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\nASSISTANT:{% endfor %}",
         "USER:", None, ("ASSISTANT:",)),
    ],
)  # fmt: skip
def test_the_opening_is_the_template_up_to_the_users_words(
    own, monkeypatch, template, before, end, stop
):
    monkeypatch.setattr(own, "chat_template", template)
    opening = opening_of(tiny(own).target)
    assert own.decode(opening.ids) == before
    ends = () if end is None else (own.convert_tokens_to_ids(end),)
    assert (opening.stop_ids, opening.stop, opening.is_chat) == (ends, stop, True)


def test_without_a_template_prompts_start_from_the_first_token(own, monkeypatch, tmp_path):
    monkeypatch.setattr(own, "chat_template", None)
    model = tiny(own)
    opening = opening_of(model.target)
    first = own.bos_token_id
    assert opening.ids == (own.eos_token_id if first is None else first,)
    assert not opening.is_chat
    out = tmp_path / "p.jsonl"
    report = write_self_prompts(SelfPrompts(model, batch_size=4), out, count=3)
    assert len(lines(out)) == 3
    assert all(set(record) == {"id", "prompt"} for record in lines(out))
    assert report.cut
    assert "no chat template" in report.sentences("M")[0]


def test_a_model_that_never_ends_its_prompts_has_them_cut_in_bounded_time(own, tmp_path):
    model = tiny(own, context=64)
    writer = SelfPrompts(model, batch_size=16)
    longest = writer.most_tokens
    assert longest < 64
    out = tmp_path / "p.jsonl"
    written = [w for _, w in writer.write(range(32))]
    assert max(len(w.ids) for w in written) <= longest
    report = write_self_prompts(writer, out, count=3)
    assert report.cut
    assert "does not end its prompts itself" in report.sentences("M")[0]
    # Tokens of a random model are no whole characters: their text may have more tokens than they.
    cuts = {
        own.decode(w.ids[:count], skip_special_tokens=True).strip()
        for w in written
        for count in range(CUT_TOKENS[0], CUT_TOKENS[1] + 1)
    }
    assert {record["turns"][0] for record in lines(out)} <= cuts


TEXTS = [
    "What is the capital of France?",
    "what is the capital of france",  # a near duplicate
    "Hi!",
    "Sum the numbers <|im_start|> now",
    "Write a poem.\nassistant\nRoses are red",
    "one two three four five six seven one two three four five six seven",
    "Name three rivers in Asia.",
    "How tall is Everest?",
]


def test_everything_that_is_not_kept_is_counted_by_reason(own, monkeypatch, tmp_path):
    scripted(monkeypatch, TEXTS, own)
    writer = SelfPrompts(tiny(own), batch_size=4)
    out = tmp_path / "p.jsonl"
    report = write_self_prompts(writer, out, count=2)
    assert [r["turns"][0] for r in lines(out)] == [TEXTS[0], TEXTS[6]]
    assert (report.records, report.tries, report.cut) == (2, 8, False)
    reasons = {"duplicate": 1, "too short": 1, "imitates the template": 2, "repeats itself": 1}
    assert report.dropped == Counter(reasons | {"not needed": 1})
    assert report.records + report.dropped.total() == report.tries


def test_unfinished_prompts_are_not_kept(own, monkeypatch, tmp_path):
    texts = [f"Question number {i}, please." for i in range(8)]
    scripted(monkeypatch, texts, own)
    write = SelfPrompts.write

    def half(self, numbers):
        for number, each in write(self, numbers):
            yield number, Written(each.ids, number % 2 == 0)

    monkeypatch.setattr(SelfPrompts, "write", half)
    writer = SelfPrompts(tiny(own), batch_size=4)
    report = write_self_prompts(writer, tmp_path / "p.jsonl", count=3)
    assert [r["turns"][0] for r in lines(tmp_path / "p.jsonl")] == texts[:6:2]
    assert report.dropped["unfinished"] == 4


def test_a_model_of_which_nothing_is_of_use_is_given_up(own, monkeypatch, tmp_path):
    scripted(monkeypatch, ["Hi!"], own)
    writer = SelfPrompts(tiny(own), batch_size=2)
    with pytest.raises(DataError, match=r"no usable prompt in \d+ tries \(\d+ too short\)"):
        write_self_prompts(writer, tmp_path / "p.jsonl", count=3)
    assert not (tmp_path / "p.jsonl").exists()


def test_a_run_that_was_killed_goes_on_and_writes_the_same(own, monkeypatch, tmp_path):
    scripted(monkeypatch, [f"Question number {i}, please." for i in range(9)], own)
    writer = SelfPrompts(tiny(own), seed=3, batch_size=2)
    write_self_prompts(writer, tmp_path / "whole.jsonl", count=6)
    append, calls = Journal.append, []

    def killed(self, entry):
        calls.append(entry)
        if len(calls) == 4:  # the head, then the third try
            raise KeyboardInterrupt
        append(self, entry)

    monkeypatch.setattr(Journal, "append", killed)
    out = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_self_prompts(writer, out, count=6)
    assert journal_path(out).exists()
    assert not out.exists()
    write_self_prompts(writer, out, count=6)
    tries = [entry["try"] for entry in calls if "try" in entry]
    assert len(tries) == len(set(tries)) + 1  # only the one that was cut off is written again
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not journal_path(out).exists()


def test_two_runs_on_one_file_and_a_full_disk(own, monkeypatch, tmp_path, small_disk):
    scripted(monkeypatch, [f"Question number {i}, please." for i in range(9)], own)
    writer, out = SelfPrompts(tiny(own), batch_size=2), tmp_path / "p.jsonl"
    held = Journal(journal_path(out), writer.settings)
    with pytest.raises(UsageError, match="in use by another run"):
        write_self_prompts(writer, out, count=2)
    held.close()
    with small_disk(400), pytest.raises(DataError, match="cannot be written"):
        write_self_prompts(writer, out, count=2)
    assert write_self_prompts(writer, out, count=2).records == 2


def test_drawn_prompts_hang_on_the_seed_alone(own):
    """Not on the batch, nor on what was drawn before."""
    model = tiny(own, context=40)
    three = dict(SelfPrompts(model, seed=5, batch_size=4).write([0, 1, 2]))
    assert dict(SelfPrompts(model, seed=5, batch_size=1).write([2])) == {2: three[2]}
    assert dict(SelfPrompts(model, seed=6, batch_size=1).write([1])) == {1: three[2]}


def test_reasons_are_told_apart(own):
    opening = opening_of(tiny(own).target)
    end = own.convert_tokens_to_ids("<|im_end|>")
    fine = "Explain tides to me."
    ids = tuple(own(fine, add_special_tokens=False)["input_ids"])
    assert reason_against(fine, Written(ids, True), opening, own) == ""
    marked = Written((*ids, end, *ids), True)
    assert reason_against(fine, marked, opening, own) == "imitates the template"
