import errno
import json
import math
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark.data.features import build, writer
from dspark.data.features.build import build_cache, mend, wanted_manifest
from dspark.data.features.cache import FeatureCache, ReferenceCache, open_cache
from dspark.data.features.codec import Bfloat16Rows, CodedRows, channel_scales, turning_basis
from dspark.data.features.encoder import by_length, spread, target_features
from dspark.data.features.manifest import (
    MANIFEST,
    Coding,
    Manifest,
    SampleRecipe,
    sample_key,
    samples_fingerprint,
    target_fingerprint,
)
from dspark.data.features.shards import (
    RECORD_BYTES,
    index_path,
    join,
    num_context_rows,
    read_sample,
    shard_path,
    split,
    teacher_rows,
)
from dspark.data.features.writer import CacheWriter, DiskFullError, Entry
from dspark.data.samples import Sample
from dspark.errors import DataError
from dspark.targets.target import Target
from tests.helpers.targets import tiny_llama

CPU = torch.device("cpu")
TAPS = (0, 2)
WIDTH = 32
EXACT = Coding("bfloat16", 0.0, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target's directory."""
    path = tmp_path_factory.mktemp("target")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(folder):
    return Target.load(folder, device="cpu")


def make_samples(count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        ids = torch.randint(0, 40, (10 + 3 * (i % 7),), generator=generator).tolist()
        mask = tuple(3 <= at < len(ids) - (i % 3) for at in range(len(ids)))
        samples.append(Sample(tuple(ids), mask))
    return samples


SAMPLES = make_samples()


def manifest_of(target, folder, samples=SAMPLES, coding=EXACT, taps=TAPS):
    recipe = SampleRecipe(
        samples_fingerprint(map(sample_key, samples)), ("s.jsonl",), 64, 4, len(samples), 0
    )
    return wanted_manifest(target, str(folder), taps, recipe, coding)


@pytest.fixture
def made(target, folder, tmp_path):
    """Builds a cache of the samples; options go to `build_cache`."""

    def make(samples=SAMPLES, directory=tmp_path / "cache", coding=EXACT, **options):
        wanted = manifest_of(target, folder, samples, coding)
        options = {"tokens_per_forward": 64, **options}
        return directory, build_cache(directory, wanted, target, samples, **options)

    return make


def check_rows(cache, target, samples, exact=True):
    """The cache's rows are the target's."""
    for sample in samples:
        features, hidden = target_features(target, [sample], TAPS)
        stored = cache.rows(sample, CPU)
        rows = len(stored.features_RPH)
        want = features.view(-1, len(TAPS), WIDTH)[:rows]
        assert rows == num_context_rows(sample)
        assert stored.teacher_rows == teacher_rows(sample)
        law = hidden[stored.teacher_rows]
        if exact:
            # Batches of other shapes may give other last bits, which bf16 rounding can show.
            torch.testing.assert_close(stored.features_RPH, want.bfloat16(), atol=1e-4, rtol=8e-3)
            torch.testing.assert_close(stored.teacher_MH, law.bfloat16(), atol=1e-4, rtol=8e-3)
        else:
            assert relative(stored.features_RPH, want) < 0.12
            assert relative(stored.teacher_MH, law) < 0.024


def relative(got, want):
    return float((got - want).norm() / want.norm())


# What training can use


def usable_rows(sample):
    """By the definition (docs/method.md), slot by slot, block size without bound."""
    mask, length = sample.loss_mask, len(sample.input_ids)
    context, teacher = set(), set()
    for anchor in range(length - 1):
        if mask[anchor] and mask[anchor + 1]:
            context |= set(range(anchor))
            label = anchor + 1
            while label < length and mask[label]:
                teacher.add(label - 1)
                label += 1
    return context, teacher


@pytest.mark.parametrize("seed", range(20))
def test_needed_rows_are_those_that_anchors_use(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(24, generator=generator) < 0.6).tolist()
    sample = Sample(tuple(range(24)), tuple(mask))
    context, teacher = usable_rows(sample)
    assert context <= set(range(num_context_rows(sample)))
    assert teacher <= set(teacher_rows(sample))
    # Chains supervise an answer's first token too; nothing else is stored beyond need.
    starts = {i - 1 for i in range(1, 24) if mask[i] and not mask[i - 1]}
    assert set(teacher_rows(sample)) == teacher | starts
    last = max(i for i in range(24) if mask[i])
    if mask[last - 1]:
        assert num_context_rows(sample) == len(context)


def test_without_answers_nothing_is_needed():
    sample = Sample((1, 2, 3), (False,) * 3)
    assert num_context_rows(sample) == 0
    assert teacher_rows(sample) == []
    assert num_context_rows(Sample((1, 2), (True, False))) == 0
    assert teacher_rows(Sample((1, 2), (True, False))) == []


# The codecs


def outlier_rows():
    """Rows like a real model's: correlated taps, channels and rows a thousand times as large."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200, WIDTH, generator=generator)
    rows = torch.stack([first, 0.9 * first + 0.3 * torch.randn(200, WIDTH, generator=generator)], 1)
    rows[:, :, 5] *= 300
    rows[7] *= 1000
    rows[11, 0, 9] = 4000.0
    return rows


@pytest.mark.parametrize("error", [0.02, 0.1, 0.3])
def test_the_relative_error_is_what_was_asked_for_also_beside_outliers(error):
    rows = outlier_rows()
    scale = channel_scales(rows)
    codec = CodedRows(error, scale, turning_basis(rows, scale))
    data = codec.pack(codec.quantise(rows))
    back = codec.unpack(memoryview(data), len(rows), CPU)
    ordinary = torch.ones(len(rows), dtype=torch.bool)
    ordinary[11] = False
    for channels in ([5], [i for i in range(WIDTH) if i != 5]):
        got, want = back[ordinary][..., channels], rows[ordinary][..., channels]
        per_row = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert per_row.median() < 1.5 * error
        assert relative(got, want) < 1.5 * error
    # A row with one huge number has the steps that this number needs, and no coarser ones.
    scaled = rows[11] / scale
    step = max(
        math.sqrt(12) * error * scaled.square().mean(-1).sqrt().max(), 4000 / scale[0, 9] / 127
    )
    assert ((back[11] / scale - scaled).abs().max()) < 1.1 * step / math.sqrt(2)


def test_each_row_is_coded_alone():
    rows = outlier_rows()
    scale = channel_scales(rows)
    codec = CodedRows(0.1, scale, turning_basis(rows, scale))
    whole = codec.quantise(rows)
    some = codec.quantise(rows[40:60])
    for all_rows, part in zip(whole, some, strict=True):
        assert np.array_equal(all_rows[40:60], part)


def test_correlated_taps_take_fewer_bits_and_the_same_error():
    rows = outlier_rows()[20:]
    scale = channel_scales(rows)
    sizes = {}
    for name, basis in (("plain", None), ("turned", turning_basis(rows, scale))):
        codec = CodedRows(0.05, scale, basis)
        data = codec.pack(codec.quantise(rows))
        sizes[name] = len(data)
        assert relative(codec.unpack(memoryview(data), len(rows), CPU), rows) < 0.075
    assert sizes["turned"] < 0.93 * sizes["plain"]


def test_normal_numbers_take_the_bits_of_their_entropy():
    rows = torch.randn(400, 1, 64, generator=torch.Generator().manual_seed(3))
    codec = CodedRows(0.05, channel_scales(rows))
    bits = 8 * len(codec.pack(codec.quantise(rows))) / rows.numel()
    assert bits == pytest.approx(math.log2(1.193 / 0.05), abs=0.25)


def test_zero_and_tiny_rows_survive():
    rows = outlier_rows()
    rows[3], rows[4] = 0, 1e-20
    codec = CodedRows(0.1, channel_scales(rows))
    back = codec.unpack(memoryview(codec.pack(codec.quantise(rows))), len(rows), CPU)
    assert back[3].abs().max() == 0
    assert bool(back.isfinite().all())
    empty = codec.pack(codec.quantise(rows[:0]))
    assert codec.unpack(memoryview(empty), 0, CPU).shape == (0, 2, WIDTH)


def test_bfloat16_is_exact():
    rows = outlier_rows().bfloat16()
    codec = Bfloat16Rows(2, WIDTH)
    data = codec.pack(codec.quantise(rows))
    assert len(data) == 2 * rows.numel()
    assert torch.equal(codec.unpack(memoryview(data), len(rows), CPU), rows)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 300])
def test_a_payload_holds_its_sample(length):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 2**31 - 1, (length,), generator=generator).tolist()
    sample = Sample(tuple(ids), tuple(i % 3 == 0 for i in range(length)))
    parts = split(memoryview(join(sample, b"abc", b"")))
    assert (bytes(parts.features), bytes(parts.teacher)) == (b"abc", b"")
    assert read_sample(parts.sample, length) == sample


# Building and reading


@pytest.mark.parametrize("coding", [EXACT, Coding()])
def test_a_cache_gives_the_targets_rows(made, target, coding):
    directory, report = made(coding=coding)
    cache = open_cache(directory)
    assert (report.records, report.failed, report.left_out) == (len(SAMPLES), 0, 0)
    assert report.tokens == sum(len(s.input_ids) for s in SAMPLES)
    assert report.bytes == sum(p.stat().st_size for p in directory.iterdir())
    check_rows(cache, target, SAMPLES, exact=coding is EXACT)
    assert set(cache.samples(64)) == set(SAMPLES)
    assert cache.taps == TAPS


def test_equal_samples_are_stored_once(made):
    directory, report = made([*SAMPLES, *SAMPLES[:5]])
    assert report.records == len(SAMPLES) == len(FeatureCache(directory).records)


def test_an_estimate_comes_first_and_is_near(made):
    said = []
    _, report = made(announce=said.append)
    [estimate] = said
    assert (estimate.samples, estimate.tokens) == (len(SAMPLES), report.tokens)
    assert estimate.bytes == pytest.approx(report.bytes, rel=0.25)
    assert estimate.seconds == pytest.approx(
        estimate.seconds_per_1000_tokens * estimate.tokens / 1000
    )
    _, report = made(announce=said.append)
    assert len(said) == 1  # nothing is missing any more


def test_a_disk_that_is_too_small_is_refused_before_work(made, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        build.shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, 2000)
    )
    with pytest.raises(DataError, match=r"takes about .* GB, but the disk of .* has 2e-06 GB free"):
        made()
    assert FeatureCache(tmp_path / "cache").records == []
    _, report = made(max_bytes=1900)  # that fits
    assert 0 < report.records < len(SAMPLES)


def test_max_bytes_keeps_what_fits(made, target):
    directory, whole = made()
    shutil.rmtree(directory)
    limit = whole.bytes // 2
    directory, report = made(max_bytes=limit)
    assert 0 < report.records < whole.records
    assert report.left_out == whole.records - report.records
    written = sum(p.stat().st_size for p in directory.iterdir() if p.name != MANIFEST)
    assert written <= limit
    check_rows(
        FeatureCache(directory), target, [s for s in SAMPLES if s in FeatureCache(directory)]
    )
    assert made()[1].records == whole.records  # without a limit it goes on


def test_samples_without_finite_features_are_counted(made, target, monkeypatch):
    bad = SAMPLES[3]

    def broken(target, samples, taps):
        features, hidden = target_features(target, samples, taps)
        start = 0
        for sample in samples:
            if sample == bad:
                features[start, 0] = torch.nan
            start += len(sample.input_ids)
        return features, hidden

    monkeypatch.setattr(build, "target_features", broken)
    directory, report = made()
    assert (report.records, report.failed, report.left_out) == (len(SAMPLES) - 1, 1, 0)
    assert bad not in FeatureCache(directory)
    check_rows(FeatureCache(directory), target, [s for s in SAMPLES if s != bad])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: replace(m, origin=replace(m.origin, taps=(1, 2))), r"taps \[0, 2\]"),
        (lambda m: replace(m, origin=replace(m.origin, dtype="bfloat16")), "dtype float32"),
        (
            lambda m: replace(m, origin=replace(m.origin, target_fingerprint="0")),
            "target_fingerprint .* not 0",
        ),
        (
            lambda m: replace(m, samples=replace(m.samples, fingerprint="0", count=3)),
            r"12 samples of s.jsonl .* not 0 \(3 samples",
        ),
        (lambda m: replace(m, coding=Coding()), "codec bfloat16"),
    ],
)
def test_a_change_of_what_made_it_is_refused_by_name(made, target, folder, change, said):
    directory, _ = made()
    wanted = change(manifest_of(target, folder))
    with pytest.raises(DataError, match=said):
        build_cache(directory, wanted, target, SAMPLES, tokens_per_forward=64)


def test_a_folder_of_other_things_is_left_alone(made, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds files but no manifest"):
        made()


def test_a_manifest_that_was_never_put_in_place_is_no_obstacle(made, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".manifest.json.77.tmp").write_text("{")
    directory, report = made()
    assert report.bytes == sum(p.stat().st_size for p in directory.iterdir())


def test_a_place_that_cannot_be_written_is_one_sentence(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        made(directory=tmp_path / "file" / "cache")


def test_damaged_manifests_are_refused(made):
    directory, _ = made(coding=Coding())
    path = directory / MANIFEST
    good = json.loads(path.read_text())
    for content, said in (
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        (json.dumps({**good, "version": 9}), "version 9"),
        (json.dumps({k: v for k, v in good.items() if k != "origin"}), "damaged"),
        (json.dumps({**good, "learned": {"scale": "AAAA", "basis": "AAAA"}}), "damaged"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            Manifest.read(directory)
    path.unlink()
    with pytest.raises(DataError, match="dspark data cache"):
        open_cache(directory)


# Killed, torn, damaged, full


def tail_of(directory):
    return index_path(directory, 0), shard_path(directory, 0, 0)


def test_wherever_a_build_is_cut_it_goes_on_and_ends_the_same(made, target, tmp_path):
    whole, report = made()
    index, shard = (path.read_bytes() for path in tail_of(whole))
    records = len(index) // RECORD_BYTES
    cuts = [(i * RECORD_BYTES + more, s) for i in (0, 1, records - 1) for more in (0, 1, 55)
            for s in (0, 1, len(shard) // 2, len(shard) - 1, len(shard))]  # fmt: skip
    for number, (index_bytes, shard_bytes) in enumerate(cuts):
        directory = tmp_path / f"cut{number}"
        shutil.copytree(whole, directory)
        cut_index, cut_shard = tail_of(directory)
        cut_index.write_bytes(index[:index_bytes])
        cut_shard.write_bytes(shard[:shard_bytes])
        held = {r.key for r in FeatureCache(directory).records}
        _, again = made(directory=directory)
        cache = FeatureCache(directory)
        assert held <= {r.key for r in cache.records}
        assert again.records == report.records
        assert all(cache.is_whole(r) for r in cache.records)
        # Nothing is left behind that no record names, and nothing is stored twice.
        assert sum(p.stat().st_size for p in directory.iterdir()) == again.bytes
    check_rows(cache, target, SAMPLES)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_feature_cache import Target, build, make_samples, manifest_of

target = Target.load(sys.argv[1], device="cpu")
real = build.target_features
def slow(*args):
    time.sleep(0.05)
    return real(*args)
build.target_features, build._PROBE_TOKENS = slow, 40
samples = make_samples(60)
wanted = manifest_of(target, sys.argv[1], samples)
build.build_cache(Path(sys.argv[2]), wanted, target, samples, tokens_per_forward=32)
"""


def test_a_killed_process_loses_nothing_that_was_committed(made, target, folder, tmp_path):
    directory, samples = tmp_path / "cache", make_samples(60)
    here = Path(__file__).parent
    words = [sys.executable, "-c", KILLED, str(folder), str(directory), str(here)]
    process = subprocess.Popen(words)
    index, deadline = index_path(directory, 0), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if index.is_file() and index.stat().st_size >= 12 * RECORD_BYTES:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    held = {r.key for r in FeatureCache(directory).records}
    assert 12 <= len(held) < 60
    _, report = made(samples, directory)
    assert report.records == 60
    assert held <= {r.key for r in FeatureCache(directory).records}
    check_rows(FeatureCache(directory), target, samples)


def test_a_tail_that_no_record_names_is_cut(made):
    directory, report = made()
    with shard_path(directory, 0, 0).open("ab") as file:
        file.write(b"torn")
    shard_path(directory, 0, 1).write_bytes(b"never committed")
    with CacheWriter(directory) as w:
        assert w.bytes + (directory / MANIFEST).stat().st_size == report.bytes
    assert not shard_path(directory, 0, 1).exists()
    assert sum(p.stat().st_size for p in directory.iterdir()) == report.bytes


def test_damage_is_named_and_mended(made, target):
    directory, report = made()
    cache = FeatureCache(directory)
    record = cache.records[4]
    shard = shard_path(directory, 0, record.shard)
    data = bytearray(shard.read_bytes())
    data[record.offset + record.size // 2] ^= 1
    shard.write_bytes(data)
    cache = FeatureCache(directory)
    [broken] = [s for s in SAMPLES if sample_key(s) == record.key]
    with pytest.raises(DataError, match=rf"damaged at byte {record.offset} .*--check"):
        cache.rows(broken, CPU)
    with pytest.raises(DataError, match="damaged"):
        list(cache.samples(64))
    assert mend(directory) == 1
    assert broken not in FeatureCache(directory)
    assert made()[1].records == report.records
    check_rows(FeatureCache(directory), target, SAMPLES)
    assert mend(directory) == 0


def test_a_full_disk_ends_with_one_sentence_and_a_valid_cache(made, target, monkeypatch):
    real = writer.write_all
    left = [4000]

    def short(file, data):
        if len(data) > left[0]:
            real(file, data[: left[0]])
            left[0] = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(data)
        real(file, data)

    for room in (0, 500, 4000, 9000):
        left[0] = room
        monkeypatch.setattr(writer, "write_all", short)
        with pytest.raises(DiskFullError, match=r"is full; the \d+ samples .* whole: free space"):
            made()
        monkeypatch.undo()
    directory, report = made()
    assert report.records == len(SAMPLES)
    assert sum(p.stat().st_size for p in directory.iterdir()) == report.bytes
    check_rows(FeatureCache(directory), target, SAMPLES)


def entry(number, size=100):
    return Entry(Sample((number, 1), (False, True)), 0, 1, bytes([number]) * size)


def test_a_sample_never_splits_and_shards_end_where_they_should(made, tmp_path):
    directory, _ = made()
    with CacheWriter(directory, writer=3, shard_bytes=250) as w:
        assert all(w.add(entry(i)) for i in range(5))
        assert w.add(entry(9, 400))  # larger than a shard: one of its own
    sizes = [shard_path(directory, 3, i).stat().st_size for i in range(4)]
    assert sizes == [200, 200, 100, 400]
    cache = FeatureCache(directory)
    assert all(cache.is_whole(r) for r in cache.records)
    assert len(cache.records) == len(SAMPLES) + 6


def test_what_is_not_committed_is_not_there(made):
    directory, report = made()
    cache = FeatureCache(directory)
    w = CacheWriter(directory, writer=1)
    w.add(entry(1))
    cache.refresh()
    assert len(cache.records) == report.records
    w.commit()
    cache.refresh()
    assert len(cache.records) == report.records + 1
    with pytest.raises(DataError, match="Another process is writing"):
        CacheWriter(directory, writer=1)
    w.close()
    CacheWriter(directory, writer=1).close()


def test_payloads_are_safe_before_the_records_that_name_them(made, monkeypatch):
    directory, _ = made()
    order = []
    real = writer.os.fsync

    def watched(descriptor):
        order.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        real(descriptor)

    with CacheWriter(directory, writer=2) as w:
        w.add(entry(1))
        monkeypatch.setattr(writer.os, "fsync", watched)
        index = index_path(directory, 2)
        before = index.stat().st_size
        w.commit()
        assert order == ["shard-002-00000.bin", "index-002.bin"]
        assert index.stat().st_size == before + RECORD_BYTES


# Fingerprints and batches


def test_another_weight_is_another_target(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert target_fingerprint(copy) == target_fingerprint(folder)
    [weights] = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert target_fingerprint(copy) != target_fingerprint(folder)


def test_samples_have_a_name_of_their_own():
    sample = SAMPLES[0]
    other_mask = replace(sample, loss_mask=tuple(not m for m in sample.loss_mask))
    assert len({sample_key(s) for s in (*SAMPLES, other_mask)}) == len(SAMPLES) + 1
    keys = [sample_key(s) for s in SAMPLES]
    assert samples_fingerprint(keys) == samples_fingerprint([*keys[::-1], keys[0]])
    assert samples_fingerprint(keys) != samples_fingerprint(keys[1:])


def test_batches_are_of_like_length_and_within_budget():
    batches = by_length(SAMPLES, 50)
    assert sorted(map(sample_key, chain(*batches))) == sorted(map(sample_key, SAMPLES))
    lengths = [[len(s.input_ids) for s in batch] for batch in batches]
    assert all(sum(row) <= 50 for row in lengths)
    flat = list(chain(*lengths))
    assert flat == sorted(flat, reverse=True)
    assert [len(batch) for batch in by_length(SAMPLES, 1)] == [1] * len(SAMPLES)


def test_a_spread_comes_from_everywhere():
    assert spread(SAMPLES, 1) == [SAMPLES[0]]
    assert spread(SAMPLES, 10**6) == SAMPLES
    some = spread(list(range_samples(100)), 100)
    assert [s.input_ids[0] for s in some] == list(range(0, 100, 10))


def range_samples(count):
    for i in range(count):
        yield Sample((i,) * 10, (True,) * 10)


# The published training code's cache


def write_reference(directory, samples, taps, width, rows_of):
    """Byte by byte in the layout of `dspark.data.features.cache`."""
    directory.mkdir()
    index, shards = b"", [b"", b""]
    for number, sample in enumerate(samples):
        shard = number % 2
        length = len(sample.input_ids)
        features, hidden = rows_of(sample)
        offsets = []
        for part in (
            np.array(sample.input_ids, dtype="<i4").tobytes(),
            bytes([1] * length),
            bytes(int(m) for m in sample.loss_mask),
            features.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes(),
            hidden.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes(),
        ):
            offsets.append(len(shards[shard]))
            shards[shard] += part
        index += struct.pack("<QIIQQQQQ", number, shard, length, *offsets)
    (directory / "samples.idx").write_bytes(index)
    names = [f"shard-{i:05d}.bin" for i in range(2)]
    for name, data in zip(names, shards, strict=True):
        (directory / name).write_bytes(data)
    manifest = {
        "version": 2,
        "num_samples": len(samples),
        "num_shards": 2,
        "target_layer_ids": list(taps),
        "hidden_dtype": "bfloat16",
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "index_record_size": 56,
        "hidden_size": width,
        "shards": [{"shard_id": i, "file_name": name} for i, name in enumerate(names)],
        "chat_template": "qwen",
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    tokens = sum(len(s.input_ids) for s in samples)
    size = 2 * (len(taps) + 1) * width + 6
    assert sum(len(shard) for shard in shards) == tokens * size


@pytest.fixture
def reference(target, tmp_path):
    directory = tmp_path / "reference"
    write_reference(directory, SAMPLES, TAPS, WIDTH, lambda s: target_features(target, [s], TAPS))
    return directory


def test_a_reference_cache_is_read(reference, target):
    cache = open_cache(reference)
    assert isinstance(cache, ReferenceCache)
    assert (cache.taps, cache.hidden_size, cache.target_fingerprint) == (TAPS, WIDTH, None)
    assert SAMPLES[0] not in cache
    assert list(cache.samples(64)) == SAMPLES
    for sample in SAMPLES:
        features, hidden = target_features(target, [sample], TAPS)
        stored = cache.rows(sample, CPU)
        assert torch.equal(stored.features_RPH.flatten(1), features.bfloat16())
        assert torch.equal(stored.teacher_MH, hidden.bfloat16())
        assert stored.teacher_rows == list(range(len(sample.input_ids)))


def test_a_reference_caches_samples_can_be_cut(reference, target):
    cache = ReferenceCache(reference)
    cut = list(cache.samples(11))
    assert cut == [s.truncated(11) for s in SAMPLES]
    features, _ = target_features(target, [SAMPLES[5]], TAPS)
    stored = cache.rows(cut[5], CPU)
    assert torch.equal(stored.features_RPH.flatten(1), features[:11].bfloat16())


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda d: edit(d, version=1), "version 1"),
        (lambda d: edit(d, hidden_dtype="float32"), "hidden_dtype 'float32'"),
        (lambda d: edit(d, hidden_size=None), "lacks what a version-2"),
        (lambda d: edit(d, num_samples=99), "99 samples take"),
        (lambda d: (d / "shard-00001.bin").unlink(), "shard-00001.bin is missing"),
        (lambda d: (d / "shard-00001.bin").write_bytes(b"x"), "cut short"),
        (lambda d: (d / "shard-00001.bin").write_bytes(b""), "cut short"),
        (lambda d: (d / "samples.idx").unlink(), "holds 0 bytes"),
    ],
)
def test_broken_reference_caches_are_refused(reference, break_it, said):
    break_it(reference)
    with pytest.raises(DataError, match=said):
        ReferenceCache(reference)


def edit(directory, **changes):
    path = directory / "manifest.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_records_own_damage_is_seen(made):
    directory, report = made()
    path = index_path(directory, 0)
    data = bytearray(path.read_bytes())
    data[3 * RECORD_BYTES + 20] ^= 4
    path.write_bytes(data)
    assert zlib.crc32(bytes(data)) != 0
    assert len(FeatureCache(directory).records) == report.records - 1
    assert made()[1].records == report.records
