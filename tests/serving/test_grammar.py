"""Constrained answers follow their format, whatever is drafted, and the drafts do too."""

import importlib.util
import json
import re

import numpy as np
import pytest

from dspark.errors import RequestError
from dspark.request import Request, SamplingParams
from dspark.serving.openai import grammar
from dspark.serving.openai.grammar import Grammars

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Anna"]}, "apples": {"type": "integer", "maximum": 9}},
    "required": ["name", "apples"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def grammars(model):
    return Grammars(model.target)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_over_http(live, kit, temperature, stream):
    with live.client() as client:
        answer = client.chat.completions.create(
            model="bundled",
            messages=kit.messages(kit.prompts[2]),
            max_tokens=60,
            temperature=temperature,
            seed=1,
            response_format=FORMAT,
            stream=stream,
        )
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in answer)
        else:
            text = answer.choices[0].message.content
            assert answer.choices[0].finish_reason == "stop"
    found = json.loads(text)
    assert found["name"] in ("Tom", "Anna")
    assert isinstance(found["apples"], int)


def test_a_regex_and_a_grammar_over_http(live):
    ask = {"prompt": "A number:", "max_tokens": 30, "n": 2, "temperature": 1.0}
    regex = {"type": "regex", "pattern": "[0-9]{3}-[a-c]+z"}
    for choice in live.post("/v1/completions", {**ask, "response_format": regex}).json["choices"]:
        assert choice["finish_reason"] == "length" or re.fullmatch(
            "[0-9]{3}-[a-c]+z", choice["text"]
        )
    lark = {"type": "grammar", "grammar": 'start: "yes" | "no"'}
    for choice in live.post("/v1/completions", {**ask, "response_format": lark}).json["choices"]:
        assert choice["text"] in ("yes", "no")


def test_any_json_object_begins_as_one(live):
    reply = live.chat(max_tokens=12, response_format={"type": "json_object"})
    assert reply.json["choices"][0]["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "regex", "pattern": "(("},
        {"type": "grammar", "grammar": "start: nothing"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/none"}}},
    ],
)
def test_formats_that_cannot_be_followed(live, wrong):
    reply = live.chat(max_tokens=4, response_format=wrong)
    assert reply.status == 400
    assert "cannot be followed" in reply.error["message"]


def test_a_format_ends_the_answer(live):
    reply = live.chat(response_format={"type": "json_object"}, ignore_eos=True)
    assert (reply.status, reply.error["param"]) == (400, "ignore_eos")


def test_speculation_changes_nothing(model, grammars):
    ids = model.encode("Name and apples:")
    for temperature, verifier in ((0.0, "block"), (1.0, "coupled")):
        outputs = []
        for schedule in ("off", "fixed"):
            request = Request(
                ids,
                SamplingParams(40, temperature=temperature, seed=5),
                grammars.json_schema(SCHEMA),
            )
            engine = model.engine([request], verifier=verifier, schedule=schedule)
            outputs += engine.run([request])
        assert outputs[0].token_ids == outputs[1].token_ids
        assert outputs[1].stats.verified > 0


def test_a_mask_is_a_pure_function_of_the_prefix(model, grammars):
    """Asked in any order it says what a fresh one says."""
    output = Request(model.encode("x"), SamplingParams(30), grammars.json_schema(SCHEMA))
    (done,) = model.engine([output]).run([output])
    prefixes = [done.token_ids[:n] for n in range(len(done.token_ids))]
    fresh = [grammars.json_schema(SCHEMA).allowed(prefix) for prefix in prefixes]
    asked = grammars.json_schema(SCHEMA)
    for i in np.random.default_rng(0).integers(0, len(prefixes), 40):
        np.testing.assert_array_equal(asked.allowed(prefixes[i]), fresh[i])
    end = sorted(model.target.eos_token_ids)
    assert fresh[-1][end].all()
    assert not fresh[0][end].any()
    with pytest.raises(RequestError, match="left the grammar"):
        asked.allowed((end[0],))
    np.testing.assert_array_equal(asked.allowed(prefixes[3]), fresh[3])


def test_without_the_package_it_is_refused(live, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        grammar.importlib.util,
        "find_spec",
        lambda name: None if name == "llguidance" else real(name),
    )
    reply = live.chat(response_format={"type": "json_object"})
    assert reply.status == 400
    assert "dspark[json]" in reply.error["message"]
    assert live.chat(max_tokens=1, response_format={"type": "text"}).status == 200
