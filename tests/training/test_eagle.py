"""The training-time test against its plain form, and against the reference's own numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import flex_attention as flex

from dspark.data.samples import Sample, SampleBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.config import BackboneConfig
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter, Eagle3Weights
from dspark.drafters.layers import rotary
from dspark.training.losses import chain_attention as room
from dspark.training.losses.chain_attention import chain_attention
from dspark.training.losses.eagle3 import ChainRows, ttt_loss, ttt_passes
from dspark.training.losses.terms import TermWeights
from tests.helpers.targets import lent_parts, parts_in

GOLDEN = Path(__file__).parents[1] / "golden"
VOCAB, WIDTH, PASSES = 13, 8, 4
LENGTHS = (9, 12)


def packed(ids, mask):
    """Sequences of ids and masks, packed."""
    rows = zip(ids, mask, strict=True)
    return SampleBatch.of([Sample(tuple(i.tolist()), tuple(m.tolist())) for i, m in rows])


def made_up(dtype=torch.float64, softcap=None, known=None, projected=False):
    """A drafter, two packed sequences, and their features and teacher states."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    parts = lent_parts(randn(VOCAB, WIDTH), randn(VOCAB, WIDTH), logit_softcap=softcap)
    taps = (1,) if projected else (0, 1)
    backbone = BackboneConfig(WIDTH, 12, 1, 4, 2, 6, len(taps), input_projection=projected)
    config = Eagle3Config(
        backbone, VOCAB, taps, 2, ttt_length=PASSES, draft_vocab_size=known and len(known)
    )
    drafter = Eagle3Drafter.from_target(
        parts, config, generator=generator, init_std=0.4, draft_tokens=known and torch.tensor(known)
    )
    ids = [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]
    mask = [torch.zeros(length, dtype=torch.bool) for length in LENGTHS]
    mask[0][4:] = True
    mask[1][1:3] = mask[1][7:9] = True
    batch = packed(ids, mask)
    features = randn(sum(LENGTHS), len(taps) * WIDTH)
    return drafter.to(dtype), batch, features, randn(sum(LENGTHS), WIDTH)


def one_by_one(batch, *rows):
    """Of each sequence its tokens, its mask and its own of some rows."""
    parts = (torch.split(x, batch.lengths) for x in (batch.input_ids_T, batch.loss_mask_T, *rows))
    return zip(*parts, strict=True)


def plain_passes(drafter, features, batch, passes):
    """Every sequence by itself."""
    alone = [
        dense_passes(drafter, own[None], ids[None], passes)[:, 0]
        for ids, _, own in one_by_one(batch, features)
    ]
    return torch.cat(alone, dim=1)


def dense_passes(drafter, features, ids, passes):
    """Every pass over an explicit mask and all keys repeated head by head."""
    weights, config = Eagle3Weights.of(drafter), drafter.config.backbone
    length, repeat = ids.shape[1], config.num_heads // config.num_kv_heads
    hidden, keys, values, outputs = weights.project(features), [], [], []
    for t in range(passes):
        shifted = torch.cat([ids[:, t + 1 :], torch.zeros(len(ids), t + 1, dtype=ids.dtype)], 1)

        def mix(_, query, key, value, t=t):
            keys.append(key.repeat_interleave(repeat, 2))
            values.append(value.repeat_interleave(repeat, 2))
            scores = torch.einsum("bqad,bkad->baqk", query, torch.cat(keys, 1))
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            seen = torch.cat([causal] + [torch.eye(length, dtype=torch.bool)] * t, 1)
            scores = (scores * config.attention_scale).masked_fill(~seen, float("-inf"))
            return torch.einsum("baqk,bkad->bqad", scores.softmax(-1), torch.cat(values, 1))

        table = rotary(torch.arange(length) + t, config, hidden.dtype)
        hidden = weights.step(drafter.borrowed.embed(shifted), hidden, table, mix)
        outputs.append(hidden)
    return torch.stack(outputs)


def normed(drafter, hidden):
    if drafter.config.backbone.input_projection:
        return hidden
    mean = hidden.pow(2).mean(-1, keepdim=True) + drafter.config.backbone.rms_norm_eps
    return hidden / mean.sqrt() * drafter.norm.weight


