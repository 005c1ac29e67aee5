import errno
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dspark.data.features import writer
from dspark.data.features.cache import FeatureCache
from dspark.data.features.encoder import target_features
from dspark.data.features.manifest import sample_key
from dspark.data.features.shards import num_context_rows, teacher_rows
from dspark.data.samples import Sample, SampleStream
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.errors import DataError, RecipeError
from dspark.targets.layerless import LayerlessTarget
from dspark.targets.target import Target
from dspark.training.drafters.new_drafter import load_frozen_target
from dspark.training.drafters.objectives import DrafterObjective, Eagle3Objective
from dspark.training.drafters.samples import OnlineSamples, build_features, mend_features
from dspark.training.recipe import load_recipe
from dspark.training.run import run_recipe
from tests.helpers.samples import write_samples
from tests.helpers.targets import tiny_llama

QUIET = Console(quiet=True)
SAMPLES = 24
RECIPE = """
kind: drafter
target: {root}/target
samples: {{root: {root}, paths: [s.jsonl.gz], max_length: 32, min_supervised: 4}}
optimiser: {{learning_rate: 0.01}}
run: {{output_dir: {root}/run, steps: 12, rows: 4, save_every: 4, log_every: 1}}
"""
ALGORITHMS = {
    "dspark": [
        "drafter={num_layers: 1, block_size: 4, markov_rank: 8, target_layer_ids: [0, 2]}",
        "samples.num_anchors=8",
        "drafter.mask_token_id=39",
    ],
    "dflash": [
        "drafter={num_layers: 1, block_size: 4, target_layer_ids: [0, 2]}",
        "samples.num_anchors=8",
        "drafter.mask_token_id=39",
    ],
    "eagle3": ["drafter={ttt_length: 3, target_layer_ids: [0, 2]}"],
    "mtp": [],
}


@pytest.fixture
def recipe(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "target")
    write_samples(tmp_path / "s.jsonl.gz", SAMPLES)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(root=tmp_path))
    return path


@pytest.fixture
def settings(recipe, tmp_path):
    """Recipes of an algorithm by feature source."""

    def make(source="online", algorithm="dspark", *others):
        features = [] if source == "online" else [f"features.path={tmp_path}/cache"]
        overrides = [f"algorithm={algorithm}", *ALGORITHMS[algorithm]]
        overrides += [f"features.source={source}", *features, *others]
        return overrides, load_recipe(str(recipe), overrides)

    return make


def objective_of(settings):
    kind = Eagle3Objective if settings.algorithm in ("eagle3", "mtp") else DrafterObjective
    return kind(settings, load_frozen_target(settings, "cpu", "float32"))


def losses(settings, steps=6):
    objective = objective_of(settings)
    return [objective.loss(step, 0, 1)[0].item() for step in range(steps)]


def log_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_that_are_not_stored_change_no_loss(settings, algorithm):
    _, online = settings("online", algorithm)
    whole = losses(online)
    objective = objective_of(online)
    real = objective.samples.source.features

    def only_needed(samples, taps):
        features, hidden = real(samples, taps)
        start = 0
        for sample in samples:
            length = len(sample.input_ids)
            unused = torch.ones(length, dtype=torch.bool)
            unused[teacher_rows(sample)] = False
            features[start + num_context_rows(sample) : start + length] = 0
            hidden[start : start + length][unused] = 0
            start += length
        return features, hidden

    objective.samples.source.features = only_needed
    assert [objective.loss(step, 0, 1)[0].item() for step in range(6)] == pytest.approx(
        whole, rel=1e-6
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("codec", "close"), [("bfloat16", 2e-3), ("coded", 3e-2)])
def test_a_cache_gives_nearly_the_losses_of_the_target(settings, algorithm, codec, close):
    _, online = settings("online", algorithm)
    _, cached = settings("cache", algorithm, f"features.codec={codec}")
    report = build_features(cached, device="cpu")
    assert (report.records, report.failed, report.left_out) == (SAMPLES, 0, 0)
    assert losses(cached) == pytest.approx(losses(online), rel=close)
    assert losses(cached) != losses(online)  # it was read, not computed


def test_from_a_cache_the_targets_layers_are_not_loaded(settings, tmp_path):
    overrides, cached = settings("cache")
    build_features(cached, device="cpu")
    target = load_frozen_target(cached, "cpu", "float32")
    assert isinstance(target, LayerlessTarget)
    result = run_recipe(str(tmp_path / "r.yaml"), overrides, device="cpu", console=QUIET)
    assert result.steps == 12
    assert load_drafter(tmp_path / "run").taps == (0, 2)


def test_online_leaves_nothing_on_disk(settings, tmp_path):
    overrides, _ = settings("online")
    run_recipe(str(tmp_path / "r.yaml"), overrides, device="cpu", console=QUIET)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "target", "s.jsonl.gz", "r.yaml"}


@pytest.fixture
def forwards(monkeypatch):
    """How many samples the target ran over in training steps."""
    ran = []

    def watched(target, samples, taps):
        ran.extend(samples)
        return target_features(target, samples, taps)

    monkeypatch.setattr("dspark.training.drafters.features.target_features", watched)
    return ran


