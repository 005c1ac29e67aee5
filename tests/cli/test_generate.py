import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import dspark as package
from dspark.cli import generate as command
from dspark.cli.inputs import encode
from dspark.cli.measure.decoding import Difference, comparable, differences
from dspark.cli.screen import Screen
from dspark.data.conversations import Prompt
from dspark.drafters.checkpoints.checkpoint import save_attached
from dspark.errors import UsageError
from dspark.request import Output, Request, Stats
from tests.helpers.keys import COMPARE, GENERATE

SHORT = ("--max-new-tokens", 12)
ALWAYS = ("--schedule", "fixed")  # the default may find on a busy machine that drafts do not pay


def test_text_on_standard_output_and_a_summary_on_standard_error(dspark, pair):
    expected = package.load(pair.attached).generate(
        messages=[{"role": "user", "content": "how many apples"}], max_new_tokens=12
    )
    result = dspark("generate", pair.attached, "--prompt", "how many apples", *SHORT)
    assert result.status == 0
    assert result.out == expected.text + "\n"
    assert f"{len(expected.token_ids)} tokens" in result.err
    assert "accepted length" in result.err


def test_json_keys_and_their_relations(dspark, pair):
    result = dspark("generate", pair.attached, "--prompt", "two", "--raw", *SHORT, "--json")
    report = result.json
    assert result.status == 0
    assert report.keys() >= GENERATE
    (output,) = report["outputs"]
    assert output.keys() == {"prompt", "text", "token_ids", "finish_reason"}
    assert output["prompt"] == "two"
    assert len(output["token_ids"]) == report["generated_tokens"] <= 12
    assert report["drafted"] >= report["verified"] >= report["accepted"] >= 0
    assert report["tokens"] == report["generated_tokens"] - 1
    assert report["accepted_length"] == report["tokens"] / report["rounds"]
    assert len(report["conditional_acceptance"]) == 4
    assert report["tokens_per_s"] == pytest.approx(report["generated_tokens"] / report["seconds"])
    assert report["draft_ms"] > 0
    assert report["verify_ms"] > 0
    assert output["text"] in result.err
    assert len(result.out.splitlines()) == 1


@pytest.mark.parametrize(
    "draft", ["attached", "published", "ngram", "none", "off"], ids=lambda name: name
)
def test_compare_is_identical_at_temperature_0_with_any_drafter(dspark, pair, draft):
    words = {
        "attached": [pair.attached, *ALWAYS],
        "published": [pair.target, "--draft", pair.drafter, *ALWAYS],
        "ngram": [pair.target, "--draft", "ngram", *ALWAYS],
        "none": [pair.attached, "--draft", "none"],
        "off": [pair.attached, "--schedule", "off"],
    }[draft]
    report = dspark("generate", *words, "--prompt", "a table", *SHORT, "--compare", "--json").json
    assert report.keys() >= COMPARE
    assert report["identical"] is True
    assert report["differences"] == []
    assert report["speedup"] == pytest.approx(report["tokens_per_s"] / report["plain_tokens_per_s"])
    assert (report["drafted"] == 0) == (draft in ("none", "off"))


def test_batch_invariant_mode(dspark, pair, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"how many {i}"}) + "\n" for i in range(3)))
    words = ["--prompts", path, *SHORT, "--dtype", "bfloat16", "--batch-invariant", "--compare"]
    report = dspark("generate", pair.attached, *words, "--json").json
    assert report["identical"] is True
    assert report["accepted"] > 0


def test_cuda_graphs_are_one_switch(dspark, pair):
    words = ["generate", pair.target, "--prompt", "two", *SHORT, "--device", "cpu"]
    result = dspark(*words, "--cuda-graphs")
    assert result.status == 2
    assert "CUDA graphs cannot be used for Qwen3ForCausalLM on cpu" in result.err
    assert dspark(*words, "--no-cuda-graphs").status == 0


@pytest.mark.parametrize(
    ("verifier", "identical"), [("coupled", True), ("token", None), ("block", None)]
)
def test_compare_at_temperature_1(dspark, pair, verifier, identical):
    words = ["--prompt", "two", *SHORT, "--temperature", 1, "--verifier", verifier]
    result = dspark("generate", pair.attached, *words, "--compare", "--json")
    assert result.json["identical"] is identical
    assert ("same distribution, other draws" in result.err) == (identical is None)


