"""The ragged forward must equal the model's own forward, for every family and in every mix."""

import pytest
import torch

from dspark.attention.paged_cache import BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.targets.target import Target

LIMIT = 1e-4
TOKENS = {
    "a": [7, 3, 22, 14, 9, 41, 5, 18, 30, 2, 11, 27, 50, 33],
    "b": [4, 44, 8, 8, 17, 25, 39, 12, 6, 19, 21],
    "c": [31, 10, 55, 28, 3, 3, 16, 47, 29, 13],
}
# Pages of four tokens: in order, side by side at unequal distances, and scattered.
TABLES = {
    "a": BlockTable((8, 9, 10, 11), 4),
    "b": BlockTable((4, 5, 6), 4),
    "c": BlockTable((2, 7, 0, 1), 4),
}
# Per step: request, first position, position after the last, tokens that will be rejected.
STEPS = [
    [("a", 0, 8, 0)],
    [("a", 8, 12, 2), ("b", 0, 6, 0)],
    [("a", 10, 13, 0), ("b", 6, 7, 0), ("c", 0, 9, 0)],
    [("b", 7, 11, 0), ("a", 13, 14, 0), ("c", 9, 10, 0)],
]
# The same, but the rejected tokens stay in the cache.
KEPT = [STEPS[0], STEPS[1], [("a", 12, 13, 0), *STEPS[2][1:]], STEPS[3]]


@torch.no_grad()
def own_forward(model):
    model.set_attn_implementation("eager")
    return {
        name: model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        for name, ids in TOKENS.items()
    }


@pytest.fixture
def prepare(tiny_model, shared):
    """The model's own results and the target made of it."""

    def build(name):
        if name not in shared:
            model = tiny_model(name)
            own = own_forward(model)
            shared[name] = own, Target.from_model(model)
        return shared[name]

    return build


def run(target, steps, taps=()):
    """Feed the steps; per step and request the rows that count, with their positions."""
    cache = target.new_cache(12, page_size=4)
    for step in steps:
        parts = []
        for name, start, end, rejected in step:
            ids = TOKENS[name][start:end]
            for i in range(1, rejected + 1):
                ids[-i] = (ids[-i] + 7) % 61
            parts.append((TABLES[name], start, ids))
        batch = RaggedBatch.build(parts)
        out = target.forward(batch, cache, taps=taps, logit_rows="all")
        for (name, start, end, rejected), offset in zip(step, batch.offsets, strict=False):
            count = end - start - rejected
            yield name, slice(start, start + count), slice(offset, offset + count), out


def worst_difference(target, own, steps):
    return max(
        float((out.logits_NV[rows] - own[name].logits[0, positions]).abs().max())
        for name, positions, rows, out in run(target, steps)
    )


def test_logits_and_features(prepare, family):
    own, target = prepare(family)
    last = target.num_layers - 1
    taps = (-1, *range(last + 1))
    seen = 0
    for name, positions, rows, out in run(target, STEPS, taps):
        states = [state[0, positions] for state in own[name].hidden_states]
        assert (out.logits_NV[rows] - own[name].logits[0, positions]).abs().max() <= LIMIT
        assert (out.hidden_TH[rows] - states[-1]).abs().max() <= LIMIT
        features = out.features_TF[rows].split(target.hidden_size, -1)
        for feature, state in zip(features[:-1], states[:-1], strict=True):
            assert (feature - state).abs().max() <= LIMIT
        normed = target._anatomy.norm(features[-1])
        assert (normed - states[-1]).abs().max() <= LIMIT
        assert (features[-1] - states[-1]).abs().max() > LIMIT
        seen += positions.stop - positions.start
    assert seen == sum(map(len, TOKENS.values()))


def test_control_rejected_tokens_must_be_overwritten(prepare, family):
    own, target = prepare(family)
    assert worst_difference(target, own, KEPT) > 100 * LIMIT


@pytest.mark.parametrize("name", ["qwen3 windows", "gemma3", "gemma4", "gpt_oss"])
@pytest.mark.parametrize("window", [3, 5])
def test_control_wrong_window(prepare, monkeypatch, name, window):
    own, target = prepare(name)
    assert worst_difference(target, own, STEPS) <= LIMIT
    attention = target._anatomy.layers[0].self_attn
    monkeypatch.setattr(attention, "sliding_window", window)
    assert worst_difference(target, own, STEPS) > 10 * LIMIT


def test_without_a_cache_tokens_see_their_own_segment(prepare, family):
    own, target = prepare(family)
    batch = RaggedBatch.fresh(list(TOKENS.values()))
    logits = target.forward(batch, logit_rows="all").logits_NV
    expected = torch.cat([out.logits[0] for out in own.values()])
    assert (logits - expected).abs().max() <= LIMIT


def test_bfloat16_stays_close(tiny_model):
    model = tiny_model("qwen3").to(torch.bfloat16)
    own = own_forward(model)
    target = Target.from_model(model)
    assert target.new_cache(1).dtype == torch.bfloat16
    for name, positions, rows, out in run(target, STEPS):
        expected = own[name].logits[0, positions].float()
        difference = (out.logits_NV[rows].float() - expected).norm() / expected.norm()
        assert difference < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(tiny_model, family):
    own = own_forward(tiny_model(family))
    target = Target.from_model(tiny_model(family).cuda())
    cache = target.new_cache(12, page_size=4)
    for step in STEPS:
        parts = [(TABLES[name], start, TOKENS[name][start:end]) for name, start, end, _ in step]
        batch = RaggedBatch.build(parts, target.device)
        logits = target.forward(batch, cache, logit_rows="all").logits_NV.cpu()
        expected = torch.cat([own[name].logits[0, start:end] for name, start, end, _ in step])
        assert (logits - expected).abs().max() <= 1e-3
