"""Steps at fixed sizes and addresses, recorded once and replayed, equal the same steps as such.

A recording here runs its function again on the same buffers, as a CUDA graph does; attention is a
slow stand-in for torch's kernel that sees only what the kernel sees.
"""

import gc
import logging
import random
import time

import pytest
import torch

from dspark.attention import choice, varlen
from dspark.attention.paged_cache import BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import UsageError
from dspark.targets.fast import graphs
from dspark.targets.fast.graphs import TIERS, Buffers, Recording, pad_to_tier
from dspark.targets.target import Target

PAGE, PAGES = 4, 64
TAPS = (-1, 2)


def kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    scale, window_size, enable_gqa, seqused_k, block_table,
):  # fmt: skip
    """What torch documents of its kernel, request by request; the two limits may be larger."""
    assert cu_seq_k is None
    assert block_table.dtype == seqused_k.dtype == cu_seq_q.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(seqused_k.max()) <= max_k <= block_table.shape[1] * key.shape[1]
    out = torch.full((*query.shape[:2], value.shape[3]), torch.nan)
    for r, used in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seq_q[r]), int(cu_seq_q[r + 1]))
        own = query[rows].transpose(0, 1)
        pairs = (pool[block_table[r].long()].flatten(0, 1)[:used] for pool in (key, value))
        keys, values = (
            pair.repeat_interleave(query.shape[1] // key.shape[2], 1).transpose(0, 1)
            for pair in pairs
        )
        at = torch.arange(used - own.shape[1], used)[:, None]
        seen = torch.arange(used) <= at
        if window_size[0] >= 0:
            seen &= torch.arange(used) >= at - window_size[0]
        scores = (own @ keys.mT * scale).masked_fill(~seen, -torch.inf)
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


class Fake:
    """Records as `CudaRecorder` does, but reruns the function; counts, and may fail."""

    def __init__(self, device=None):
        self.recorded, self.replayed, self.error = 0, 0, None

    def __call__(self, run):
        if self.error is not None:
            raise self.error
        self.recorded += 1
        hidden, features = (None if out is None else out.clone() for out in run())

        def replay():
            self.replayed += 1
            for place, out in zip((hidden, features), run(), strict=True):
                if place is not None:
                    place.copy_(out)

        if hidden is not None:
            hidden.fill_(torch.nan)  # a capture computes nothing
        return Recording(replay, hidden, features)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Lets varlen attention and graphs be chosen on a CPU; returns the recorders made."""
    made = []

    def record(device):
        made.append(Fake())
        return made[-1]

    def device_aside(device, attention, *, batch_invariant):
        return honest(torch.device("cuda"), attention, batch_invariant=batch_invariant)

    honest = graphs._reason_against
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(choice, "_reason_against", lambda *_: None)
    monkeypatch.setattr(graphs, "_reason_against", device_aside)
    monkeypatch.setattr(graphs, "CudaRecorder", record)
    return made


def random_batches(seed, count, *, most=12, device="cpu", page=PAGE):
    """Steps of up to `most` requests on scattered pages, as drafts come and are rejected."""
    source = random.Random(seed)
    for _ in range(count):
        pages = source.sample(range(PAGES), PAGES)
        parts = []
        single = source.random() < 0.3
        for _ in range(source.randint(1, most)):
            table = BlockTable([pages.pop() for _ in range(source.randint(1, 3))], page)
            length = 1 if single else min(source.choice((0, 1, 1, 3, 8)), table.capacity)
            start = source.randint(0, table.capacity - length)
            parts.append((table, start, [source.randrange(61) for _ in range(length)]))
        if any(part[2] for part in parts):
            yield RaggedBatch.build(parts, device)


def noise_in(cache):
    """Fill a cache, so that what is read from a wrong place is wrong."""
    for layer in range(len(cache.shapes)):
        for memory in cache.pool(layer):
            torch.manual_seed(layer)
            memory.copy_(torch.randn(memory.shape).to(memory))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss", "qwen3_moe", "gemma4", "gpt2"])
def test_padding_changes_nothing(tiny_model, name):
    target = Target.from_model(tiny_model(name))
    scratch = BlockTable((PAGES,), PAGE)
    tiers = set()
    for batch in random_batches(1, 15, most=20):
        padded = pad_to_tier(batch, scratch)
        own, tier = len(batch.rows_T), len(padded.rows_T)
        assert tier == min(t for t in TIERS if t >= own)
        assert padded.offsets[-1] == sum(count for _, _, count in padded.runs) == tier
        outs = []
        for each in (batch, padded):
            cache = target.new_cache(PAGES + 1, PAGE)
            noise_in(cache)
            out = target.forward(each, cache, taps=TAPS, logit_rows="all")
            outs.append(torch.cat((out.hidden_TH, out.features_TF, out.logits_NV), -1)[:own])
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        tiers.add(tier)
    assert len(tiers) >= 3


def distance(a, b):
    """The largest difference; infinite where one is not a number."""
    return float((a - b).abs().nan_to_num(torch.inf).max())


def compare(target, batches):
    """The largest difference of replayed steps to the same steps run eagerly."""
    caches = [target.new_cache(PAGES, PAGE) for _ in range(2)]
    for cache in caches:
        noise_in(cache)
    worst = 0.0
    replayer = target._replayer
    for i, batch in enumerate(batches):
        taps = (TAPS, ())[i % 2]
        outs = []
        for own, cache in zip((replayer, None), caches, strict=True):
            target._replayer = own
            out = target.forward(batch, cache, taps=taps, logit_rows="all")
            outs.append(out.logits_NV if out.features_TF is None else out.features_TF)
        target._replayer = replayer
        worst = max(worst, distance(*outs))
    rows = torch.arange(PAGES * PAGE, device=target.device)
    held = [cache.read(0, rows)[0] for cache in caches]
    return max(worst, distance(*held))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_moe", "gemma4 shared", "gpt2"])
def test_replayed_steps_equal_eager_ones(tiny_model, as_on_cuda, name):
    target = Target.from_model(tiny_model(name), attention="varlen", cuda_graphs=True)
    [recorder] = as_on_cuda
    assert target.cuda_graphs
    assert (recorder.recorded, recorder.replayed) == (1, 2)  # the trial at load
    batches = list(random_batches(2, 50))
    assert compare(target, batches) < 1e-4
    kinds = set()
    for i, batch in enumerate(batches):
        tier = len(pad_to_tier(batch, BlockTable((0,))).rows_T)
        kinds.add((tier, max(s.length for s in batch.segments) == 1, i % 2))
    assert recorder.recorded == 1 + len(kinds)
    assert recorder.replayed == 2 + len(batches)


@pytest.mark.parametrize("buffer", ["_packed_3T", "_starts_R1", "_used_R", "_pages_RP"])
def test_control_a_buffer_that_is_not_refreshed(tiny_model, as_on_cuda, monkeypatch, buffer):
    fill = Buffers.fill

    def forgetful(self, batch):
        whole = vars(self)[buffer]
        before = whole.clone()
        done = fill(self, batch)
        if self.filled:
            whole.copy_(before)
        self.filled = True
        return done

    tables = [BlockTable((3, 7, 1), PAGE), BlockTable((8, 5, 2), PAGE)]
    batches = [
        RaggedBatch.build([(tables[0], 5, [4, 9, 1]), (tables[1], 2, [8])]),
        RaggedBatch.build([(tables[1], 3, [6]), (tables[0], 0, [2, 7, 5])]),
    ]
    target = Target.from_model(tiny_model("qwen3"), attention="varlen", cuda_graphs=True)
    assert compare(target, batches * 2) < 1e-4
    monkeypatch.setattr(Buffers, "filled", False, raising=False)
    monkeypatch.setattr(Buffers, "fill", forgetful)
    assert compare(target, batches * 2) > 1e-2


def test_results_stay_when_the_next_step_comes(tiny_model, as_on_cuda):
    target = Target.from_model(tiny_model("qwen3"), attention="varlen", cuda_graphs=True)
    cache, table = target.new_cache(2, PAGE), BlockTable((0, 1), PAGE)
    with torch.inference_mode():
        first = target.forward(RaggedBatch.build([(table, 0, [5])]), cache, taps=TAPS)
        before = first.hidden_TH.clone(), first.features_TF.clone()
        target.forward(RaggedBatch.build([(table, 1, [9])]), cache, taps=TAPS)
        assert torch.equal(first.hidden_TH, before[0])
        assert torch.equal(first.features_TF, before[1])
    assert first.hidden_TH.is_inference()


def test_only_decoding_steps_are_recorded(tiny_model, as_on_cuda):
    target = Target.from_model(tiny_model("qwen3"), attention="varlen")
    [recorder] = as_on_cuda
    cache = target.new_cache(80, PAGE)
    assert cache.pages == 81

    def replays(*parts, cache=cache):
        before = recorder.replayed
        target.forward(RaggedBatch.build(parts), cache)
        return recorder.replayed - before

    def request(first, length, start=0):
        return BlockTable(range(first, first + 20), PAGE), start, [1] * length

    assert replays(request(0, 16), request(20, 1)) == 1
    assert replays(request(0, 17)) == 0  # a prompt's chunk
    assert replays(request(0, 1, start=70)) == 0  # beyond the model's context
    assert replays(*(request(i % 60, 8) for i in range(32))) == 1
    assert replays(*(request(i % 60, 8) for i in range(32)), request(60, 1)) == 0  # no such tier
    assert replays(request(0, 2), cache=None) == 0
    strange = Target.from_model(tiny_model("qwen3")).new_cache(80, PAGE)
    assert replays(request(0, 2), cache=strange) == 0


def test_recordings_belong_to_a_cache_and_go_with_it(tiny_model, as_on_cuda):
    target = Target.from_model(tiny_model("qwen3"), attention="varlen")
    batch = RaggedBatch.build([(BlockTable((1,), PAGE), 0, [5, 6])])
    outs = []
    gc.collect()
    before = len(target._replayer._homes)
    for _ in range(2):
        cache = target.new_cache(2, PAGE)
        outs.append(target.forward(batch, cache).hidden_TH)
        assert bool(cache.read(0, batch.rows_T)[0].ne(0).any())
    assert torch.equal(*outs)
    unused = target.new_cache(2, PAGE)
    held = len(target._replayer._homes)
    assert held > before
    del unused
    gc.collect()
    assert len(target._replayer._homes) < held


def test_a_recording_that_fails_is_said_once(tiny_model, as_on_cuda, caplog):
    target = Target.from_model(tiny_model("qwen3"), attention="varlen")
    [recorder] = as_on_cuda
    recorder.error = RuntimeError("operation not permitted when stream is capturing.\nMore.")
    caches = [target.new_cache(PAGES, PAGE) for _ in range(2)]
    plain = Target.from_model(tiny_model("qwen3"))
    with caplog.at_level(logging.WARNING):
        for batch in random_batches(3, 6):
            got = target.forward(batch, caches[0]).hidden_TH
            expected = plain.forward(batch, caches[1]).hidden_TH
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            assert not target.cuda_graphs
    [record] = caplog.records
    assert record.getMessage() == (
        "Qwen3ForCausalLM runs without CUDA graphs: a step cannot be recorded (operation not "
        "permitted when stream is capturing)."
    )
    assert target.new_cache(3).pages == 3


def test_what_cannot_be_recorded_is_refused_or_left(tiny_model, as_on_cuda, caplog):
    for name in ("gpt_oss", "gemma2"):
        caplog.clear()
        model = tiny_model(name)
        reason = r"cannot be recorded \(its attention has sinks or soft-capped scores\); leave"
        with pytest.raises(UsageError, match=reason):
            Target.from_model(model, attention="varlen", cuda_graphs=True)
        caplog.clear()
        assert not Target.from_model(tiny_model(name), attention="varlen").cuda_graphs
        assert len(caplog.records) == 1
    options = {"attention": "plain", "cuda_graphs": True}
    with pytest.raises(UsageError, match="'varlen', and it is 'plain'"):
        Target.from_model(tiny_model("qwen3"), **options)
    with pytest.raises(UsageError, match="batch-invariant mode runs in tiles"):
        Target.from_model(tiny_model("qwen3"), batch_invariant=True, **options)
    assert not Target.from_model(tiny_model("qwen3"), cuda_graphs=False).cuda_graphs


def test_a_model_that_looks_its_batch_up_on_the_host_is_found_out(tiny_model, as_on_cuda, caplog):
    model = tiny_model("qwen3")
    rotary = model.model.rotary_emb
    honest, known = rotary.forward, {}

    def stubborn(x, position_ids, *args, **kwargs):
        """Turns what lies at an address as it did when it first saw it."""
        if position_ids.shape[1] == 8:  # a tier that no eager step of the trial has
            position_ids = known.setdefault(8, position_ids.clone())
        return honest(x, position_ids, *args, **kwargs)

    rotary.forward = stubborn
    with caplog.at_level(logging.WARNING):
        assert not Target.from_model(model, attention="varlen").cuda_graphs
    assert "a replayed step differs from the same step run eagerly by" in caplog.text
    with pytest.raises(UsageError, match="a replayed step differs"):
        Target.from_model(model, attention="varlen", cuda_graphs=True)


def test_a_cpu_has_no_graphs(tiny_model):
    assert not Target.from_model(tiny_model("qwen3")).cuda_graphs
    with pytest.raises(UsageError, match="on cpu: they need a CUDA device; leave them to 'auto'"):
        Target.from_model(tiny_model("qwen3"), cuda_graphs=True)
    with pytest.raises(UsageError, match="cuda_graphs is 'yes', but must be 'auto', True or"):
        Target.from_model(tiny_model("qwen3"), cuda_graphs="yes")


needs_varlen = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(tiny_model, **options):
    """A model in bfloat16 whose attention the kernel takes, or a skip that says why."""
    model = tiny_model("qwen3", head_dim=64, num_hidden_layers=8, max_position_embeddings=4096)
    try:
        return Target.from_model(model.to(torch.bfloat16).cuda(), attention="varlen", **options)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@needs_varlen
def test_cuda_replayed_steps_equal_eager_ones(tiny_model):
    target = on_cuda(tiny_model, cuda_graphs=True)
    source, page, worst = random.Random(0), 16, []
    caches = [target.new_cache(PAGES, page) for _ in range(2)]
    for cache in caches:
        noise_in(cache)
    replayer = target._replayer
    for batch in random_batches(source.random(), 50, device=target.device, page=page):
        outs = []
        for own, cache in zip((replayer, None), caches, strict=True):
            target._replayer = own
            outs.append(target.forward(batch, cache, logit_rows="all").logits_NV.float())
        target._replayer = replayer
        worst.append(float((outs[0] - outs[1]).norm() / outs[1].norm()))
    assert target.cuda_graphs
    assert max(worst) < 0.1


@pytest.mark.gpu
@needs_varlen
def test_cuda_decoding_one_request_is_faster_replayed(tiny_model):
    seconds = {}
    for switch in (True, False):
        target = on_cuda(tiny_model, cuda_graphs=switch)
        cache, table = target.new_cache(8), BlockTable(range(8))
        for position in range(100):
            if position == 20:
                torch.cuda.synchronize()
                started = time.perf_counter()
            batch = RaggedBatch.build([(table, position, [position % 61])], target.device)
            target.forward(batch, cache, logit_rows="all")
        torch.cuda.synchronize()
        seconds[switch] = time.perf_counter() - started
    assert seconds[True] < 0.8 * seconds[False]
