import logging

import pytest
import torch

from dspark.drafters.config import evenly_spaced_taps
from dspark.drafters.dspark import DSparkDrafter
from dspark.errors import CompatibilityError


def contexts(*lengths, width=48):
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(length, width, generator=generator) for length in lengths]


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_batch_drafts_what_each_request_drafts_alone(make_drafter, draft, kind):
    drafter = make_drafter(markov_head_type=kind)
    features, anchors = contexts(3, 11, 6), [5, 6, 7]
    together, proposal = draft(drafter, features, anchors)
    assert proposal.lengths is None
    for r in range(3):
        alone, own = draft(drafter, features[r : r + 1], anchors[r : r + 1])
        for k in range(drafter.block_size):
            torch.testing.assert_close(alone.logits[k][0], together.logits[k][r])
        torch.testing.assert_close(own.confidence_logits_RK[0], proposal.confidence_logits_RK[r])


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_drafting_equals_the_teacher_forced_training_path(make_drafter, draft, one_block, kind):
    drafter = make_drafter(markov_head_type=kind)
    (features,), anchor, block = contexts(8), 5, drafter.block_size
    draw, proposal = draft(drafter, [features], [anchor])
    previous = torch.tensor([[anchor, *(int(t) for t in draw.tokens[:-1])]])
    inputs = torch.tensor([anchor, *[36] * (block - 1)])
    hidden = drafter.run_blocks(
        features,
        torch.arange(8),
        drafter.borrowed.embed(inputs),
        torch.arange(8, 8 + block),
        one_block(8, block),
    )[None]
    head = drafter.markov_head
    logits = drafter.base_logits(hidden) + head.bias(head.block(previous, hidden))
    torch.testing.assert_close(torch.stack(draw.logits, 1), logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        proposal.confidence_logits_RK, drafter.confidence_logits(hidden, previous)
    )


def test_fewer_drafts_are_a_prefix_of_all(make_drafter, draft):
    drafter = make_drafter()
    full, all_confidence = draft(drafter, contexts(7, 4), [1, 2])
    some, confidence = draft(drafter, contexts(7, 4), [1, 2], num_drafts=2)
    assert len(some.logits) == 2
    for few, many in zip(some.logits, full.logits, strict=False):
        torch.testing.assert_close(few, many)
    torch.testing.assert_close(
        confidence.confidence_logits_RK, all_confidence.confidence_logits_RK[:, :2]
    )


def test_without_heads_it_is_dflash(make_drafter, draft):
    drafter = make_drafter(markov_rank=0, confidence_head=False)
    assert not any("head" in name for name in drafter.state_dict())
    draw, proposal = draft(drafter, contexts(7), [1])
    assert len(draw.logits) == drafter.block_size
    assert proposal.confidence_logits_RK is None


def test_confidence_of_a_slot_does_not_depend_on_its_own_token(make_drafter, draft):
    drafter, forced = make_drafter(), [2, 3, 4, 5, 6]
    _, base = draft(drafter, contexts(7), [1], forced=forced)
    with torch.no_grad():
        drafter.markov_head.markov_w1.weight[6] += 5.0
    _, same = draft(drafter, contexts(7), [1], forced=forced)
    torch.testing.assert_close(base.confidence_logits_RK, same.confidence_logits_RK)
    with torch.no_grad():
        drafter.markov_head.markov_w1.weight[5] += 5.0
    _, other = draft(drafter, contexts(7), [1], forced=forced)
    moved = (base.confidence_logits_RK - other.confidence_logits_RK).abs()[0] > 1e-3
    assert moved.tolist() == [False, False, False, False, True]


