"""What `dspark.load` returns: prompts in, text out."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

import dspark
from dspark.drafters.checkpoints.checkpoint import save_attached
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.loading import load
from dspark.engine.model import Model
from dspark.engine.options import split_options
from dspark.errors import CheckpointError, CompatibilityError, RequestError, UsageError
from dspark.request import Output, SamplingParams
from dspark.targets.target import Target

OPTIONS = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory(tiny, tokenizer, tmp_path_factory):
    """A target on disk, its drafter attached."""
    path = tmp_path_factory.mktemp("pair")
    model = tiny.make_model(vocab=len(tokenizer), seed=3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    target = Target.from_model(model)
    save_attached(tiny.make_drafter(target), path, dtype=None)
    return path


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


def test_load_takes_the_attached_drafter(model, directory):
    assert isinstance(model, Model)
    assert model.drafter.config.block_size == 5
    assert load(directory, "none").drafter is None
    assert isinstance(load(directory, "ngram").drafter, NgramDrafter)
    assert load(directory, str(directory)).drafter.config == model.drafter.config
    assert dspark.load is load


def test_load_without_an_attached_drafter(tiny, tmp_path):
    tiny.make_model().save_pretrained(tmp_path)
    assert load(tmp_path).drafter is None


def test_load_refuses(directory, tiny, tmp_path):
    with pytest.raises(CheckpointError):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        load(directory, tmp_path / "nowhere")
    tiny.make_model(vocab=32).save_pretrained(tmp_path)
    with pytest.raises(CompatibilityError, match="vocab_size"):
        load(tmp_path, directory)


def test_generate_one_and_many(model):
    one = model.generate("the cat", **OPTIONS)
    assert isinstance(one, Output)
    assert one.prompt == "the cat"
    assert len(one.token_ids) == 12
    assert one.text == model.target.tokenizer.decode(one.token_ids, skip_special_tokens=True)
    plain = Model(model.target).generate("the cat", **OPTIONS)
    assert plain.token_ids == one.token_ids
    prompts = ["the cat", "the dog sat", "on"]
    many = model.generate(prompts, batch_size=2, **OPTIONS)
    assert [output.prompt for output in many] == prompts
    assert many[0].token_ids == one.token_ids
    assert model.generate([], **OPTIONS) == []


def test_prompts_of_a_list_draw_with_seeds_of_their_own(model):
    options = {"temperature": 1.0, **OPTIONS}
    first, second = model.generate(["the cat"] * 2, seed=5, **options)
    assert first.token_ids != second.token_ids
    assert model.generate("the cat", seed=6, **options).token_ids == second.token_ids


def test_engine_options_act(model):
    given = {"verifier": "coupled", "temperature": 1.0, "schedule": "fixed", **OPTIONS}
    base = model.generate("the cat", **given)
    acting = ({"block_size": 2}, {"schedule": "off"}, {"schedule": "threshold", "threshold": 0.5})
    for options in acting:
        output = model.generate("the cat", **(given | options))
        assert output.token_ids == base.token_ids
        assert output.stats.verified < base.stats.verified


def test_stream(model):
    pieces = list(model.stream("the cat", **OPTIONS))
    output = model.generate("the cat", **OPTIONS)
    assert "".join(pieces) == output.text
    assert [piece.text for piece in pieces] == pieces
    for twin in (copy.copy(pieces[0]), pickle.loads(pickle.dumps(pieces[0]))):
        assert (twin, twin.token_id, twin.drafted) == (*pieces[:1], pieces[0].token_id, False)
    assert json.loads(json.dumps(pieces)) == pieces
    assert tuple(piece.token_id for piece in pieces) == output.token_ids


def test_messages_go_through_the_chat_template(model):
    messages = [{"role": "user", "content": "the cat"}]
    output = model.generate(messages=messages, **OPTIONS)
    ids = model.encode("the cat", raw=False)
    assert model.encode(messages) == ids
    assert output.prompt == "the cat"
    text = model.target.tokenizer.decode(ids)
    assert text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    pieces = list(model.stream(messages=messages, **OPTIONS))
    assert tuple(piece.token_id for piece in pieces) == output.token_ids


@pytest.mark.parametrize(
    ("prompt", "messages", "message"),
    [
        (None, None, "either a prompt or messages"),
        ("a", [{"role": "user", "content": "b"}], "either a prompt or messages"),
        (["a"], [{"role": "user", "content": "b"}], "either prompts or messages"),
        ("  \n", None, "prompt is empty"),
        (None, [], "list of messages is empty"),
        (None, [{"role": "user"}], "must have a 'role' and a 'content'"),
        (5, None, "prompt is 5, but must be a text or a list of texts"),
        (b"a", None, "prompt is b'a', but must be a text or a list of texts"),
        ({"role": "user"}, None, "prompt is {'role': 'user'}, but must be a text or a list"),
        ([5], None, "prompt is 5, but must be a text or a list of messages"),
        ([["a"]], None, "A message is 'a', but must have"),
        (None, 5, "prompt is 5, but must be a text or a list of messages"),
        (None, [5], "A message is 5, but must have"),
        (None, [{"role": "wizard", "content": "a"}], "has the role 'wizard', but roles are system"),
        (None, [{"role": 1, "content": "a"}], "must have a 'role' and a 'content'"),
    ],
)
def test_prompts_that_mean_nothing(model, prompt, messages, message):
    with pytest.raises(RequestError, match=message):
        model.generate(prompt, messages=messages, **OPTIONS)


def test_a_template_that_refuses(model, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(model.target.tokenizer, "chat_template", template)
    with pytest.raises(RequestError, match="refuses the messages: roles must alternate"):
        model.encode([{"role": "user", "content": "b"}])


def test_a_tokenizer_without_a_template(model, monkeypatch):
    monkeypatch.setattr(model.target.tokenizer, "chat_template", None)
    assert model.encode("the cat", raw=False) == model.encode("the cat")
    with pytest.raises(RequestError, match="no chat template"):
        model.encode([{"role": "user", "content": "b"}])


def test_a_target_without_a_tokenizer(target):
    with pytest.raises(RequestError, match="has no tokenizer"):
        Model(target).generate("the cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "no option 'temprature'"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"schedule": "sometimes"}, "schedule is 'sometimes'"),
        ({"threshold": 0.5}, "Give a threshold"),
        ({"verifier": "hope"}, "verifier is 'hope'"),
        ({"block_size": 9}, "block size is 9"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_that_cannot_be_used(model, options, message):
    with pytest.raises(UsageError, match=message):
        model.generate("the cat", **options)


def test_split_options():
    options = {"temperature": 0.5, "stop": "x", "batch_size": 2, "timeout_s": 3.0}
    params, limits, engine = split_options(options)
    assert params == SamplingParams(temperature=0.5, stop=("x",))
    assert limits == {"timeout_s": 3.0}
    assert engine == {"batch_size": 2}


def test_an_engine_for_nobody(model):
    with pytest.raises(RequestError, match="no requests"):
        model.engine([])


def test_a_prompt_longer_than_the_context(model, tiny):
    with pytest.raises(RequestError, match=f"context holds {tiny.max_context}"):
        model.generate("0 1 2 3 4 5 6 7 8 9 " * 10)
