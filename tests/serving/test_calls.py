"""Calls of tools that are forced or checked: by the template's markup and the functions' schemas.

The bundled pair knows nothing of tools, so all that a call has comes from its grammar.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken

import dspark
from dspark.errors import RequestError
from dspark.request import Request, SamplingParams
from dspark.serving.openai import grammar
from dspark.serving.openai.chat_template import ChatTemplate
from dspark.serving.openai.grammar import Grammars
from dspark.serving.openai.output_parser import AnswerParser, ToolCall
from dspark.serving.openai.tools import Marks, Tool, call_form, calls_grammar, tool_use

pytest.importorskip("llguidance")
QWEN = (Path(__file__).parents[1] / "data/templates/qwen3.jinja").read_text()
# The same form of calls, of a model that does not reason.
PLAIN = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<tool_call></tool_call><|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '\n' if not loop.first }}{{ '<tool_call>\n{"name": "' }}
{{- call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""  # noqa: E501
BOOK = {
    "type": "object",
    "properties": {"seats": {"$ref": "#/$defs/seats"}, "when": {"enum": ["noon", "night"]}},
    "required": ["seats", "when"],
    "additionalProperties": False,
    "$defs": {"seats": {"type": "integer", "minimum": 1, "maximum": 9}},
}
SAY = {
    "type": "object",
    "properties": {"word": {"enum": ["yes", "no"]}},
    "required": ["word"],
    "additionalProperties": False,
}
NAMES = {"book_table", "say", 'naïve "one"'}


def tool(name, parameters=None, strict=None):
    function = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


TOOLS = [tool("book_table", BOOK), tool("say", SAY), tool('naïve "one"')]


def written(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


BOOK_CALL = written("book_table", '{"seats": 2, "when": "noon"}')
SAY_CALL = written("say", '{"word": "yes"}')


def named(name):
    return {"type": "function", "function": {"name": name}}


def own_model(template):
    made = dspark.load("bundled", dtype="float32")
    made.target.tokenizer.chat_template = template
    return made


@pytest.fixture(scope="module")
def talker():
    """The bundled pair with a template that has tools."""
    return own_model(PLAIN)


@pytest.fixture(scope="module")
def with_marks():
    """The same, of a model that reasons and whose marks are tokens, as Qwen3's: masks alone."""
    model = own_model(QWEN)
    marks = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    model.target.tokenizer.add_tokens([AddedToken(m, normalized=False) for m in marks])
    target = SimpleNamespace(
        tokenizer=model.target.tokenizer,
        vocab_size=len(model.target.tokenizer),
        eos_token_ids=model.target.eos_token_ids,
    )
    return SimpleNamespace(target=target)


@pytest.fixture(scope="module")
def server(talker, kit):
    with kit.serve(talker, max_length=1024) as started:
        yield started


def check(call):
    """A call as its function's schema wants it."""
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    if name == "book_table":
        assert 1 <= arguments.pop("seats") <= 9
        assert arguments.pop("when") in ("noon", "night")
    elif name == "say":
        assert arguments.pop("word") in SAY["properties"]["word"]["enum"]
    else:
        assert name == 'naïve "one"'
    assert arguments == {}
    return name


@pytest.mark.parametrize("choice", ["required", named("book_table"), named('naïve "one"')])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_call(server, choice, temperature):
    reply = server.chat(
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=temperature,
        seed=3,
        n=4,
        max_tokens=120,
    )
    for choice_ in reply.json["choices"]:
        message = choice_["message"]
        (call,) = message["tool_calls"]
        assert message["content"] is None
        assert choice_["finish_reason"] == "tool_calls"
        name = check(call)
        assert choice == "required" or name == choice["function"]["name"]


