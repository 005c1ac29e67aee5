import json

import pytest
import torch
from safetensors.torch import load_file

from dspark.attention.packed import BlockLayout
from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.layers import rotary, rotate


def train_pass(drafter, features, anchors, tokens):
    rows = torch.tensor(anchors)
    positions = rows[:, None] + torch.arange(drafter.block_size)
    layout = BlockLayout(torch.zeros_like(rows), rows, drafter.config.block_size)
    context = torch.arange(features.shape[0])
    return drafter(features, context, torch.tensor(tokens), positions, layout)


def test_state_dict_is_the_published_one(golden, golden_drafter):
    published = json.loads((golden / "keys.json").read_text())
    trained = {name: tuple(k["shape"]) for name, k in published.items() if k["trainable"]}
    assert {n: tuple(p.shape) for n, p in golden_drafter.named_parameters()} == trained
    assert set(golden_drafter.state_dict()) == set(trained)
    assert set(published) - set(trained) == {"embed_tokens.weight", "lm_head.weight"}


def test_rotary_turns_pairs_by_position(golden_drafter):
    config = golden_drafter.backbone_config
    x = torch.randn(3, 2, config.head_dim)
    positions = torch.tensor([0, 5, 300])
    turned = rotate(x, *rotary(positions, config, x.dtype).unbind(-3))
    half = config.head_dim // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    frequency = config.rope_theta ** (-torch.arange(half) * 2 / config.head_dim)
    angle = (positions[:, None] * frequency).double()[:, None]
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(
        turned, torch.cat((expected.real, expected.imag), -1).float(), atol=1e-4, rtol=0
    )


def test_one_drafting_step_equals_the_reference(golden, golden_drafter, draft):
    step = load_file(golden / "step.safetensors")
    anchor = step["block_input_ids"][0, 0].item()
    assert step["block_input_ids"][0, 1:].eq(golden_drafter.config.mask_token_id).all()
    draw, proposal = draft(golden_drafter, [step["context_features"][0]], [anchor])
    logits = torch.stack(draw.logits, dim=1)
    torch.testing.assert_close(logits, step["corrected_logits"], atol=1e-5, rtol=0)
    assert torch.equal(torch.stack(draw.tokens, 1), step["sampled_tokens"])
    torch.testing.assert_close(
        proposal.confidence_logits_RK, step["confidence_logits"], atol=1e-5, rtol=0
    )


def test_training_pass_equals_the_reference_step(golden, golden_drafter):
    step = load_file(golden / "step.safetensors")
    features, anchor = step["context_features"][0], step["block_input_ids"][0, 0].item()
    hidden = train_pass(golden_drafter, features, [len(features)], [anchor])
    torch.testing.assert_close(hidden, step["block_hidden"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        golden_drafter.base_logits(hidden), step["base_logits"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("chunks", [2, 7, 20])
def test_context_in_chunks_equals_one_shot(golden, golden_drafter, draft, chunks):
    features = load_file(golden / "step.safetensors")["context_features"][0]
    whole, _ = draft(golden_drafter, [features], [7])
    parts, _ = draft(golden_drafter, [features], [7], chunks=chunks)
    torch.testing.assert_close(torch.stack(parts.logits), torch.stack(whole.logits))


def test_packed_blocks_do_not_see_each_other_nor_the_anchor_state(make_drafter):
    drafter = make_drafter()
    features = torch.randn(12, 48, generator=torch.Generator().manual_seed(2))
    anchors, tokens = [3, 4, 9], [1, 2, 3]
    together = train_pass(drafter, features, anchors, tokens)
    for i, anchor in enumerate(anchors):
        changed = features.clone()
        changed[anchor:] += 1.0
        alone = train_pass(drafter, changed, [anchor], [tokens[i]])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
        changed[anchor - 1] += 1.0
        other = train_pass(drafter, changed, [anchor], [tokens[i]])
        assert (other[0] - together[i]).abs().max() > 1e-2


def test_slots_of_a_block_see_each_other_in_both_directions(make_drafter):
    drafter = make_drafter(mask_token_id=None)
    features = torch.randn(6, 48, generator=torch.Generator().manual_seed(3))
    base = train_pass(drafter, features, [4], [1])
    token = train_pass(drafter, features, [4], [2])
    assert (base - token)[0, -1].abs().max() > 1e-3
    with torch.no_grad():
        drafter.mask_embedding.weight.add_(1.0)
    mask = train_pass(drafter, features, [4], [1])
    assert (base - mask)[0, 0].abs().max() > 1e-3


def test_observe_writes_rows_of_many_requests_at_once(make_drafter):
    drafter = make_drafter()
    features = torch.randn(9, 48, generator=torch.Generator().manual_seed(4))
    first, second = BlockTable((3, 0), 4), BlockTable((1, 2), 4)
    caches = [PagedCache(drafter.context_shapes, 4, page_size=4) for _ in range(2)]
    batch = RaggedBatch.build([(first, 0, range(4)), (second, 0, range(5))])
    drafter.observe(caches[0], batch, features, batch.positions_T)
    for row in torch.randperm(9, generator=torch.Generator().manual_seed(5)).tolist():
        one = slice(row, row + 1)
        part = (first, row, [0]) if row < 4 else (second, row - 4, [0])
        single = RaggedBatch.build([part])
        drafter.observe(caches[1], single, features[one], single.positions_T)
    for layer in range(len(drafter.context_shapes)):
        for table, length in ((first, 4), (second, 5)):
            for mine, theirs in zip(
                *(cache.heads(layer, table, 0, length) for cache in caches), strict=True
            ):
                assert mine.abs().sum() > 0
                torch.testing.assert_close(mine, theirs)