def test_markov_bias_is_added_after_the_softcap(make_parts, make_drafter, draft):
    capped = make_drafter(make_parts(logit_softcap=0.5, head_bias_V=torch.ones(37)))
    plain = make_drafter(make_parts(head_bias_V=torch.ones(37)))
    bare = make_drafter(make_parts())
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(plain.base_logits(hidden), bare.base_logits(hidden) + 1)
    expected = 0.5 * torch.tanh(plain.base_logits(hidden) / 0.5)
    torch.testing.assert_close(capped.base_logits(hidden), expected)
    with torch.no_grad():
        capped.markov_head.markov_w2.weight.mul_(50.0)
    draw, _ = draft(capped, contexts(7), [1])
    assert draw.logits[0].abs().max() > 2.0


def test_embedding_scale_is_applied_as_the_target_rounds_it(make_parts, make_drafter, draft):
    parts = make_parts()
    scaled = make_drafter(make_parts(embedding_scale=3.0))
    by_hand = make_drafter(make_parts(embedding_VH=parts.embedding_VH * 3.0))
    one, _ = draft(scaled, contexts(7), [1])
    two, _ = draft(by_hand, contexts(7), [1])
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits))
    rounded = make_drafter(
        make_parts(embedding_VH=parts.embedding_VH.bfloat16(), embedding_scale=50.6)
    )
    assert rounded.borrowed.embedding_scale == float(torch.tensor(50.6).bfloat16())


def test_embedding_and_head_are_references_outside_the_parameters(make_parts, make_drafter):
    parts = make_parts()
    drafter = make_drafter(parts)
    assert drafter.borrowed.embedding_VH is parts.embedding_VH
    assert drafter.borrowed.head_VH is parts.head_VH
    held = {t.data_ptr() for t in (*drafter.parameters(), *drafter.buffers())}
    assert not held & {parts.embedding_VH.data_ptr(), parts.head_VH.data_ptr()}