def test_a_forced_call_in_a_stream(server, kit):
    """The official client puts together what the whole reply has."""
    ask = {
        "model": "bundled",
        "messages": kit.messages(kit.prompts[1]),
        "tools": TOOLS,
        "tool_choice": named("book_table"),
        "max_tokens": 120,
    }
    with server.client() as client:
        (whole,) = client.chat.completions.create(**ask).choices
        chunks = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
    deltas = [call for c in chunks for call in c.delta.tool_calls or []]
    (delta,) = deltas
    assert (delta.index, delta.type) == (0, "function")
    assert delta.function.model_dump() == whole.message.tool_calls[0].function.model_dump()
    assert "".join(c.delta.content or "" for c in chunks) == ""
    assert chunks[-1].finish_reason == whole.finish_reason == "tool_calls"


def test_text_of_a_model_that_may_choose_stays_as_it_is(server):
    def texts(**more):
        reply = server.chat(tools=TOOLS, max_tokens=24, n=2, **more)
        return [choice["message"]["content"] for choice in reply.json["choices"]]

    assert texts(parallel_tool_calls=False) == texts()
    assert all(texts())
    # `strict` is a word of the prompt too, so that other text follows
    strict = [tool("book_table", BOOK, strict=True)]
    assert server.chat(tools=strict, max_tokens=8).json["choices"][0]["message"]["content"]


def masks_for(model, tools=TOOLS, choice=None, parallel=None, reasoning_open=False):
    template = ChatTemplate.of(model.target.tokenizer, "tiny")
    use = tool_use([Tool.model_validate(each) for each in tools], choice, parallel)
    assert use.because is not None
    text = calls_grammar(
        call_form(template, use.told),
        use,
        Marks(model.target.tokenizer.get_added_vocab()),
        reasons=template.mentions("<think>"),
        reasoning_open=reasoning_open,
    )
    grammars = Grammars(model.target)
    return lambda: grammars.lark(text)


def follows(model, make, text):
    """Whether a mask lets a text come, and whether it may end there; or how far it lets it."""
    tokenizer, mask = model.target.tokenizer, make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for place, token in enumerate(ids):
        if not mask.allowed(ids[:place])[token]:
            return tokenizer.decode(ids[:place])
    ends = mask.allowed(ids)[sorted(model.target.eos_token_ids)]
    return bool(ends.all())


@pytest.fixture(params=["talker", "with_marks"])
def speaker(request):
    return request.getfixturevalue(request.param)


def test_what_forced_answers_may_be(speaker):
    several = masks_for(speaker, choice="required")
    assert follows(speaker, several, BOOK_CALL) is True
    assert follows(speaker, several, f"{BOOK_CALL}\n{SAY_CALL}") is True
    assert follows(speaker, several, BOOK_CALL.partition(" 2")[0]) is False
    assert follows(speaker, several, "Let me see.") == ""
    assert follows(speaker, several, BOOK_CALL + " So.") == BOOK_CALL
    assert follows(speaker, several, BOOK_CALL.replace("2", "12")) != BOOK_CALL
    assert "arguments" not in follows(speaker, several, BOOK_CALL.replace("table", "tables"))
    one = masks_for(speaker, choice="required", parallel=False)
    assert follows(speaker, one, SAY_CALL) is True
    assert follows(speaker, one, f"{SAY_CALL}\n{SAY_CALL}") == SAY_CALL
    only = masks_for(speaker, choice=named("say"))
    assert follows(speaker, only, SAY_CALL) is True
    assert follows(speaker, only, f"{SAY_CALL}\n{SAY_CALL}") == SAY_CALL
    assert isinstance(follows(speaker, only, BOOK_CALL), str)


@pytest.mark.parametrize("parallel", [None, False])
def test_whatever_is_drawn_is_calls(speaker, parallel):
    """Any way through the grammar ends in calls of the tools, each as its schema wants it."""
    rng, target = np.random.default_rng(0), speaker.target
    tools = [TOOLS[0], TOOLS[2]]
    make = masks_for(speaker, tools, choice="required", parallel=parallel)
    names = set()
    for _ in range(8):
        mask, ids = make(), list(target.tokenizer("<tool_call>")["input_ids"])  # no thought first
        while ids[-1] not in target.eos_token_ids:
            ids.append(int(rng.choice(np.flatnonzero(mask.allowed(ids)))))
        text = target.tokenizer.decode(ids[:-1], skip_special_tokens=True)
        parser = AnswerParser(reasoning=True, tools=True)
        calls = parser.feed(text) + parser.finish()
        assert calls
        assert parallel is None or len(calls) == 1
        for call in calls:
            assert isinstance(call, ToolCall), text
            names.add(check({"function": {"name": call.name, "arguments": call.arguments}}))
    assert len(names) == 2