def plain_loss(drafter, hidden, teacher, batch, decay, supervision):
    """Row by row; the loss, each pass's cross-entropy and rate, and the chains' mean length."""
    passes = hidden.shape[0]
    known = torch.arange(VOCAB) if drafter.t2d is None else drafter.t2d.nonzero().flatten()
    ces, rates = [[] for _ in range(passes)], [[] for _ in range(passes)]
    gained = []
    for _, mask, states, own in one_by_one(batch, teacher, hidden.transpose(0, 1)):
        laws, length = drafter.target_logits(states).softmax(-1), len(mask)
        logits = drafter.base_logits(normed(drafter, own))
        for i in range(length):
            survival, chain = 1.0, []
            for t in range(passes):
                if supervision == "predicted":
                    counts = i + 2 + t < length and bool(mask[i + 2 + t])
                else:  # the token two places before, but for the sequence's last
                    counts = i + t < length - 1 and bool(mask[i + t])
                if not counts:
                    survival = 0.0
                    continue
                law = laws[i + 1 + t]
                log_draft = logits[i, t].log_softmax(-1)
                learnt = law[known] / law[known].sum()
                ces[t].append(-(learnt * log_draft).sum())
                drafted = torch.zeros_like(law).index_copy(0, known, log_draft.exp())
                rates[t].append(torch.minimum(drafted, law).sum())
                survival = survival * rates[t][-1]
                if t == 0 or chain:
                    chain.append(survival)
            if chain:
                gained.append(1 + sum(chain))
    rows = sum(batch.lengths)
    shares = [rows if supervision == "reference" else max(len(ce), 1) for ce in ces]
    ce = torch.stack([sum(ce) / share for ce, share in zip(ces, shares, strict=True)])
    loss = sum(decay**t * ce[t] for t in range(passes))
    rate = torch.stack([sum(r) / len(r) for r in rates])
    return loss, ce, rate, sum(gained) / len(gained), sum(map(len, ces))


def gradients(loss, drafter):
    return torch.autograd.grad(loss, list(drafter.parameters()))


@pytest.mark.parametrize("supervision", ["predicted", "reference"])
@pytest.mark.parametrize(
    ("chunk_rows", "softcap", "known", "projected"),
    [
        (1024, None, None, False),
        (7, None, None, False),
        (7, 3.0, None, True),
        (7, 3.0, (0, 2, 3, 7, 8, 12), False),
    ],
)
def test_loss_and_gradients_equal_the_plain_form(
    supervision, chunk_rows, softcap, known, projected, monkeypatch
):
    monkeypatch.setattr(room, "_TILE_ROWS", 4)
    drafter, batch, features, teacher = made_up(softcap=softcap, known=known, projected=projected)
    chains = ChainRows.build(batch, PASSES, supervision)
    hidden = ttt_passes(drafter, features, chains)
    report = ttt_loss(drafter, hidden, teacher, chains, decay=0.7, chunk_rows=chunk_rows)
    slow = plain_passes(drafter, features, batch, PASSES)
    loss, ce, rate, length, count = plain_loss(drafter, slow, teacher, batch, 0.7, supervision)
    torch.testing.assert_close(hidden, slow)
    torch.testing.assert_close(report.loss, loss)
    torch.testing.assert_close(report.ce_P, ce.detach())
    torch.testing.assert_close(report.accept_rate_P, rate.detach())
    torch.testing.assert_close(report.accepted_length, length.detach())
    assert report.supervised == count
    found, wanted = gradients(report.loss, drafter), gradients(loss, drafter)
    for (name, _), mine, theirs in zip(drafter.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda m, n=name: f"{n}: {m}")
        assert mine.abs().max() > 0, name


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_attention_has_exact_gradients(extra, monkeypatch):
    monkeypatch.setattr(room, "_TILE_ROWS", 3)
    generator = torch.Generator().manual_seed(4)

    def leaf(heads):
        x = torch.randn(heads, 7, 4, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    query, pairs = leaf(4), [leaf(2) for _ in range(2 * (extra + 1))]

    def attend(query, *pairs):
        past = pairs[: extra + 1], pairs[extra + 1 :]
        return chain_attention(query, *past, lengths=(5, 2), scale=0.6)

    assert torch.autograd.gradcheck(attend, (query, *pairs))


def chain_and_gradients(attend, extra, dtype, device="cpu"):
    """Mixed values of more rows than a stretch of flex holds, and gradients of a sum of them."""
    generator, lengths = torch.Generator().manual_seed(4), (130, 5, 70)

    def draw(heads):
        return torch.randn(heads, sum(lengths), 16, generator=generator, dtype=torch.float64)

    drawn = [draw(heads) for heads in (4, *[2] * (2 * extra + 2))]
    query, *pairs = leaves = [x.to(device, dtype).requires_grad_() for x in drawn]
    past = pairs[: extra + 1], pairs[extra + 1 :]
    out = attend(query, *past, lengths=lengths, scale=0.6)
    weight = draw(4).to(device, dtype)
    found = out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)
    return [x.double().cpu() for x in found]


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_flex_attention_equals_tiles(extra, monkeypatch):
    """With its gradients, which torch has on a CPU but does not offer."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    both = (
        chain_and_gradients(f, extra, torch.float64) for f in (room.flex_chain, room.tiled_chain)
    )
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_gpu_flex_attention_equals_tiles(extra):
    found = chain_and_gradients(room.flex_chain, extra, torch.float32, "cuda")
    wanted = chain_and_gradients(room.tiled_chain, extra, torch.float64)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).norm() < 5e-3 * theirs.norm()


@pytest.mark.parametrize("lengths", [(128, 256), (130, 5, 300), (700,)])
def test_the_stretches_of_flex_are_those_that_are_seen(lengths):
    """Against torch's own, for which it looks at all pairs."""
    mask, rows = room._causal_mask(lengths, torch.device("cpu")), sum(lengths)
    wanted = flex.create_block_mask(mask.mask_mod, None, None, rows, rows, device="cpu")
    assert torch.equal(mask.to_dense(), wanted.to_dense())
    assert torch.equal(mask.full_kv_num_blocks, wanted.full_kv_num_blocks)
    assert mask is room._causal_mask(lengths, torch.device("cpu"))


