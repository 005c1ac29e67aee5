"""Both layouts of a block: the anchor's slot predicts, or it is thrown away."""

import json

import pytest
import torch

from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.errors import CheckpointError, CompatibilityError
from dspark.training.losses.blocks import LossWeights, block_loss
from tests.helpers.checkpoints import save_published

LENGTH = 24


def features(width=48):
    return torch.randn(LENGTH, width, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def training_pass(run_training):
    def run(drafter):
        ids = torch.randint(36, (LENGTH,), generator=torch.Generator().manual_seed(3))
        return run_training(drafter, features(), ids.tolist())

    return run


@pytest.mark.parametrize("from_anchor", [True, False])
def test_the_slots_that_predict_are_those_of_the_layout(
    make_drafter, training_pass, one_block, from_anchor
):
    drafter = make_drafter(sample_from_anchor=from_anchor)
    slots = drafter.config.block_size
    assert drafter.block_size == (slots if from_anchor else slots - 1)
    hidden, blocks = training_pass(drafter)
    embed = drafter.borrowed.embed
    for n, anchor in enumerate(blocks.anchors_M.tolist()):
        tokens = [int(blocks.tokens_M[n]), *[36] * (slots - 1)]
        alone = drafter.run_blocks(
            features()[:anchor],
            torch.arange(anchor),
            embed(torch.tensor(tokens)),
            torch.arange(anchor, anchor + slots),
            one_block(anchor, slots),
        )
        wanted = alone if from_anchor else alone[1:]
        torch.testing.assert_close(hidden[n], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("from_anchor", [True, False])
def test_decoding_equals_training(make_drafter, draft, training_pass, from_anchor, kind):
    drafter = make_drafter(sample_from_anchor=from_anchor, markov_head_type=kind)
    hidden, blocks = training_pass(drafter)
    head = drafter.markov_head
    for n, anchor in enumerate(blocks.anchors_M.tolist()):
        previous, own = blocks.previous_MK[n : n + 1], hidden[n : n + 1]
        logits = drafter.base_logits(own) + head.bias(head.block(previous, own))
        draw, proposal = draft(
            drafter,
            [features()[:anchor]],
            [int(blocks.tokens_M[n])],
            forced=blocks.labels_MK[n].tolist(),
        )
        assert len(draw.logits) == drafter.block_size
        torch.testing.assert_close(torch.stack(draw.logits, 1), logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            proposal.confidence_logits_RK, drafter.confidence_logits(own, previous)
        )


def test_fewer_drafts_are_a_prefix_of_all_without_the_anchors_slot(make_drafter, draft):
    drafter = make_drafter(sample_from_anchor=False)
    full, _ = draft(drafter, [features()], [1])
    some, _ = draft(drafter, [features()], [1], num_drafts=2)
    assert (len(full.logits), len(some.logits)) == (4, 2)
    torch.testing.assert_close(torch.stack(some.logits), torch.stack(full.logits[:2]))


def test_the_loss_teaches_slot_j_the_token_at_its_own_position(make_drafter, training_pass):
    drafter = make_drafter(sample_from_anchor=False).train()
    hidden, blocks = training_pass(drafter)
    assert hidden.shape[1] == blocks.labels_MK.shape[1] == 4
    teacher = torch.randn(LENGTH, 16, generator=torch.Generator().manual_seed(4))
    report = block_loss(drafter, hidden, teacher, blocks, LossWeights())
    report.loss.backward()
    assert all(p.grad is not None for p in drafter.parameters())


def test_the_other_layout_is_not_taken_for_ours(make_drafter, one_block):
    drafter = make_drafter(sample_from_anchor=False)
    positions = torch.arange(5, 9)[None]
    with pytest.raises(CompatibilityError, match="blocks of 4 slots, but the drafter runs 5"):
        drafter(
            features(), torch.arange(LENGTH), torch.tensor([1]), positions, one_block(5, slots=4)
        )


def test_the_layout_is_written_where_it_has_a_place(make_drafter, tmp_path):
    drafter = make_drafter(sample_from_anchor=False)
    save_attached(drafter, tmp_path, dtype=None)
    written = json.loads((tmp_path / "dspark" / "config.json").read_text())
    assert (written["sample_from_anchor"], written["block_size"]) == (False, 5)
    assert load_drafter(tmp_path).block_size == 4
    with pytest.raises(CompatibilityError, match="sample_from_anchor false"):
        save_published(drafter, tmp_path / "published")
    assert not (tmp_path / "published").exists()
    save_published(make_drafter(), tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    assert "sample_from_anchor" not in config
    assert load_drafter(tmp_path / "published").config.sample_from_anchor
    path.write_text(json.dumps(config | {"sample_from_anchor": "no"}))
    with pytest.raises(CheckpointError, match="sample_from_anchor 'no'"):
        load_drafter(tmp_path / "published")


def test_one_slot_is_too_few_where_the_first_is_thrown_away(make_drafter):
    with pytest.raises(CompatibilityError, match=r"block_size is 1 .*at least 2"):
        make_drafter(sample_from_anchor=False, block_size=1)