def test_a_cold_hybrid_run_fills_the_cache_in_its_first_epoch(settings, tmp_path, forwards):
    _, hybrid = settings("hybrid")
    first = losses(hybrid, steps=12)  # two epochs
    assert len(forwards) == SAMPLES  # each sample once
    forwards.clear()
    assert losses(hybrid, steps=12) == first  # to the last bit, though all is read now
    assert forwards == []
    _, cached = settings("cache")
    assert losses(cached, steps=12) == first
    assert len(FeatureCache(tmp_path / "cache").records) == SAMPLES


def test_a_resumed_hybrid_run_repeats_the_uncut_one(settings, tmp_path, monkeypatch):
    recipe = str(tmp_path / "r.yaml")
    overrides, _ = settings("hybrid", "dspark", f"run.output_dir={tmp_path}/whole")
    run_recipe(recipe, overrides, device="cpu", console=QUIET)
    whole = log_of(tmp_path / "whole")
    overrides, _ = settings("hybrid", "dspark", f"features.path={tmp_path}/other")
    real = DrafterObjective.loss

    def die_at_step_6(self, step, part, parts):
        if step == 6:
            raise KeyboardInterrupt
        return real(self, step, part, parts)

    monkeypatch.setattr(DrafterObjective, "loss", die_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, overrides, device="cpu", console=QUIET)
    monkeypatch.undo()
    run_recipe(recipe, overrides, device="cpu", resume=True, console=QUIET)
    assert log_of(tmp_path / "run")[-8:] == whole[-8:]


def test_a_small_budget_keeps_what_fits_and_computes_the_rest(settings, tmp_path, forwards):
    _, hybrid = settings("hybrid", "dspark", "features.max_bytes=3000")
    losses(hybrid, steps=12)
    held = len(FeatureCache(tmp_path / "cache").records)
    assert 0 < held < SAMPLES
    assert len(forwards) == SAMPLES + (SAMPLES - held)
    files = [p for p in (tmp_path / "cache").iterdir() if p.name != "manifest.json"]
    assert sum(p.stat().st_size for p in files) <= 3000


def test_without_add_a_hybrid_run_leaves_the_cache_alone(settings, tmp_path, forwards):
    _, small = settings("hybrid", "dspark", "features.max_bytes=3000")
    build_features(small, device="cpu")
    before = {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()}
    _, reading = settings("hybrid", "dspark", "features.add=false")
    losses(reading)
    assert 0 < len(forwards) < SAMPLES
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()} == before


def test_a_full_disk_ends_the_adding_and_not_the_training(settings, monkeypatch, caplog):
    _, hybrid = settings("hybrid")
    want = losses(hybrid)
    _, other = settings("hybrid", "dspark", f"features.path={hybrid.features.path}2")

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_all", full)
    assert losses(other) == want
    assert [r.message for r in caplog.records if "is full" in r.message][1:] == []


def test_a_damaged_sample_is_computed(settings, tmp_path, forwards, caplog):
    _, hybrid = settings("hybrid")
    want = losses(hybrid)
    [shard] = (tmp_path / "cache").glob("shard-*.bin")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    forwards.clear()
    assert losses(hybrid) == want
    assert len(forwards) == 1
    assert "damaged" in caplog.text
    _, cached = settings("cache")
    with pytest.raises(DataError, match="damaged"):
        losses(cached)
    assert mend_features(cached) == 1
    with pytest.raises(DataError, match="lacks 1 of the 24 samples"):
        losses(cached)
    assert build_features(cached, device="cpu").records == SAMPLES
    assert losses(cached) == want


def test_writers_of_several_ranks_share_a_cache(settings, tmp_path, monkeypatch, forwards):
    _, hybrid = settings("hybrid")
    sources = []
    for rank in range(2):
        for name, value in (("is_initialized", True), ("get_rank", rank), ("get_world_size", 2)):
            monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
        monkeypatch.setattr("dspark.training.drafters.features.barrier", lambda: None)
        sources.append(objective_of(hybrid).samples)
    samples = sources[0].stream.samples
    sources[0].source.features(samples[:10], (0, 2))
    sources[1].source.features(samples[10:], (0, 2))
    assert len(forwards) == SAMPLES
    assert sorted(p.name for p in (tmp_path / "cache").glob("shard*")) == [
        "shard-000-00000.bin",
        "shard-001-00000.bin",
    ]
    sources[0].source.features(samples, (0, 2))
    assert len(forwards) == SAMPLES  # what the other one wrote was found
    assert len(FeatureCache(tmp_path / "cache").records) == SAMPLES


def test_fewer_taps_than_the_caches_are_read_from_it(settings, tmp_path):
    _, cached = settings("cache", "dspark", "features.codec=bfloat16")
    build_features(cached, device="cpu")
    one = "drafter.target_layer_ids=[2]"
    _, fewer = settings("cache", "dspark", one)
    _, online = settings("online", "dspark", one)
    assert losses(fewer) == pytest.approx(losses(online), rel=2e-3)