def test_from_target_is_seeded_and_takes_the_final_norm(tiny_config, make_parts):
    def make(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return DSparkDrafter.from_target(make_parts(), tiny_config, generator=generator, **options)

    one, same, other = make(3), make(3), make(4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert torch.equal(one.norm.weight, make_parts().final_norm_H)
    assert torch.equal(make(3, copy_final_norm=False).norm.weight, torch.ones(16))
    wide = make(3, init_std=0.5)
    assert wide.fc.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert one.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 18}, "hidden_size is 16.*target's is 18"),
        ({"vocab_size": 99}, "vocab_size is 37.*target's is 99"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(make_parts, make_drafter, changes, words):
    with pytest.raises(CompatibilityError, match=words):
        make_drafter(make_parts(**changes))


def test_taps_beyond_the_target_are_refused(make_parts, make_drafter):
    drafter = make_drafter()
    drafter.bind(make_parts(), num_target_layers=5)
    with pytest.raises(CompatibilityError, match=r"\[-1, 1, 4\].*has 4 layers"):
        drafter.bind(make_parts(), num_target_layers=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_layer_ids": (1, 1, 4)}, "strictly increasing"),
        ({"target_layer_ids": (-2, 1, 4)}, "strictly increasing"),
        ({"target_layer_ids": (0, 1, 6)}, "to 5"),
        ({"target_layer_ids": (0, 1)}, "num_taps is 3"),
        ({"mask_token_id": 37}, "mask_token_id is 37"),
        ({"markov_rank": 0}, "confidence_head_with_markov"),
        ({"block_size": 0}, "block_size is 0"),
        ({"markov_head_type": "lstm"}, "'lstm'"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(make_drafter, changes, words):
    with pytest.raises(CompatibilityError, match=words):
        make_drafter(**changes)


def test_an_unbound_drafter_says_so(tiny_config):
    with pytest.raises(CompatibilityError, match="bind"):
        DSparkDrafter(tiny_config).base_logits(torch.zeros(1, 16))


def test_own_tables_equal_to_the_targets_are_shared(make_parts, make_drafter, caplog):
    drafter, parts = make_drafter(), make_parts()
    drafter.own_embedding_VH = parts.embedding_VH.bfloat16()
    drafter.own_head_VH = parts.head_VH.clone()
    with caplog.at_level(logging.WARNING):
        drafter.bind(parts)
    assert (drafter.own_embedding_VH, drafter.own_head_VH) == (None, None)
    assert drafter.borrowed.head_VH is parts.head_VH
    assert not caplog.records


def test_own_tables_that_differ_are_kept_and_named(make_parts, make_drafter, caplog):
    drafter, parts = make_drafter(), make_parts()
    drafter.own_head_VH = parts.head_VH + 1
    with caplog.at_level(logging.WARNING):
        drafter.bind(parts)
    assert "lm_head.weight" in caplog.text
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(drafter.base_logits(hidden), hidden @ (parts.head_VH + 1).T)
    torch.testing.assert_close(drafter.target_logits(hidden), hidden @ parts.head_VH.T)


def test_decoding_runs_in_the_targets_dtype_and_leaves_parameters_alone(
    make_parts, make_drafter, draft
):
    fp32 = make_drafter()
    parts = make_parts()
    single, _ = draft(fp32, contexts(7), [1])
    double = make_drafter(
        make_parts(embedding_VH=parts.embedding_VH.double(), head_VH=parts.head_VH.double())
    )
    assert double.fc.weight.dtype == torch.float32
    from dspark.attention.paged_cache import BlockTable, PagedCache
    from dspark.attention.ragged_batch import RaggedBatch
    from dspark.drafters.base import DraftBatch

    cache, table = PagedCache(double.context_shapes, 1, dtype=torch.float64), BlockTable((0,))
    features = contexts(7)[0].double()
    rows = RaggedBatch.build([(table, 0, range(7))])
    double.observe(cache, rows, features, rows.input_ids_T)
    seen = []

    def draw(step, logits, tokens=None):
        seen.append(logits)
        return single.tokens[step]

    double.propose(cache, DraftBatch((table,), torch.tensor([1]), (7,), ([],), 5), draw)
    assert seen[0].dtype == torch.float64
    torch.testing.assert_close(
        torch.stack(seen).float(), torch.stack(single.logits), atol=1e-4, rtol=1e-4
    )


def test_fused_weights_follow_the_parameters(make_drafter, draft):
    drafter, other = make_drafter(seed=1), make_drafter(seed=2)
    before, _ = draft(drafter, contexts(7), [1])
    wanted, _ = draft(other, contexts(7), [1])
    drafter.load_state_dict(other.state_dict())
    after, _ = draft(drafter, contexts(7), [1])
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(wanted.logits))
    assert not torch.allclose(torch.stack(before.logits), torch.stack(wanted.logits))
    with torch.no_grad():
        for mine, theirs in zip(
            drafter.parameters(), make_drafter(seed=1).parameters(), strict=True
        ):
            mine.copy_(theirs)
    drafter.eval()
    again, _ = draft(drafter, contexts(7), [1])
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(before.logits))


def test_drafting_in_inference_mode_does_not_spoil_training(make_drafter, draft, one_block):
    drafter = make_drafter()
    with torch.inference_mode():
        draft(drafter, contexts(7), [1])
    hidden = drafter.run_blocks(
        contexts(7)[0], torch.arange(7), torch.randn(5, 16), torch.arange(5), one_block(7, 5)
    )
    drafter.base_logits(hidden).sum().backward()
    assert drafter.fc.weight.grad.abs().sum() > 0
    draw, _ = draft(drafter, contexts(7), [1])
    assert not draw.logits[0].requires_grad


def test_evenly_spaced_taps_are_the_published_ones():
    assert evenly_spaced_taps(36, 5) == (1, 9, 17, 25, 33)
    assert evenly_spaced_taps(40, 5) == (1, 10, 19, 28, 37)
    with pytest.raises(CompatibilityError, match="5 taps"):
        evenly_spaced_taps(6, 5)
