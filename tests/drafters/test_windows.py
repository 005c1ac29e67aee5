"""Draft layers that see only the last context rows."""

from dataclasses import replace

import pytest
import torch

from dspark.errors import CompatibilityError

LENGTH, WINDOW = 24, 4


def features():
    return torch.randn(LENGTH, 48, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def make_windowed(make_drafter, tiny_config):
    def make(layers=(0, 1), causal=False, **changes):
        backbone = replace(
            tiny_config.backbone,
            sliding_layers=layers,
            sliding_window=WINDOW,
            causal_windows=causal,
        )
        return make_drafter(backbone=backbone, **changes)

    return make


@pytest.mark.parametrize("from_anchor", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_decoding_equals_training(make_windowed, draft, run_training, layers, causal, from_anchor):
    drafter = make_windowed(layers, causal, sample_from_anchor=from_anchor)
    both, lengths = torch.cat((features(), features()[:9])), (LENGTH, 9)
    ids = torch.randint(36, (LENGTH + 9,), generator=torch.Generator().manual_seed(3))
    hidden, blocks = run_training(drafter, both, ids.tolist(), lengths, anchors=12)
    assert blocks.first_M.unique().tolist() == [0, LENGTH]
    head = drafter.markov_head
    for n, (first, anchor) in enumerate(zip(blocks.first_M, blocks.anchors_M, strict=True)):
        own, previous = hidden[n : n + 1], blocks.previous_MK[n : n + 1]
        logits = drafter.base_logits(own) + head.bias(head.block(previous, own))
        forced, token = blocks.labels_MK[n].tolist(), int(blocks.tokens_M[n])
        draw, _ = draft(drafter, [features()[: anchor - first]], [token], forced=forced)
        torch.testing.assert_close(torch.stack(draw.logits, 1), logits, atol=1e-4, rtol=1e-4)


def test_every_slot_sees_the_rows_of_the_window_and_no_other(make_windowed, draft):
    drafter = make_windowed()
    rows = features()[:10]
    base, _ = draft(drafter, [rows], [1])
    for row in range(10):
        changed = rows.clone()
        changed[row] += 1.0
        other, _ = draft(drafter, [changed], [1], forced=[int(t) for t in base.tokens])
        moved = [(a - b).abs().max() > 1e-4 for a, b in zip(base.logits, other.logits, strict=True)]
        assert moved == [row >= 10 - WINDOW] * 5


def test_a_layer_without_a_window_still_sees_everything(make_windowed, draft):
    drafter = make_windowed((1,))
    changed = features()[:10]
    base, _ = draft(drafter, [changed], [1])
    changed[0] += 1.0
    other, _ = draft(drafter, [changed], [1])
    assert (base.logits[0] - other.logits[0]).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_causal_windows_hide_later_slots(make_windowed, draft, causal):
    drafter = make_windowed(causal=causal, mask_token_id=None)
    base, _ = draft(drafter, [features()], [1])
    with torch.no_grad():
        drafter.mask_embedding.weight.add_(1.0)
    drafter.eval()
    other, _ = draft(drafter, [features()], [1])
    assert torch.allclose(base.logits[0], other.logits[0], atol=1e-5) == causal
    assert not torch.allclose(base.logits[1], other.logits[1], atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_layers": (0, 2), "sliding_window": 4}, r"\[0, 2\].*0 to 1"),
        ({"sliding_layers": (0,), "sliding_window": None}, "sliding_window is None"),
        ({"sliding_layers": (0,), "sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": 4}, "sliding_layers is empty"),
    ],
)
def test_windows_that_cannot_be_are_refused(make_drafter, tiny_config, changes, words):
    with pytest.raises(CompatibilityError, match=words):
        make_drafter(backbone=replace(tiny_config.backbone, **changes))
