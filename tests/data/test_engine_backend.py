"""Regeneration by our own engine."""

import json
import re

import pytest

from dspark.data.answers.engine_backend import EngineResponder
from dspark.data.answers.regenerate import journal_path, regenerate
from dspark.data.answers.replay import AnswerFilters, Reply, repeats_gram
from dspark.data.answers.sampling import choose_sampling, recommended_sampling
from dspark.data.conversations import Dialogue
from dspark.data.samples import conversation_samples, read_samples
from dspark.engine.model import Model
from dspark.errors import DataError
from dspark.params import SamplingParams
from dspark.request import Output, Stats
from dspark.targets.target import Target
from tests.helpers.targets import tiny_qwen3


def tiny(tokenizer, context=256):
    model = tiny_qwen3(
        seed=0,
        vocab_size=len(tokenizer),
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Model(Target.from_model(model, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def model(family):
    return tiny(family("qwen3"))


def params(max_new_tokens=6, **fields):
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=1.0, **fields)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_many_conversations_at_once_equal_each_alone(model, tmp_path):
    turns = [
        [{"role": "user", "content": f"{'cat ' * i}?"}, {"role": "assistant", "content": ""}]
        for i in range(9)
    ]
    records = [{"messages": turns[i] + turns[8 - i] + turns[i][:1]} for i in range(9)]
    source = write(tmp_path / "p.jsonl", *records)
    greedy = SamplingParams(
        max_new_tokens=6, temperature=0.0, stop_token_ids=tuple(range(40, 300, 3))
    )
    responder = EngineResponder(
        model, greedy, template_options={"enable_thinking": False}, batch_size=4
    )
    report = regenerate(responder, source, tmp_path / "o.jsonl")
    assert report.records == 9
    rounds = 0
    for record, done in zip(records, lines(tmp_path / "o.jsonl"), strict=True):
        said = []
        for message in [*record["messages"], {"role": "assistant"}]:
            if message["role"] != "assistant":
                said.append(message)
                continue
            ids = model.target.tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_dict=True, enable_thinking=False
            )["input_ids"]
            prompt = model.target.tokenizer.decode(ids)
            out = model.generate(
                prompt, max_new_tokens=6, stop_token_ids=greedy.stop_token_ids, temperature=0.0
            )
            said.append({"role": "assistant", "content": out.text})
            rounds += 1
            if out.finish_reason != "stop":
                break
        assert done["messages"] == said
        assert done["chat_template_kwargs"] == {"enable_thinking": False}
    assert rounds > 15  # else too few had a second answer


def test_a_seed_names_a_lines_answers_whatever_the_batch(model, tmp_path):
    source = write(tmp_path / "p.jsonl", *({"turns": [f"{i}?"]} for i in range(12)))

    def answers(seed, batch_size):
        responder = EngineResponder(model, params(seed=seed), batch_size=batch_size)
        regenerate(responder, source, tmp_path / "o.jsonl")
        return lines(tmp_path / "o.jsonl")

    assert answers(1, 1) == answers(1, 5) != answers(2, 5)


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    source = write(tmp_path / "p.jsonl", *({"turns": [f"{i}?"]} for i in range(12)))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    responder = EngineResponder(model, params(), batch_size=2)
    regenerate(responder, source, whole)

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(responder, source, cut, progress=interrupt)
    assert len(lines(journal_path(cut))) == 6
    report = regenerate(responder, source, cut)
    assert (report.resumed, report.records) == (5, 12)
    assert cut.read_text() == whole.read_text()


def test_what_cannot_be_answered_is_listed(model, tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        {"turns": ["a"]},
        {"turns": ["cat sat " * 200]},
        {"messages": [{"role": "system", "content": "s"}]},
        {"prompt": "Once"},
        {"turns": ["cat", "x " * 300]},
    )
    report = regenerate(EngineResponder(model, params()), source, tmp_path / "o.jsonl")
    assert (report.input, report.records, report.failed) == (5, 3, 2)
    faults = {record["line"]: record["error"] for record in lines(report.failures)}
    assert faults[2] == "The prompt fills the model's whole context."
    assert "no user turn" in faults[3]
    chat, raw, _ = lines(tmp_path / "o.jsonl")
    assert chat["messages"][0] == {"role": "user", "content": "a"}
    assert raw["input_ids"][: raw["prompt_len"]] == list(model.encode("Once"))
    assert len(raw["input_ids"]) > raw["prompt_len"]


def test_regenerated_answers_become_the_tokens_that_were_drawn(model, tmp_path):
    source = write(tmp_path / "p.jsonl", *({"turns": [f"{i}?"]} for i in range(8)))
    tokenizer = model.target.tokenizer
    responder = EngineResponder(model, params(), template_options={"enable_thinking": False})
    regenerate(responder, source, tmp_path / "o.jsonl")
    for record, sample in zip(
        lines(tmp_path / "o.jsonl"), read_samples(tmp_path / "o.jsonl", tokenizer), strict=True
    ):
        shown = [t for t, mine in zip(sample.input_ids, sample.loss_mask, strict=True) if mine]
        end = "<|im_end|>" if record["finish_reason"] == "stop" else ""
        assert tokenizer.decode(shown) == record["messages"][-1]["content"] + end


def output(model, text, reason="stop"):
    ids = model.target.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Output("", re.sub(r"<\|im_end\|>", "", text), tuple(ids), reason, Stats())


def answered(model, monkeypatch, tmp_path, record, texts, options=None):
    """What regeneration makes of a model that says `texts`, one after another."""
    from dspark.data.answers import engine_backend as by_engine

    replies = iter(texts)
    wrapped = by_engine._Chunk._reply

    def reply(self, script, given):
        text, reason = next(replies)
        return wrapped(self, script, output(model, text, reason))

    responder = EngineResponder(model, params(40), template_options=options or {})
    with monkeypatch.context() as patch:
        patch.setattr(by_engine._Chunk, "_reply", reply)
        regenerate(responder, write(tmp_path / "p.jsonl", record), tmp_path / "o.jsonl")
    return lines(tmp_path / "o.jsonl")[0]


def test_thinking_is_kept_apart_and_comes_back_as_it_was(model, monkeypatch, tmp_path):
    said = "<think>\none and one\n</think>\n\n2<|im_end|>"
    texts = [(said, "stop"), (said, "stop")]
    record = answered(model, monkeypatch, tmp_path, {"turns": ["1+1?", "again"]}, texts)
    thought = {"role": "assistant", "content": "2", "thinking": "one and one"}
    assert record["messages"][1::2] == [thought, thought]
    tokenizer = model.target.tokenizer
    samples = conversation_samples(tokenizer, Dialogue.of(record, "here"))
    for sample in samples:
        shown = [t for t, mine in zip(sample.input_ids, sample.loss_mask, strict=True) if mine]
        assert tokenizer.decode(shown) == said
    assert len(samples) == 2


def test_an_answer_that_ends_within_its_thinking_is_none(model, monkeypatch, tmp_path):
    texts = [("<think>\na\n</think>\n\n2<|im_end|>", "stop"), ("<think>\nand so on", "length")]
    record = answered(model, monkeypatch, tmp_path, {"turns": ["a", "b"]}, texts)
    assert [m["content"] for m in record["messages"]] == ["a", "2"]
    assert record["finish_reason"] == "stop"
    with pytest.raises(DataError, match="ended within its thinking"):
        answered(model, monkeypatch, tmp_path, {"turns": ["a"]}, [("<think>\nso", "length")])


def test_text_about_marks_is_text_where_thinking_is_off(model, monkeypatch, tmp_path):
    texts = [("what </think> means<|im_end|>", "stop")]
    off = {"enable_thinking": False}
    record = answered(model, monkeypatch, tmp_path, {"turns": ["a"]}, texts, off)
    assert record["messages"][1] == {"role": "assistant", "content": "what </think> means"}


def test_the_same_call_of_a_tool_is_answered_by_what_the_tool_said(model, monkeypatch, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    source = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "old"},
        ]
    }
    off = {"enable_thinking": False}
    same = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    texts = [(same, "stop"), ("two<|im_end|>", "stop")]
    record = answered(model, monkeypatch, tmp_path, source, texts, off)
    assert [m["content"] for m in record["messages"]] == ["x", "", "2", "two"]
    assert record["messages"][1]["tool_calls"] == [call]
    other = same.replace("1", "3")
    record = answered(model, monkeypatch, tmp_path, source, [(other, "stop")], off)
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
    assert record["messages"][1]["content"] == other.removesuffix("<|im_end|>")