def test_what_checked_answers_may_be(speaker):
    tools = [tool("book_table", BOOK, strict=True), tool("say", SAY)]
    strict = masks_for(speaker, tools)
    for text in ("", "Hello <b>", f"Yes. {BOOK_CALL}\n{BOOK_CALL} Done", "<tool_call", BOOK_CALL):
        assert follows(speaker, strict, text) is True, text
    wrong = BOOK_CALL.replace("noon", "never")
    assert isinstance(follows(speaker, strict, f"Yes. {wrong}"), str)
    loose = written("say", '{"at": ["all"]}')
    assert follows(speaker, strict, loose) is True
    one = masks_for(speaker, parallel=False)
    assert follows(speaker, one, f"Yes. {BOOK_CALL}") is True
    assert follows(speaker, one, f"{BOOK_CALL}\n{BOOK_CALL}") == BOOK_CALL
    assert follows(speaker, one, "Hello") is True


def test_only_what_is_no_text_is_kept_out_of_text(talker):
    allowed_V = masks_for(talker, parallel=False)().allowed(())
    tokenizer, ends = talker.target.tokenizer, talker.target.eos_token_ids
    for token in np.flatnonzero(~allowed_V).tolist():
        text = tokenizer.decode([token])
        assert token not in ends
        assert text in tokenizer.all_special_tokens or "\ufffd" in text or text == "<|im_start|>"


@pytest.mark.parametrize("marked", [False, True])
def test_a_model_that_reasons_does_so_first(with_marks, marked):
    model = with_marks if marked else own_model(QWEN)
    thought = f"<think>\nShall I {'' if marked else '<tool_call>'} it?\n</think>\n\n"
    for make in (
        masks_for(model, choice="required"),
        masks_for(model, [tool("book_table", BOOK, strict=True)]),
    ):
        assert follows(model, make, BOOK_CALL) is True
        assert follows(model, make, thought + BOOK_CALL) is True
        assert follows(model, make, thought[:-12]) is False
    begun = masks_for(model, choice="required", reasoning_open=True)
    assert follows(model, begun, thought[8:] + BOOK_CALL) is True
    # that is what the model thinks, or no text
    assert follows(model, begun, BOOK_CALL) == ("" if marked else False)


def test_marks_are_not_spelt_out_where_they_are_tokens(with_marks):
    """Text that looks like a call would be read as one, so that it must be one."""
    tokenizer = with_marks.target.tokenizer
    spelt = [i for part in ("Yes. <tool", "_call>") for i in tokenizer(part)["input_ids"]]
    mask = masks_for(with_marks, [tool("book_table", BOOK, strict=True)])()
    assert mask.allowed(spelt[:-1])[tokenizer("<")["input_ids"][0]]
    assert not mask.allowed(spelt[:-1])[spelt[-1]]


def test_speculation_changes_no_call(talker):
    ids = talker.encode("Book a table:")
    make = masks_for(talker, choice="required")
    for temperature, verifier in ((0.0, "block"), (1.0, "coupled")):
        outputs = []
        for schedule in ("off", "fixed"):
            request = Request(ids, SamplingParams(60, temperature=temperature, seed=5), make())
            engine = talker.engine([request], verifier=verifier, schedule=schedule)
            outputs += engine.run([request])
        assert outputs[0].token_ids == outputs[1].token_ids
        assert outputs[1].stats.verified > 0
        parser = AnswerParser(reasoning=False, tools=True)
        parts = parser.feed(outputs[0].text) + parser.finish()
        assert parts
        assert outputs[0].finish_reason == "length" or all(isinstance(p, ToolCall) for p in parts)


