"""A drafter that knows some of the target's tokens only."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.data.samples import Sample
from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.errors import CheckpointError, CompatibilityError
from dspark.training.losses.blocks import LossWeights, block_loss
from dspark.training.losses.totals import LogTotals
from tests.helpers.checkpoints import save_published

TOKENS = torch.tensor([0, 2, 3, 7, 11, 20, 30, 36])
UNKNOWN = [t for t in range(37) if t not in TOKENS.tolist()]


@pytest.fixture
def make_reduced(make_drafter, make_parts):
    def make(parts=None, **changes):
        parts = parts or make_parts()
        return make_drafter(parts, draft_vocab_size=8, draft_tokens=TOKENS, **changes)

    return make


def context(length=9):
    return torch.randn(length, 48, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", None])
def test_the_law_is_the_full_drafters_on_known_tokens_and_0_elsewhere(
    make_reduced, make_drafter, make_parts, draft, kind
):
    heads = {"markov_head_type": kind} if kind else {"markov_rank": 0, "confidence_head": False}
    parts = make_parts(logit_softcap=3.0, head_bias_V=torch.linspace(-1, 1, 37))
    reduced, full = make_reduced(parts, **heads), make_drafter(parts, **heads)
    state = reduced.state_dict()
    rows = {
        n: x for n, x in state.items() if n not in ("d2t", "t2d", "markov_head.markov_w2.weight")
    }
    if kind:
        w2 = torch.zeros(37, 4).index_copy(0, TOKENS, state["markov_head.markov_w2.weight"])
        rows["markov_head.markov_w2.weight"] = w2
    full.load_state_dict(rows)
    forced = [2, 3, 7, 11, 20]
    mine, theirs = (
        draft(reduced, [context()], [1], forced=forced),
        draft(full, [context()], [1], forced=forced),
    )
    assert all(torch.equal(known, TOKENS) for known in mine[0].known)
    for own, other in zip(mine[0].logits, theirs[0].logits, strict=True):
        assert (own.shape, other.shape) == ((1, 8), (1, 37))
        torch.testing.assert_close(own, other[:, TOKENS])


def test_drawn_tokens_are_token_ids_of_the_target(make_reduced, draft):
    draw, _ = draft(make_reduced(), [context()], [1])
    assert all(int(token) in TOKENS.tolist() for token in draw.tokens)


def test_only_the_known_rows_of_the_head_are_held(make_reduced, make_parts):
    parts = make_parts()
    drafter = make_reduced(parts)
    assert drafter.borrowed.embedding_VH is parts.embedding_VH
    assert torch.equal(drafter.own_head_VH, parts.head_VH[TOKENS])
    assert drafter.markov_head.markov_w2.weight.shape == (8, 4)
    assert drafter.markov_head.markov_w1.weight.shape == (37, 4)
    assert torch.equal(TOKENS - torch.arange(8), drafter.d2t)
    drafter.bind(make_parts(head_VH=parts.head_VH + 1))
    assert torch.equal(drafter.own_head_VH, parts.head_VH[TOKENS])
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(drafter.target_logits(hidden), hidden @ (parts.head_VH + 1).T)


def test_the_loss_equals_the_loss_over_all_tokens(make_reduced, run_training):
    drafter = make_reduced().double()
    random = torch.Generator().manual_seed(3)
    ids = TOKENS[torch.randint(8, (16,), generator=random)]
    ids[9] = UNKNOWN[0]
    features = torch.randn(16, 48, generator=random, dtype=torch.float64)
    hidden, blocks = run_training(drafter, features, ids.tolist())
    teacher = torch.randn(16, 16, generator=random, dtype=torch.float64)
    weights = LossWeights(ce=0.5, tv=0.7, confidence=0.0)
    report = block_loss(drafter, hidden, teacher, blocks, weights, chunk_rows=5)

    head = drafter.markov_head
    m, k = blocks.labels_MK.shape
    feature = head.block(blocks.previous_MK, hidden)
    law = (drafter.base_logits(hidden) + head.bias(feature)).softmax(-1)
    whole = torch.zeros(m, k, 37, dtype=law.dtype).index_copy(-1, TOKENS, law)
    rows = blocks.positions_MK.clamp(max=15)
    target = drafter.target_logits(teacher[rows]).softmax(-1)
    tv = (whole - target).abs().sum(-1)
    known = (blocks.labels_MK[..., None] == TOKENS).any(-1)
    chance = whole.gather(-1, blocks.labels_MK[..., None])[..., 0]
    ce = -chance.where(known, 1.0).log()
    w = blocks.supervised_MK * torch.exp(-torch.arange(k) / weights.decay).double()
    expected = (w * (0.5 * ce + 0.7 * tv)).sum() / (w.sum() + 1e-6)
    assert not known[blocks.supervised_MK].all()
    torch.testing.assert_close(report.loss, expected, check_dtype=False, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(expected, drafter.fc.weight, retain_graph=True)[0]
    found = torch.autograd.grad(report.loss, drafter.fc.weight)[0]
    torch.testing.assert_close(found, wanted, check_dtype=False, atol=1e-6, rtol=1e-4)


def test_the_loss_by_kept_normalisers_is_the_same(
    make_reduced, make_parts, run_training, monkeypatch
):
    parts = make_parts(logit_softcap=3.0, head_bias_V=torch.linspace(-1, 1, 37))
    drafter = make_reduced(parts).double()
    random = torch.Generator().manual_seed(4)
    ids = TOKENS[torch.randint(8, (16,), generator=random)].tolist()
    features = torch.randn(16, 48, generator=random, dtype=torch.float64)
    teacher = torch.randn(16, 16, generator=random, dtype=torch.float64)
    samples = [
        Sample(tuple(ids[:7]), (False,) * 3 + (True,) * 4),
        Sample(tuple(ids[7:]), (True,) * 9),
    ]
    kept, rows, whole = LogTotals(drafter, 2.0), [], drafter.target_logits
    for name in ("target_logits", "target_log_totals"):
        real = getattr(drafter, name)
        monkeypatch.setattr(
            drafter, name, lambda states, real=real: rows.append(len(states)) or real(states)
        )
    assert LogTotals(drafter, 1.9).of(samples, teacher) is None
    totals = kept.of(samples, teacher)
    assert sum(rows) == 5 + 9
    assert not totals[:2].any()
    torch.testing.assert_close(totals[2:], whole(teacher).logsumexp(-1)[2:], check_dtype=False)
    assert torch.equal(kept.of(samples[::-1], teacher.roll(9, 0)), totals.roll(9, 0))
    assert sum(rows) == 5 + 9
    for weights in (LossWeights(), LossWeights(tv=0.0, kl=1.0, lk_hybrid=0.5)):
        found = []
        for given in (None, whole(teacher).logsumexp(-1)):
            hidden, blocks = run_training(drafter, features, ids)
            report = block_loss(drafter, hidden, teacher, blocks, weights, log_total_T=given)
            found.append((report.loss, *torch.autograd.grad(report.loss, drafter.fc.weight)))
        torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    assert sum(rows) > 14
    seen = sum(rows)
    block_loss(drafter, hidden, teacher, blocks, weights, log_total_T=given)
    assert sum(rows) == seen  # the known tokens' rows of the head are all that is read


def test_it_travels_attached_and_not_published(make_reduced, make_parts, draft, tmp_path):
    drafter = make_reduced()
    with pytest.raises(CompatibilityError, match="draft_vocab_size 8"):
        save_published(drafter, tmp_path / "published")
    save_attached(drafter, tmp_path, dtype=None)
    loaded = load_drafter(tmp_path)
    loaded.bind(make_parts())
    one, _ = draft(drafter, [context()], [1])
    two, _ = draft(loaded, [context()], [1])
    assert torch.equal(torch.stack(one.logits), torch.stack(two.logits))
    save_attached(loaded.bfloat16(), tmp_path)
    stored = load_file(tmp_path / "dspark" / "model.safetensors")
    assert (stored["d2t"].dtype, stored["t2d"].dtype) == (torch.int64, torch.bool)
    assert stored["lm_head.weight"].shape == (8, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("d2t"), "lacks the tensors d2t"),
        (lambda t: t.update(d2t=t["d2t"].int()), r"d2t as torch\.int32"),
        (lambda t: t.update(d2t=t["d2t"] + 1), "do not name the same tokens"),
        (lambda t: t.update(d2t=t["d2t"].flip(0)), "do not name the same tokens"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(37, 16)}), r"lm_head.weight \[37, 16\]"),
    ],
)
def test_damaged_vocabularies_are_named(make_reduced, tmp_path, change, words):
    save_attached(make_reduced(), tmp_path)
    path = tmp_path / "dspark" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words):
        load_drafter(tmp_path)


def test_a_head_that_is_missing_comes_from_the_target(make_reduced, make_parts, tmp_path):
    save_attached(make_reduced(), tmp_path, dtype=None)
    path = tmp_path / "dspark" / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    loaded, parts = load_drafter(tmp_path), make_parts(seed=8)
    loaded.bind(parts)
    assert torch.equal(loaded.own_head_VH, parts.head_VH[TOKENS])


def test_the_tokens_must_be_named_and_fewer_than_all(make_drafter):
    with pytest.raises(CompatibilityError, match="draft_tokens"):
        make_drafter(draft_vocab_size=8)
    with pytest.raises(CompatibilityError, match="draft_vocab_size is 37"):
        make_drafter(draft_vocab_size=37)