@pytest.mark.parametrize(
    ("config", "given", "chosen"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 2},
            {},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        ),
        (
            {"temperature": 0.6, "top_k": 20},
            {"temperature": 1.0},
            {"temperature": 1.0, "top_k": 20},
        ),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.0}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6}, {}, {}),
        ({"top_p": 1.0, "top_k": 0}, {}, {}),
        ("broken", {}, {}),
        (None, {"top_p": 0.5}, {"top_p": 0.5}),
    ],
)
def test_sampling_is_as_asked_else_as_recommended(tmp_path, config, given, chosen):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "generation_config.json").write_text(text)
    sampling = choose_sampling(given, recommended_sampling(str(tmp_path)))
    assert sampling.values == chosen
    assert sampling.params(7, 3).temperature == chosen.get("temperature", 1.0)


def reply(text="a b", ids=(1, 2), reason="stop"):
    return Reply(text, reason, token_ids=tuple(ids))


def test_a_repeated_gram_is_seen():
    assert repeats_gram([*range(8), *range(8)], 8)
    assert repeats_gram("a" * 9, 8)
    assert not repeats_gram([*range(8), *range(7)], 8)
    assert not repeats_gram("ab", 8)
    assert not repeats_gram("aa", 0)


@pytest.mark.parametrize(
    ("wanted", "given", "kept"),
    [
        (AnswerFilters(), reply(reason="length"), True),
        (AnswerFilters(finished=True), reply(reason="length"), False),
        (AnswerFilters(finished=True), reply(), True),
        (AnswerFilters(word_gram=2), reply("a b a b", range(4)), False),
        (AnswerFilters(word_gram=2), reply("a b", (1, 2, 1, 2)), True),
        (AnswerFilters(token_gram=2), reply("a b", (1, 2, 1, 2)), False),
        (AnswerFilters(token_gram=2), reply("a b a b", range(4)), True),
        (AnswerFilters(token_gram=3, word_gram=3), reply("a b a b", (1, 2, 1, 2)), True),
        (AnswerFilters(without=("c", "b")), reply("a b"), False),
        (AnswerFilters(without=("c",)), reply("a b"), True),
    ],
)
def test_wanted_answers(wanted, given, kept):
    assert wanted.keeps(given) is kept