def test_compare_batches_both_ways_alike(dspark, pair, tmp_path):
    prompts = [{"turns": [f"how many {i}"]} for i in range(5)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    words = ["--prompts", path, "--batch-size", 2, *SHORT, "--compare"]
    report = dspark("generate", pair.attached, *words, "--json").json
    assert report["identical"] is True
    assert [o["prompt"] for o in report["outputs"]] == [p["turns"][0] for p in prompts]
    shown = dspark("generate", pair.attached, *words)
    texts = [o["text"] for o in report["outputs"]]
    places = [shown.out.index(f"{i + 1} of 5") for i in range(5)]
    assert places == sorted(places)
    assert all(text in shown.out for text in texts)


def test_prompt_kinds_reach_the_model_as_they_should(dspark, pair, tmp_path):
    model = package.load(pair.attached)
    dialogue = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "two apples"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": dialogue}) + "\n" + json.dumps({"prompt": "left"}))
    outputs = dspark("generate", pair.attached, "--prompts", path, *SHORT, "--json").json["outputs"]
    expected = [
        model.generate(messages=dialogue, max_new_tokens=12),
        model.generate(messages=[{"role": "user", "content": "left"}], max_new_tokens=12),
    ]
    assert [tuple(o["token_ids"]) for o in outputs] == [e.token_ids for e in expected]
    raw = dspark("generate", pair.attached, "--prompt", "left", "--raw", *SHORT, "--json").json
    plain_text = model.generate("left", max_new_tokens=12)
    assert tuple(raw["outputs"][0]["token_ids"]) == plain_text.token_ids
    with pytest.raises(UsageError, match="dialogue of 3 messages"):
        encode(Prompt(dialogue, "two apples"), model, raw=True)


def test_standard_input_is_the_prompt_where_none_is_named(dspark, pair, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two apples\n"))
    report = dspark("generate", pair.attached, *SHORT, "--json").json
    assert report["outputs"][0]["prompt"] == "two apples"


def test_a_terminal_without_a_prompt_is_wrong_usage(dspark, pair, monkeypatch):
    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    result = dspark("generate", pair.attached)
    assert result.status == 2
    assert "There is no prompt" in result.err


def test_piped_in_and_out_as_a_program(pair):
    words = ["generate", str(pair.attached), "--max-new-tokens", "4", "--json", "--seed", "7"]
    done = subprocess.run(
        [sys.executable, "-m", "dspark", *words],
        input="two apples",
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated_tokens"] <= 4


def test_options_reach_the_sampler(dspark, pair):
    words = ["--prompt", "two", "--raw", *SHORT, "--json", "--temperature", 5]
    first, again = (
        dspark("generate", pair.attached, *words, "--seed", 3).json["outputs"] for _ in range(2)
    )
    other = dspark("generate", pair.attached, *words, "--seed", 4).json["outputs"]
    assert first == again
    assert first != other
    greedy = dspark("generate", pair.attached, *words[:-2]).json["outputs"]
    for narrow in (["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]):
        assert dspark("generate", pair.attached, *words, *narrow).json["outputs"] == greedy


def test_stop_strings_end_the_text(dspark, pair):
    words = ["generate", pair.attached, "--prompt", "two", "--raw", *SHORT, "--json"]
    text = dspark(*words).json["outputs"][0]["text"]
    stop = text[4:6]
    (output,) = dspark(*words, "--stop", "never there", "--stop", stop).json["outputs"]
    assert output["finish_reason"] == "stop"
    assert output["text"] == text[: text.index(stop)]


def test_several_answers_each_of_its_own_seed(dspark, pair):
    words = ["generate", pair.attached, "--raw", *SHORT, "--temperature", 1, "--json"]
    result = dspark(*words, "--prompt", "two", "--prompt", "one", "--n", 3, "--seed", 4)
    outputs = result.json["outputs"]
    assert [output["prompt"] for output in outputs] == ["two"] * 3 + ["one"] * 3
    assert len({output["text"] for output in outputs}) == 6
    model = package.load(pair.attached)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    answers = [
        answer
        for i, prompt in enumerate(("two", "one"))
        for answer in model.generate(prompt, n=3, seed=4 + i, **options)
    ]
    assert [output["text"] for output in outputs] == [answer.text for answer in answers]


def test_log_probabilities_and_penalties(dspark, pair):
    words = ["generate", pair.attached, "--prompt", "two", "--raw", *SHORT, "--json"]
    (plain,) = dspark(*words).json["outputs"]
    (output,) = dspark(*words, "--logprobs", 2).json["outputs"]
    assert {key: output[key] for key in plain} == plain
    for token, found in zip(output["token_ids"], output["logprobs"], strict=True):
        (best, value), (_, second) = found["top"]
        assert (best, value) == (token, found["logprob"])
        assert 0 > value >= second
    for name in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        (output,) = dspark(*words, name, 1.9).json["outputs"]
        changed = len(set(plain["token_ids"])) < len(plain["token_ids"])
        assert changed
        assert output["token_ids"] != plain["token_ids"]


def test_a_timeout_ends_an_answer_as_it_is(dspark, pair):
    words = ["generate", pair.attached, "--prompt", "two", "--raw", *SHORT, "--json"]
    (output,) = dspark(*words, "--timeout", 1e-9).json["outputs"]
    assert (output["finish_reason"], output["token_ids"]) == ("timeout", [])
    (output,) = dspark(*words, "--timeout", 1e9).json["outputs"]
    assert output["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", 0], "n is 0, but must be an integer from 1 to 128"),
        (["--logprobs", 3], "--logprobs is 3, but only --json shows them"),
        (["--logprobs", 21, "--json"], "logprobs is 21"),
        (["--timeout", 3, "--compare"], "--timeout is 3.0, but --compare compares whole answers"),
        (["--timeout", 0], "timeout_s is 0.0"),
        (["--stop", "x" * 70_000], "stop has 1 strings of 70000 characters"),
    ],
)
def test_requests_that_mean_nothing(dspark, pair, words, message):
    result = dspark("generate", pair.attached, "--prompt", "two", *words)
    assert result.status == 2
    assert message in result.err


def test_block_size_and_threshold_limit_what_is_verified(dspark, pair):
    words = ["generate", pair.attached, "--prompt", "two", "--raw", *SHORT, "--json"]
    small = dspark(*words, "--block-size", 2).json
    assert len(small["conditional_acceptance"]) == 2
    strict = dspark(*words, "--schedule", "threshold", "--threshold", 1).json
    assert strict["verified"] == 0
    assert strict["drafted"] > 0
    assert strict["outputs"] == small["outputs"]


def test_drafted_tokens_are_coloured_and_control_characters_dropped_on_a_terminal():
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    Screen(out=terminal).write("a\x1b[2J\tb\r\n", command.DRAFTED)
    shown = terminal.file.getvalue()
    assert "\x1b[32ma[2J" in shown
    assert "\r" not in shown
    assert "\x1b[2J" not in shown
    pipe = Console(file=io.StringIO())
    Screen(out=pipe).write("a\x1b[2J\tb\r\n", command.DRAFTED)
    assert pipe.file.getvalue() == "a\x1b[2J\tb\r\n"


def test_threads(dspark, pair):
    words = ["generate", pair.attached, "--prompt", "two", "--max-new-tokens", 2, "--threads", 2]
    assert dspark(*words).status == 0
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--max-new-tokens", 0], 2, "max_new_tokens is 0"),
        (["--temperature", -1], 2, "temperature is -1.0"),
        (["--top-p", 0], 2, "top_p is 0.0"),
        (["--stop", ""], 2, "stop is ('',)"),
        (["--batch-size", 0], 2, "--batch-size is 0"),
        (["--block-size", 9], 2, "The block size is 9"),
        (["--threshold", 0.5], 2, "only with it"),
        (["--schedule", "threshold"], 2, "Give a threshold"),
        (["--schedule", "threshold", "--threshold", 2], 2, "The threshold is 2.0"),
        (["--draft", "none", "--block-size", 2], 2, "nothing is drafted here"),
        (["--draft", "none", "--schedule", "fixed"], 2, "nothing is drafted here"),
        (["--schedule", "off", "--block-size", 2], 2, "nothing is drafted here"),
        (["--device", "abacus"], 2, "device is 'abacus'"),
        (["--draft", "/no/such/drafter"], 1, "/no/such/drafter"),
    ],
)
def test_bad_options_are_one_sentence_and_a_status(dspark, pair, words, status, sentence):
    result = dspark("generate", pair.attached, "--prompt", "two", *words)
    assert result.status == status
    assert result.out == ""
    assert result.err.startswith("dspark: ")
    assert result.err.count("\n") == 1
    assert sentence in result.err