def test_passes_equal_the_references():
    drafter = load_drafter(GOLDEN / "eagle3" / "draft")
    drafter.bind(parts_in(GOLDEN / "dspark_vanilla" / "target"))
    data = load_file(GOLDEN / "eagle3" / "train.safetensors")
    ids = data["input_ids"]
    chains = ChainRows.build(packed(ids, torch.ones_like(ids, dtype=torch.bool)), 4)
    hidden = ttt_passes(drafter, data["context_features"].flatten(0, 1), chains)
    logits = drafter.base_logits(normed(drafter, hidden))
    for t in range(4):
        real = slice(0, 39 - t)  # the rows behind read a token that is not there
        for mine, name in ((hidden, "hidden"), (logits, "logits")):
            theirs = data[f"ttt{t}_{name}"]
            own = mine[t].view_as(theirs)
            torch.testing.assert_close(own[:, real], theirs[:, real], atol=1e-5, rtol=0)


def loss_of(drafter, batch, features, teacher, **options):
    chains = ChainRows.build(batch, PASSES)
    return ttt_loss(drafter, ttt_passes(drafter, features, chains), teacher, chains, **options)


def test_what_is_not_supervised_changes_nothing():
    """Neither the tokens and features of unsupervised ends nor the teacher's states elsewhere."""
    drafter, batch, features, teacher = made_up()
    before = loss_of(drafter, batch, features, teacher).loss
    ids, others = batch.input_ids_T.clone(), [x.clone() for x in (features, teacher)]
    for x in (ids, *others):
        x[-3:] = 1  # behind the second sequence's last answer
    others[1][[0, 9]] = 5  # a law at position 0 is no pass's label
    assert torch.equal(loss_of(drafter, replace(batch, input_ids_T=ids), *others).loss, before)
    teacher[7] += 1  # the law of token 8
    assert not torch.equal(loss_of(drafter, batch, features, teacher).loss, before)


def test_a_batch_is_its_sequences_one_at_a_time():
    drafter, batch, features, teacher = made_up()
    whole = loss_of(drafter, batch, features, teacher)
    counts = ChainRows.build(batch, PASSES).counts_P
    parts = [
        loss_of(drafter, packed([ids], [mask]), own, states, total_counts_P=counts)
        for ids, mask, own, states in one_by_one(batch, features, teacher)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.ce_P for part in parts), whole.ce_P)
    assert sum(part.supervised for part in parts) == whole.supervised


def test_other_terms_than_cross_entropy():
    """Total variation against its definition; the rest is the core's, see test_losses.py."""
    drafter, batch, features, teacher = made_up()
    report = loss_of(drafter, batch, features, teacher, weights=TermWeights(tv=1.0), decay=0.5)
    rates = report.accept_rate_P
    expected = sum(0.5**t * 2 * (1 - rates[t]) for t in range(PASSES))
    torch.testing.assert_close(report.loss.detach(), expected)
    assert all(g.any() for g in gradients(report.loss, drafter))


def test_a_batch_without_supervision_gives_zero_and_finite_gradients():
    drafter, batch, features, teacher = made_up()
    batch = replace(batch, loss_mask_T=torch.zeros_like(batch.loss_mask_T))
    report = loss_of(drafter, batch, features, teacher)
    assert (report.loss.item(), report.supervised) == (0.0, 0)
    assert all(not g.any() for g in gradients(report.loss, drafter))


def test_metrics_alone_need_no_gradient():
    drafter, batch, features, teacher = made_up()
    wanted = loss_of(drafter, batch, features, teacher)
    with torch.no_grad():
        report = loss_of(drafter, batch, features, teacher)
    assert torch.equal(report.loss, wanted.loss.detach())
    assert not report.loss.requires_grad
    assert torch.equal(report.accept_rate_P, wanted.accept_rate_P)


def test_bfloat16_is_close_and_its_loss_is_fp32():
    exact, rounded = made_up(torch.float32), made_up(torch.bfloat16)
    reports = [loss_of(*made) for made in (exact, rounded)]
    assert reports[1].loss.dtype == torch.float32
    assert reports[1].loss.item() == pytest.approx(reports[0].loss.item(), rel=0.03)
    names = [name for name, _ in exact[0].named_parameters()]
    found = [gradients(r.loss, d[0]) for r, d in zip(reports, (exact, rounded), strict=True)]
    for name, one, other in zip(names, *found, strict=True):
        cosine = torch.cosine_similarity(one.flatten(), other.float().flatten(), 0)
        assert cosine > 0.97, name
