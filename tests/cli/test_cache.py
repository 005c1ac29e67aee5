import json

import pytest

RECIPE = """
kind: drafter
target: {target}
samples: {{root: {root}, paths: [s.jsonl], max_length: 64, min_supervised: 4}}
drafter: {{num_layers: 1, block_size: 4, markov_rank: 4, target_layer_ids: [0, 2]}}
run: {{output_dir: {root}/run, steps: 3, rows: 2}}
"""
COUNT = 9


@pytest.fixture
def recipe(pair, tmp_path):
    lines = [{"input_ids": [5 + i] * (10 + i), "prompt_len": 3} for i in range(COUNT)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(target=pair.target, root=tmp_path))
    return path


def test_a_cache_is_built_announced_and_trained_on(dspark, recipe, tmp_path):
    out = tmp_path / "cache"
    result = dspark("data", "cache", recipe, "--out", out, "--json")
    assert result.status == 0, result.err
    tokens = sum(10 + i for i in range(COUNT))
    assert result.json | {"bytes_per_token": 0} == {
        "records": COUNT,
        "failed": 0,
        "left_out": 0,
        "damaged": 0,
        "bytes": sum(p.stat().st_size for p in out.iterdir()),
        "tokens": tokens,
        "bytes_per_token": 0,
        "out": str(out),
    }
    assert result.json["bytes_per_token"] == result.json["bytes"] / tokens
    assert f"{COUNT} samples, {tokens} tokens: about" in result.err
    assert "s per 1,000 tokens)" in result.err
    assert "of the disk are free." in result.err
    again = dspark("data", "cache", recipe, "--out", out, "--json")
    assert again.json == result.json
    assert "tokens: about" not in again.err  # nothing was left to do
    words = ("--set", "features.source=cache", "--set", f"features.path={out}", "--json")
    assert dspark("train", recipe, *words).json["steps"] == 3


def test_the_recipes_own_path_and_budget_count(dspark, recipe, tmp_path):
    words = ("--set", "features.source=hybrid", "--set", f"features.path={tmp_path}/own")
    result = dspark("data", "cache", recipe, *words, "--set", "features.max_bytes=900", "--json")
    assert 0 < result.json["records"] < COUNT
    assert result.json["left_out"] == COUNT - result.json["records"]
    assert "features.max_bytes leaves room for 900 bytes of that" in result.err
    plain = dspark("data", "cache", recipe, *words)
    assert f"{COUNT} samples in {tmp_path}/own" in plain.out


def test_damage_is_mended_on_request(dspark, recipe, tmp_path):
    out = tmp_path / "cache"
    dspark("data", "cache", recipe, "--out", out)
    [shard] = out.glob("shard-*.bin")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(data)
    assert dspark("data", "cache", recipe, "--out", out, "--json").json["damaged"] == 0
    mended = dspark("data", "cache", recipe, "--out", out, "--check", "--json")
    assert (mended.json["damaged"], mended.json["records"]) == (1, COUNT)
    assert dspark("data", "cache", recipe, "--out", out, "--check", "--json").json["damaged"] == 0


def test_a_cache_without_a_place_or_a_drafter_is_refused(dspark, recipe):
    result = dspark("data", "cache", recipe)
    assert result.status == 2
    assert "names no feature cache; give --out DIR" in result.err
    assert dspark("data", "cache", "bundled_target", "--out", "x").status == 2


def test_other_taps_are_refused(dspark, recipe, tmp_path):
    dspark("data", "cache", recipe, "--out", tmp_path / "cache")
    words = ("--out", tmp_path / "cache", "--set", "drafter.target_layer_ids=[1, 3]")
    result = dspark("data", "cache", recipe, *words)
    assert result.status == 1
    assert "was made with taps [0, 2]" in result.err
    assert result.err.splitlines()[-1].startswith("dspark: The cache")