def test_a_threshold_works_with_prompt_lookup(dspark, pair):
    words = [pair.target, "--prompt", "two two two", "--draft", "ngram", "--json"]
    free = dspark("generate", *words).json
    trimmed = dspark("generate", *words, "--schedule", "threshold", "--threshold", 1).json
    assert trimmed["outputs"] == free["outputs"]
    assert free["verified"] > trimmed["verified"] == 0


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("", "The prompt is empty"), ("table for two " * 200, "the context holds 160")],
    ids=["empty", "long"],
)
def test_prompts_that_cannot_be_served(dspark, pair, prompt, sentence):
    result = dspark("generate", pair.attached, "--prompt", prompt)
    assert (result.status, result.out) == (1, "")
    assert sentence in result.err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        ("", "holds no prompt"),
        ("{", "line 1 is not valid JSON"),
        ('{"question": "why"}', "needs 'messages', 'turns' or a non-empty 'prompt'"),
    ],
)
def test_bad_prompt_files(dspark, pair, tmp_path, content, sentence):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    result = dspark("generate", pair.attached, "--prompts", path)
    assert (result.status, result.out) == (1, "")
    assert sentence in result.err


def test_a_drafter_of_another_width_is_refused(dspark, pair, wide_pair):
    result = dspark("generate", pair.target, "--draft", wide_pair.drafter, "--prompt", "two")
    assert (result.status, result.out) == (1, "")
    assert "hidden_size is 32, but the target's is 16" in result.err


