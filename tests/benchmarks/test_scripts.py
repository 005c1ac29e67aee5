"""The measurements run from end to end on a tiny pair, and see what they are there to see."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    bundled,
    identity,
    inflate,
    inflated,
    protection,
    sequential_head,
    speedup,
    study,
)
from benchmarks.common import Tally, load_pair, rounded, side_by_side
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.errors import DataError
from dspark.request import Output, SamplingParams, Stats

SHAPE = "4,32,4,2,16,48"


def test_bundled_compares_all_ways(run):
    line = run(bundled, "--prompts", "2", "--max-new-tokens", "5")
    assert line["environment"]["dtype"] == "float32"
    greedy = [line["domains"][domain]["t0"] for domain in DOMAINS]
    assert [row["identical"] for row in greedy] == [2, 2, 2]
    assert [row["identical_to_transformers"] for row in greedy] == [2, 2, 2]
    speedups = [row["speedup"] for row in greedy]
    assert line["macro"]["speedup_t0"] == pytest.approx(sum(speedups) / 3, rel=1e-3)
    reached = line["macro"]["speedup_t0"] >= 2.0
    assert line["floors"]["speedup_t0"]["reached"] is reached


def test_protection_compares_bad_drafters_with_plain_decoding(run):
    line = run(protection, "--quick", "--slow-ms", "2", use_data=False)
    for kind in protection.DRAFTERS:
        for load in protection.QUICK["load"]:
            row = line[f"{kind}, {load}"]
            assert row["first"] > 0
            assert len(row["later_all"]) == 1
            assert row["reached"] is (row["later"] >= protection.FLOOR)
    rows = [row for row in line.values() if isinstance(row, dict) and "later" in row]
    assert len(rows) == len(protection.DRAFTERS) * len(protection.QUICK["load"])
    assert line["worst"] == min(row["later"] for row in rows)


def test_a_stopped_race_goes_on(run, tmp_path):
    laps = tmp_path / "laps.jsonl"
    options = ("--max-new-tokens", "5", "--tasks", "gsm8k", "--schedule", "auto")
    options = (*options, "--out", str(laps))
    whole = run(speedup, *options, "--limit", "3")
    settings, *written = laps.read_text().splitlines()
    laps.write_text("\n".join([settings, *written[:3]]) + "\n")
    line = run(speedup, *options, "--limit", "3")
    resumed = laps.read_text().splitlines()
    assert resumed[:4] == [settings, *written[:3]]
    places = [[json.loads(x)[name] for name in ("prompt", "temperature")] for x in resumed[1:]]
    assert sorted(places) == [[i, t] for i in range(3) for t in (0.0, 1.0)]
    assert whole["t0"].keys() == line["t0"].keys() == {"gsm8k", "all"}
    with pytest.raises(DataError, match="belongs to a run with limit"):
        run(speedup, *options, "--limit", "2")
    for temperature in ("t0", "t1"):
        assert line[temperature]["all"]["prompts"] == 3
        low, high = line[temperature]["all"]["ci95"]
        assert low <= line[temperature]["gsm8k"]["speedup"] <= high


def test_identity_passes_on_an_honest_engine(run):
    options = ("--prompts", "4", "--coupled-prompts", "3", "--max-new-tokens", "5")
    with pytest.raises(SystemExit) as ended:
        run(identity, *options)
    assert ended.value.code == 0


def test_identity_reports_a_wrong_token(pair, data):
    model = load_pair(str(pair), "float32")
    params = SamplingParams(max_new_tokens=5)
    requests = domain_requests(model, data, "gsm8k", 2, params)
    right = identity.Setting("block", 1).run(model.target, None, requests)
    first = right[1].token_ids
    wrong = replace(right[1], token_ids=(*first[:2], first[2] ^ 1, *first[3:]))
    (place,) = identity.differences(model.target, requests, right, [right[0], wrong])
    assert (place["prompt"], place["position"], place["tolerated"]) == (1, 2, False)
    assert place["gap"] > identity.TOLERATED_GAP


def test_inflated_checks_and_times(run):
    line = run(
        inflated, "--prompts", "2", "--max-new-tokens", "5", "--shape", SHAPE,
        "--check-prompts", "1",
    )  # fmt: skip
    check = line["check_fp32"]
    for name in ("t0", "t1"):
        assert check[name] == {"answers": 3, "same_tokens": 3, "same_accepted": 3}
    assert check["logit_deviation"] < 1e-4
    assert line["environment"]["dtype"] == "bfloat16"
    assert line["macro"]["speedup_t1"] > 0


def test_inflate_writes_a_pair_that_loads(run, tmp_path, pair, data):
    options = ("--shape", SHAPE, "--dtype", "float32", str(tmp_path))
    line = run(inflate, *options, use_data=False)
    assert line["logit_deviation"] < 1e-4
    small, large = (load_pair(str(path), "float32") for path in (pair, tmp_path))
    assert large.target.num_layers == 4
    (request,) = domain_requests(small, data, "chat", 1, SamplingParams(max_new_tokens=6))
    outputs = [model.engine([request]).run([request])[0] for model in (small, large)]
    assert outputs[0].token_ids == outputs[1].token_ids


HEAD_SHAPE = "6,32,4,2,16,48"


def test_sequential_head_times_every_head_at_every_block_size(run):
    line = run(
        sequential_head, "--shape", HEAD_SHAPE, "--vocab-size", "80", "--rank", "4",
        "--draft-layers", "1", "--block-sizes", "2", "3", "--context", "6", "--rounds", "3",
        "--dtype", "float32", source=None, use_data=False,
    )  # fmt: skip
    assert (line["shape"], line["rounds"]) == ([6, 32, 4, 2, 16, 48], 3)
    assert list(line["blocks"]) == ["2", "3"]
    for row in line["blocks"].values():
        assert set(row) == {f"{head}_ms" for head in sequential_head.HEADS} | {
            "vanilla_over_none", "rnn_over_none",
        }  # fmt: skip
        assert min(row.values()) > 0
    assert ("ceilings" in line) is torch.cuda.is_available()


def test_sequential_head_compares_rounds_in_pairs():
    times = {"none": [1.0, 2.0, 4.0], "vanilla": [2.0, 2.0, 4.0], "rnn": [3.0, 4.0, 12.0]}
    found = sequential_head.results_of(times)
    assert (found["none_ms"], found["rnn_ms"]) == (2.0, 4.0)
    assert (found["vanilla_over_none"], found["rnn_over_none"]) == (1.0, 3.0)


def test_sequential_head_takes_its_engines_in_turn_and_drops_the_first_rounds():
    seen = []

    class Steps:
        def __init__(self, name):
            self.name = name

        def step(self):
            seen.append(self.name)

    names = ("none", "vanilla", "rnn")
    times = sequential_head.round_times({name: Steps(name) for name in names}, 2)
    assert {name: len(row) for name, row in times.items()} == dict.fromkeys(names, 2)
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rounds) == sequential_head.WARM_UP + 2
    assert all(sorted(row) == sorted(names) for row in rounds)
    assert [row[0] for row in rounds[:4]] == [*names, "none"]


def test_prompts_end_with_a_user_turn_and_have_their_own_seeds(pair, data):
    model = load_pair(str(pair), "float32")
    params = SamplingParams(max_new_tokens=4, seed=7)
    chat = domain_requests(model, data, "chat", 3, params)
    text = model.target.tokenizer.decode(chat[0].prompt_ids)
    assert text.count("<|im_start|>user") == 2
    assert text.endswith("<|im_start|>assistant\n")
    assert [request.params.seed for request in chat] == [7, 8, 9]
    assert domain_requests(model, data, "chat", 3, params) == chat
    assert len({request.prompt_ids for request in chat}) == 3
    with pytest.raises(DataError, match="prompts of gsm8k that fit, but 9 are wanted"):
        domain_requests(model, data, "gsm8k", 9, params)


def test_every_way_decodes_every_request_in_turn(pair, data):
    model = load_pair(str(pair), "float32")
    requests = domain_requests(model, data, "gsm8k", 3, SamplingParams(max_new_tokens=4))
    calls = []

    def way(name):
        def decode(request):
            calls.append((name, request.params.max_new_tokens))
            return Output("", "", (1, 2), "length", Stats(rounds=1, tokens=2))

        return decode

    tallies = side_by_side({"a": way("a"), "b": way("b")}, requests, repeats=2, label="test")
    assert "".join(name for name, _ in calls) == "ab" + "abba" + "baab" + "abba"
    assert len(tallies["a"].outputs) == len(tallies["b"].seconds) == 3
    assert tallies["a"].stats.accepted_length == 2


def test_a_tally_counts_tokens_over_seconds():
    output = Output("", "", (1, 2, 3), "length", Stats())
    assert Tally([output, output], [1.0, 2.0]).tokens_per_s == 2.0


def test_numbers_are_cut_to_four_digits():
    assert rounded({"a": [1.23456, 3], "b": (2e-7 / 3, None)}) == {
        "a": [1.235, 3],
        "b": [6.667e-8, None],
    }


def test_study_compares_drafters_on_the_same_prompts(run, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.evaluation.report.write.can_draw", lambda: False)
    options = (
        "--draft", f"ours={pair}", "--draft", "lookup=ngram", "--prompts", "2",
        "--max-new-tokens", "12", "--sweep", "ours",
        "--records", str(tmp_path / "records"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    line = run(study, *options)
    assert [gain["temperature"] for gain in line["gains"]] == [0, 1]
    drafters = [row["drafter"] for row in line["runs"]]
    assert (drafters.count("ours"), drafters.count("lookup")) == (2 + 10 + 3, 2)
    assert (tmp_path / "out" / "report.html").is_file()
    records = sorted((tmp_path / "records").iterdir())
    before = [path.read_text() for path in records]
    again = run(study, *options)
    assert [row["accepted_length"] for row in again["runs"]] == [
        row["accepted_length"] for row in line["runs"]
    ]
    for path, text in zip(records, before, strict=True):  # nothing was asked again
        added = path.read_text()[len(text) :].splitlines()
        assert [line.startswith('{"plan"') for line in added] == [True]