@pytest.mark.parametrize(
    ("others", "error", "said"),
    [
        (["drafter.target_layer_ids=[1, 2]"], DataError, r"layers \[0, 2\], .* reads \[1\]"),
        (["samples.max_length=20"], DataError, r"lacks \d+ of the 24 samples"),
        (["target=OTHER"], DataError, "another with `dspark data cache`"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(settings, tmp_path, others, error, said):
    _, cached = settings("cache")
    build_features(cached, device="cpu")
    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    others = [o.replace("OTHER", str(tmp_path / "other")) for o in others]
    with pytest.raises(error, match=said):
        losses(settings("cache", "dspark", *others)[1])
    if "max_length" in others[0]:
        with pytest.raises(DataError, match=r"samples\.fingerprint"):
            build_features(settings("cache", "dspark", *others)[1], device="cpu")


def test_an_empty_cache_directory_is_refused(settings):
    with pytest.raises(DataError, match=r"has no manifest.json; build .* `dspark data cache`"):
        losses(settings("cache")[1])
    with pytest.raises(DataError, match=r"has no manifest.json"):
        losses(settings("hybrid", "dspark", "features.add=false")[1])


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ("{source: online, path: x}", "path has no effect when source is online"),
        ("{source: online, codec: bfloat16}", "codec has no effect"),
        ("{source: cache}", "path must name"),
        ("{source: cache, path: x, add: true}", "add has no effect"),
        (
            "{source: hybrid, path: x, codec: bfloat16, feature_error: 0.1}",
            "feature_error has no effect",
        ),
        ("{source: disk, path: x}", "'online', 'cache' or 'hybrid'"),
        ("{source: cache, path: x, feature_error: 0}", "greater than 0"),
        ("{source: cache, path: x, colour: red}", "no key 'features.colour'"),
    ],
)
def test_settings_that_say_nothing_are_refused(recipe, features, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(recipe), [f"features={features}"])


# The published training code's cache


@pytest.fixture
def reference(settings, tmp_path):
    """One of the recipe's samples and target, written in the published cache format."""
    import struct

    import numpy as np

    _, online = settings("online")
    target = Target.load(tmp_path / "target", device="cpu")
    samples = objective_of(online).samples.stream.samples
    directory = tmp_path / "reference"
    directory.mkdir()
    shard, index = b"", b""
    for number, sample in enumerate(samples):
        features, hidden = target_features(target, [sample], (0, 2))
        offsets = []
        for part in (
            np.array(sample.input_ids, dtype="<i4").tobytes(),
            bytes([1] * len(sample.input_ids)),
            bytes(int(m) for m in sample.loss_mask),
            features.bfloat16().view(torch.int16).numpy().tobytes(),
            hidden.bfloat16().view(torch.int16).numpy().tobytes(),
        ):
            offsets.append(len(shard))
            shard += part
        index += struct.pack("<QIIQQQQQ", number, 0, len(sample.input_ids), *offsets)
    (directory / "samples.idx").write_bytes(index)
    (directory / "shard-00000.bin").write_bytes(shard)
    manifest = {
        "version": 2,
        "num_samples": len(samples),
        "num_shards": 1,
        "target_layer_ids": [0, 2],
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": 56,
        "hidden_size": 32,
        "shards": [{"shard_id": 0, "file_name": "shard-00000.bin"}],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_training_from_a_reference_cache(settings, reference):
    path, own = f"features.path={reference}", "samples.paths=[]"
    want = losses(settings("online")[1])
    assert losses(settings("cache", "dspark", path, own)[1]) == pytest.approx(want, rel=2e-3)
    hybrid = settings("hybrid", "dspark", path, own, "features.add=false")[1]
    assert losses(hybrid) == pytest.approx(want, rel=2e-3)
    with pytest.raises(RecipeError, match="its own samples; set"):
        losses(settings("cache", "dspark", path)[1])
    with pytest.raises(RecipeError, match="only read; set"):
        losses(settings("hybrid", "dspark", path, own)[1])


def test_without_files_the_caches_own_samples_are_trained_on(settings, tmp_path):
    _, cached = settings("cache")
    build_features(cached, device="cpu")
    (tmp_path / "s.jsonl.gz").unlink()
    own = objective_of(settings("cache", "dspark", "samples.paths=[]")[1]).samples.stream.samples
    assert len({sample_key(s) for s in own}) == SAMPLES
    with pytest.raises(RecipeError, match="only a cache can make up for"):
        losses(settings("online", "dspark", "samples.paths=[]")[1])


@pytest.mark.parametrize(
    ("source", "run", "passes"),
    [
        ("online", {"steps": 20, "epochs": None}, 0.0),
        ("hybrid", {"steps": 20, "epochs": None}, 5.0),
        ("cache", {"steps": None, "epochs": 3.0}, 3.0),
    ],
)
def test_rows_that_teach_are_seen_again_where_features_are_kept(source, run, passes):
    samples = OnlineSamples.__new__(OnlineSamples)
    samples.stream = SampleStream([Sample((1, 2, i), (False, True, True)) for i in range(8)], 2, 0)
    recipe = SimpleNamespace(features=SimpleNamespace(source=source), run=SimpleNamespace(**run))
    assert samples._passes(recipe) == passes