def test_a_mask_is_a_pure_function_of_the_prefix(talker):
    make = masks_for(talker, [tool("book_table", BOOK, strict=True)])
    tokenizer = talker.target.tokenizer
    ids = tokenizer(f"Yes. {BOOK_CALL} So", add_special_tokens=False)["input_ids"]
    fresh = [make().allowed(ids[:n]) for n in range(len(ids))]
    asked = make()
    for i in np.random.default_rng(0).integers(0, len(ids), 60):
        np.testing.assert_array_equal(asked.allowed(ids[:i]), fresh[i])


NAME, ARGUMENTS = "call.function.name", "call.function.arguments | tojson"
OTHERS = {
    "arguments first": PLAIN.replace('{"name": "', '{"arguments": ')
    .replace('", "arguments": ', ', "name": "')
    .replace("'}\n</tool", "'\"}\n</tool")
    .replace(NAME, "(NAME)")
    .replace(ARGUMENTS, NAME)
    .replace("(NAME)", f"({ARGUMENTS})"),
    "no JSON": PLAIN.replace('{"name": "', "<function=").replace('", "arguments": ', ">"),
    "none": "{% if tools %}x{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "refuses": PLAIN + "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}",
}


@pytest.mark.parametrize("template", OTHERS.values(), ids=OTHERS)
def test_templates_that_write_calls_otherwise(model, template):
    class Tokenizer:
        all_special_tokens = ()
        chat_template = template

        def get_chat_template(self, tools=None):
            return template

        def apply_chat_template(self, messages, **options):
            return model.target.tokenizer.apply_chat_template(
                messages, chat_template=template, **options
            )

    with pytest.raises(RequestError, match="cannot be forced"):
        call_form(ChatTemplate(Tokenizer(), "tiny"), TOOLS)


def test_the_form_is_the_template_s(talker):
    template = ChatTemplate.of(talker.target.tokenizer, "tiny")
    form = call_form(template, TOOLS)
    assert (form.before, form.between) == ('\n{"name": "', '", "arguments": ')
    assert (form.after, form.separator) == ("}\n", "\n")
    with_qwen = ChatTemplate.of(own_model(QWEN).target.tokenizer, "tiny")
    assert call_form(with_qwen, TOOLS) == form


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"ignore_eos": True}, "ignore_eos", "ignore_eos"),
        ({"response_format": {"type": "json_object"}}, "response_format", "exclude"),
        ({"tools": [tool("f", {"type": "string"})]}, "tools", "object"),
        ({"tools": [tool("f", {"type": "object", "properties": {"a": {"$ref": "#/x"}}})]}, None,
         "tools' schema cannot be followed"),
    ],
)  # fmt: skip
def test_what_excludes_a_forced_call(server, fields, param, words):
    reply = server.chat(**{"tools": TOOLS, "tool_choice": "required", "max_tokens": 4, **fields})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert words in reply.error["message"]


def test_a_format_rules_over_strict_tools(server):
    strict = [tool("say", SAY, strict=True)]
    regex = {"type": "regex", "pattern": r"<tool_call>\{\}</tool_call>"}
    for tools in (strict, TOOLS):
        reply = server.chat(tools=tools, response_format=regex, max_tokens=40)
        message = reply.json["choices"][0]["message"]
        assert message["content"] == "<tool_call>{}</tool_call>"
        assert "tool_calls" not in message


def test_without_the_package_it_is_refused(server, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        grammar.importlib.util,
        "find_spec",
        lambda name: None if name == "llguidance" else real(name),
    )
    for fields, name in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [tool("say", SAY, strict=True)]}, "tools"),
    ):
        reply = server.chat(**{"tools": TOOLS, "max_tokens": 1, **fields})
        assert reply.status == 400
        assert f"dspark[json], or leave {name} out" in reply.error["message"]
    assert server.chat(tools=TOOLS, tool_choice="auto", max_tokens=1).status == 200
    assert server.chat(tools=TOOLS, tool_choice="none", max_tokens=1).status == 200