def test_a_half_written_checkpoint_is_refused(dspark, pair, tmp_path):
    for source in pair.target.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = dspark("generate", tmp_path, "--prompt", "two")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("dspark: ")


@pytest.mark.faulty
def test_a_drafter_of_nan_weights_is_done_without_and_named(dspark, pair, tmp_path, caplog):
    model = package.load(pair.attached)
    for source in pair.target.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert model.drafter is not None
    with torch.no_grad():
        model.drafter.norm.weight.fill_(float("nan"))
    save_attached(model.drafter, tmp_path, dtype=None)
    result = dspark("generate", tmp_path, "--prompt", "two", "--max-new-tokens", "9")
    plain = dspark("generate", pair.target, "--prompt", "two", "--max-new-tokens", "9")
    assert (result.status, result.out) == (0, plain.out)
    assert "The drafter failed" in caplog.text


def test_where_outputs_depart_and_how_near_the_tie_is(pair):
    model = package.load(pair.target, "none")
    request = Request(model.encode("two"))
    right = model.generate("two", max_new_tokens=6)
    wrong_ids = (*right.token_ids[:3], (right.token_ids[3] + 1) % 300, *right.token_ids[4:])
    wrong = Output("two", "", wrong_ids, "length", Stats())
    assert differences(model.target, [request], [right], [right]) == []
    (found,) = differences(model.target, [request], [wrong], [right])
    assert (found.request, found.position) == (0, 3)
    assert found.top2_gap > 1e-5
    assert "differs from token 4 on" in found.sentence(torch.float32)
    assert "please report" in found.sentence(torch.float32)
    assert "rounding of bfloat16" in found.sentence(torch.bfloat16)
    assert "report" in Difference(0, 3, 1e-6).sentence(torch.bfloat16, batch_invariant=True)
    assert "a tie that rounding decides" in Difference(0, 3, 1e-6).sentence(torch.float32)


def test_a_difference_is_reported_and_not_hidden(dspark, pair, monkeypatch):
    from dspark.cli.measure import decoding

    honest, calls = decoding.decode, []

    def second_call_lies(*args, **kwargs):
        decoded = honest(*args, **kwargs)
        calls.append(decoded)
        if len(calls) == 2:
            (output,) = decoded.outputs
            changed = (*output.token_ids[:-1], (output.token_ids[-1] + 1) % 300)
            decoded.outputs[0] = Output("", "", changed, "length", output.stats)
        return decoded

    monkeypatch.setattr(decoding, "decode", second_call_lies)
    words = ["generate", pair.attached, "--prompt", "two", "--raw", *SHORT, "--compare", "--json"]
    result = dspark(*words)
    assert result.json["identical"] is False
    (difference,) = result.json["differences"]
    assert difference["position"] == len(result.json["outputs"][0]["token_ids"]) - 1
    assert "DIFFERENT output" in result.err


def test_when_outputs_must_agree():
    assert comparable(0.0, "block")
    assert comparable(1.0, "coupled")
    assert not comparable(1.0, "token")
