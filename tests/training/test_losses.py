import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark.data.samples import Sample, SampleBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.training.losses.blocks import (
    DFLASH_WEIGHTS,
    AnchorBlocks,
    LossWeights,
    block_loss,
    position_weights,
    sample_anchors,
)
from dspark.training.losses.chunked import LossInputs, SupervisedRows, chunked_loss
from tests.helpers.targets import lent_parts, parts_in

BLOCK_FIELDS = [name for name in AnchorBlocks.__dataclass_fields__ if name != "rows"]
GOLDEN = Path(__file__).parents[1] / "golden" / "dspark_vanilla"


@pytest.fixture(scope="module")
def golden():
    """Drafter, tensors and report of the reference's training forward."""
    drafter = load_drafter(GOLDEN / "draft")
    drafter.bind(parts_in(GOLDEN / "target"))
    report = json.loads((GOLDEN / "report.json").read_text())
    return drafter, load_file(GOLDEN / "train.safetensors"), report


def batch_of(input_ids_BS, loss_mask_BS):
    rows = zip(input_ids_BS.tolist(), loss_mask_BS.bool().tolist(), strict=True)
    return SampleBatch.of([Sample(tuple(ids), tuple(mask)) for ids, mask in rows])


def golden_blocks(data):
    """The reference's blocks that exist, packed, and which of its [B, N] they are."""
    batch, keep = batch_of(data["input_ids"], data["loss_mask"]), data["anchor_keep"]
    rows = data["anchor_positions"] + 40 * torch.arange(2).unsqueeze(1)
    return batch, AnchorBlocks.build(batch, rows[keep], 4), keep


def golden_hidden(drafter, data, batch, blocks):
    return drafter(
        data["target_hidden_states"].flatten(0, 1),
        batch.positions_T,
        blocks.tokens_M,
        blocks.positions_MK,
        blocks.layout(4),
    )


def test_training_forward_equals_the_reference(golden):
    drafter, data, _ = golden
    batch, blocks, keep = golden_blocks(data)
    chosen = data["eval_mask"]
    assert not keep.all()
    assert not chosen[~keep].any()
    assert torch.equal(blocks.supervised_MK, chosen[keep])
    assert torch.equal(blocks.labels_MK[chosen[keep]], data["target_ids"][chosen])
    hidden = golden_hidden(drafter, data, batch, blocks)
    bias = drafter.markov_head.bias(drafter.markov_head.block(blocks.previous_MK, hidden))
    rows = blocks.anchors_M.unsqueeze(1) + torch.arange(4)
    teacher = data["target_last_hidden_states"].flatten(0, 1)[rows.clamp(max=79)]
    pairs = {
        "draft_logits": drafter.base_logits(hidden) + bias,
        "confidence_pred": drafter.confidence_logits(hidden, blocks.previous_MK),
        "aligned_target_logits": drafter.target_logits(teacher),
    }
    for name, mine in pairs.items():
        theirs = data[name][chosen]
        torch.testing.assert_close(
            mine[chosen[keep]], theirs, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("chunk_rows", [7, 1024])
@pytest.mark.parametrize(
    ("name", "weights"), [("dspark", LossWeights()), ("dflash", DFLASH_WEIGHTS)]
)
def test_losses_gradients_and_metrics_equal_the_reference(golden, name, weights, chunk_rows):
    drafter, data, report = golden
    batch, blocks, _ = golden_blocks(data)
    drafter.zero_grad()
    hidden = golden_hidden(drafter, data, batch, blocks)
    teacher = data["target_last_hidden_states"].flatten(0, 1)
    result = block_loss(drafter, hidden, teacher, blocks, weights, chunk_rows=chunk_rows)
    result.loss.backward()
    grads = [p.grad for p in drafter.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    assert result.loss.item() == pytest.approx(report["loss"][name], rel=1e-5)
    assert norm.item() == pytest.approx(report["loss"][f"{name}_grad_norm"], rel=1e-5)
    logged = report[f"metrics_{name}"]
    expected = {
        "ce": logged["train/ce_loss"],
        "confidence": logged["train/confidence_loss"],
        "tv": report["metrics_dspark"]["train/l1_loss"],
        "accepted_length": logged["train/tau_probabilistic"],
        "confidence_error": logged["train/confidence_abs_error"],
        "confidence_bias": logged["train/confidence_bias"],
        "survival_bias": logged["train/confidence_cumprod_bias"],
    }
    for field, value in expected.items():
        assert getattr(result, field).item() == pytest.approx(value, rel=2e-5), field
    rates = [logged[f"train/accept_rate@{k}"] for k in range(4)]
    assert result.accept_rate_K.tolist() == pytest.approx(rates, rel=1e-5)
    assert result.supervised == int(data["eval_mask"].sum())


VOCAB, WIDTH, BLOCK = 13, 8, 4
KNOWN = (0, 2, 3, 7, 8, 12)
TERMS = {
    "dspark": LossWeights(),
    "ce": LossWeights(ce=0.3, tv=0.0, confidence=0.0),
    "tv": LossWeights(ce=0.0, tv=0.8, confidence=0.0),
    "kl": LossWeights(ce=0.0, tv=0.0, kl=0.7),
    "soft_ce": LossWeights(ce=0.0, tv=0.0, soft_ce=0.7),
    "lk": LossWeights(ce=0.0, tv=0.0, lk=0.6),
    "lk_hybrid": LossWeights(ce=0.0, tv=0.0, lk_hybrid=0.6, lk_eta=2.0),
    "all": LossWeights(0.3, 0.8, 0.4, 0.2, 0.6, 0.5, confidence=0.5, decay=2.0),
}


def tiny(kind="vanilla", softcap=None, known=None, dtype=torch.float64, lengths=(12, 9)):
    """A drafter, packed blocks, their hidden states and the teacher's states."""
    source = torch.Generator().manual_seed(0)
    backbone = BackboneConfig(WIDTH, 8, 1, 2, 1, 4, 2)
    config = DSparkConfig(backbone, VOCAB, BLOCK, 12, (0, 1), 4, 3, kind)
    config = replace(config, draft_vocab_size=known and len(known))

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    embedding, head = draw(VOCAB, WIDTH), draw(VOCAB, WIDTH)
    parts = lent_parts(embedding, head, head_bias_V=draw(VOCAB), logit_softcap=softcap)
    drafter = DSparkDrafter.from_target(
        parts, config, generator=source, init_std=0.5, draft_tokens=known and torch.tensor(known)
    ).to(dtype)
    samples = []
    for i, length in enumerate(lengths):
        ids = torch.randint(VOCAB, (length,), generator=source).tolist()
        samples.append(Sample(tuple(ids), tuple(j >= 3 * i for j in range(length))))
    batch = SampleBatch.of(samples)
    sources = [torch.Generator().manual_seed(i) for i in range(len(samples))]
    blocks = AnchorBlocks.build(batch, sample_anchors(batch, 6, sources), BLOCK)
    return drafter, blocks, draw(*blocks.labels_MK.shape, WIDTH), draw(sum(lengths), WIDTH)


def obvious_loss(drafter, hidden, teacher, blocks, weights):
    """The losses over every slot, whole tensors, plain autograd."""
    head = drafter.markov_head
    logits = drafter.base_logits(hidden) + head.bias(head.block(blocks.previous_MK, hidden))
    rows = (blocks.anchors_M.unsqueeze(1) + torch.arange(BLOCK)).clamp(max=len(teacher) - 1)
    target = drafter.target_logits(teacher[rows]).softmax(-1)
    known = torch.arange(VOCAB) if drafter.t2d is None else drafter.t2d.nonzero().flatten()
    log_draft = logits.log_softmax(-1)
    law = torch.zeros_like(target).index_copy(-1, known, log_draft.exp())
    w = position_weights(blocks, weights.decay, hidden.dtype)
    taught = (blocks.labels_MK[..., None] == known).double()
    ce = -(taught * log_draft).sum(-1)
    tv = (law - target).abs().sum(-1)
    given = target[..., known] / target[..., known].sum(-1, keepdim=True)
    soft_ce = -(given * log_draft).sum(-1)
    kl = (given * (given.log() - log_draft)).sum(-1)
    kept = torch.minimum(law, target).sum(-1)
    share = torch.exp(-weights.lk_eta * kept.detach())
    label = (1 - 0.5 * tv).clamp(0, 1).detach()
    confidence = drafter.confidence_logits(hidden, blocks.previous_MK).sigmoid()
    bce = -(label * confidence.log() + (1 - label) * (1 - confidence).log())
    total = weights.ce * ce + weights.tv * tv + weights.confidence * bce + weights.kl * kl
    total = total + weights.soft_ce * soft_ce - weights.lk * kept.log()
    total = total + weights.lk_hybrid * (share * kl + (1 - share) * (1 - kept))
    return (w * total).sum() / (w.sum() + 1e-6)


def gradients(drafter, hidden, loss_of):
    """Loss, and its gradients in the hidden states and all heads' parameters."""
    drafter.zero_grad()
    leaf = hidden.clone().requires_grad_()
    loss = loss_of(leaf)
    (3.0 * loss).backward()
    heads = {n: p.grad for n, p in drafter.named_parameters() if "head" in n and p.grad is not None}
    return {"loss": loss.detach(), "hidden": leaf.grad, **heads}


@pytest.mark.parametrize("known", [None, KNOWN])
@pytest.mark.parametrize("terms", TERMS)
def test_every_terms_gradient_is_exact(terms, known):
    drafter, blocks, hidden, teacher = tiny(softcap=2.0, known=known)
    weights = TERMS[terms]
    found = gradients(
        drafter,
        hidden,
        lambda h: block_loss(drafter, h, teacher, blocks, weights, chunk_rows=5).loss,
    )
    wanted = gradients(
        drafter, hidden, lambda h: obvious_loss(drafter, h, teacher, blocks, weights)
    )
    for name, mine in found.items():
        torch.testing.assert_close(
            mine, wanted[name], atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found["hidden"].abs().max() > 1e-3
    missing = {n for n in wanted.keys() - found.keys() if wanted[n].any()}
    assert not missing


class Afresh(torch.autograd.Function):
    """The loss, computed again for each gradient: `gradcheck` takes several of one result."""

    @staticmethod
    def forward(ctx, loss_of, *inputs):
        ctx.loss_of, ctx.inputs = loss_of, [x.detach() for x in inputs]
        return loss_of(*ctx.inputs)

    @staticmethod
    def backward(ctx, grad):
        leaves = [x.clone().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.loss_of(*leaves), leaves, grad)


@pytest.mark.parametrize("terms", ["dspark", "kl", "lk"])
def test_gradcheck(terms):
    drafter, blocks, hidden, teacher = tiny(softcap=2.0, lengths=(7,))
    weights, rows = replace(TERMS[terms], confidence=0.0), blocks.rows
    slots = rows.slots_N
    bias = drafter.markov_head.markov_w2.weight.detach()
    feature = drafter.markov_head.block(blocks.previous_MK, hidden).flatten(0, 1)[slots].detach()

    def loss_of(hidden, feature, bias):
        inputs = LossInputs(
            drafter, hidden, feature, bias, teacher[rows.teacher_U],
            blocks.labels_MK.flatten()[slots], torch.linspace(0.1, 1, len(slots)).double(),
        )  # fmt: skip
        return chunked_loss(inputs, rows, weights, chunk_rows=3)[0]

    leaves = [x.requires_grad_() for x in (hidden.flatten(0, 1)[slots].clone(), feature, bias)]
    assert torch.autograd.gradcheck(lambda *x: Afresh.apply(loss_of, *x), leaves)
    loss = loss_of(*leaves)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_fp32_gradients_are_within_1e_5_of_fp64():
    exact, rounded = tiny(), tiny(dtype=torch.float32)
    found = [
        gradients(
            drafter,
            hidden,
            lambda h, d=drafter, t=teacher, b=blocks: block_loss(d, h, t, b, TERMS["all"]).loss,
        )
        for drafter, blocks, hidden, teacher in (exact, rounded)
    ]
    for name, mine in found[1].items():
        error = (mine.double() - found[0][name]).norm() / found[0][name].norm()
        assert error < 1e-5, name


def test_nearly_nothing_kept_still_has_a_gradient():
    """-log a where a is far below what 1 - a could say in fp32."""
    drafter, blocks, hidden, teacher = tiny(dtype=torch.float32)
    hidden = hidden * 8
    weights = replace(TERMS["lk"], confidence=0.0)
    report = block_loss(drafter, hidden.requires_grad_(), teacher, blocks, weights)
    report.loss.backward()
    wide, _, states, target = tiny()
    leaf = (states * 8).requires_grad_()
    obvious_loss(wide, leaf, target, blocks, weights).backward()
    assert report.lk > 3
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, atol=1e-5, rtol=1e-3)


def test_a_law_that_teaches_several_slots_is_computed_once(monkeypatch):
    drafter, blocks, hidden, teacher = tiny()
    rows, real = [], drafter.target_logits

    def counting(hidden_UH):
        rows.append(len(hidden_UH))
        return real(hidden_UH)

    monkeypatch.setattr(drafter, "target_logits", counting)
    block_loss(drafter, hidden, teacher, blocks, LossWeights(), chunk_rows=5)
    assert sum(rows) == len(blocks.rows.counts) < blocks.rows.slots_N.numel()
    assert len(rows) > 3


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_chunked_gradients_are_exact(kind, chunk_rows):
    drafter, blocks, hidden, teacher = tiny(kind)
    weights = LossWeights(ce=0.3, tv=0.8, confidence=0.5, decay=2.0)
    found = [
        gradients(drafter, hidden, loss_of)
        for loss_of in (
            lambda h: block_loss(drafter, h, teacher, blocks, weights, chunk_rows=chunk_rows).loss,
            lambda h: obvious_loss(drafter, h, teacher, blocks, weights),
        )
    ]
    assert found[0].keys() == found[1].keys()
    assert {n for n, _ in drafter.named_parameters() if "head" in n} < found[0].keys()
    assert all(grad.any() for grad in found[0].values())
    for name, mine in found[0].items():
        torch.testing.assert_close(mine, found[1][name], atol=1e-10, rtol=1e-10)


def test_confidence_can_be_kept_from_training_the_backbone():
    drafter, blocks, hidden, teacher = tiny()
    weights = LossWeights(ce=0.0, tv=0.0, confidence=1.0)
    for detach, moved in ((False, True), (True, False)):
        drafter.zero_grad()
        leaf = hidden.clone().requires_grad_()
        chosen = replace(weights, detach_confidence=detach)
        block_loss(drafter, leaf, teacher, blocks, chosen).loss.backward()
        grads = [leaf.grad, drafter.markov_head.markov_w1.weight.grad]  # W2 gets none either way
        assert [g is not None and bool(g.any()) for g in grads] == [moved, moved]
        assert drafter.confidence_head.proj.weight.grad.any()


def test_shares_of_a_step_add_up_to_the_whole():
    drafter, blocks, hidden, teacher = tiny()
    weights = LossWeights()
    whole = block_loss(drafter, hidden, teacher, blocks, weights)
    total = position_weights(blocks, weights.decay, torch.float64).sum()
    second = blocks.first_M > 0
    parts = []
    for chosen in (~second, second):
        own = {name: getattr(blocks, name)[chosen] for name in BLOCK_FIELDS}
        rows = (own["anchors_M"].unsqueeze(1) + torch.arange(BLOCK)).clamp(max=len(teacher) - 1)
        half = AnchorBlocks(**own, rows=SupervisedRows.build(rows, own["supervised_MK"]))
        parts.append(
            block_loss(drafter, hidden[chosen], teacher, half, weights, total_weight=total).loss
        )
    torch.testing.assert_close(sum(parts), whole.loss)


def test_a_perfect_drafter_has_no_distance_left():
    drafter, blocks, _, teacher = tiny()
    with torch.no_grad():
        drafter.markov_head.markov_w2.weight.zero_()
    rows = (blocks.anchors_M.unsqueeze(1) + torch.arange(BLOCK)).clamp(max=len(teacher) - 1)
    report = block_loss(drafter, teacher[rows], teacher, blocks, LossWeights())
    assert report.tv.item() == pytest.approx(0.0, abs=1e-6)
    assert report.accept_rate_K.tolist() == pytest.approx([1.0] * BLOCK)
    lengths = 1 + blocks.supervised_MK.sum(-1).double().mean()
    assert report.accepted_length.item() == pytest.approx(lengths.item())


def test_a_batch_without_anchors_costs_nothing():
    drafter, blocks, hidden, teacher = tiny()
    none = {name: getattr(blocks, name)[:0] for name in BLOCK_FIELDS}
    nothing = AnchorBlocks(
        **none, rows=SupervisedRows.build(none["labels_MK"], none["supervised_MK"])
    )
    leaf = hidden[:0].clone().requires_grad_()
    report = block_loss(drafter, leaf, teacher, nothing, LossWeights())
    report.loss.backward()
    assert report.loss.item() == 0.0
    assert report.supervised == 0
    assert torch.isfinite(report.accepted_length)


def test_evaluation_needs_no_graph():
    drafter, blocks, hidden, teacher = tiny()
    with torch.no_grad():
        report = block_loss(drafter, hidden, teacher, blocks, LossWeights())
    graph = block_loss(drafter, hidden, teacher, blocks, LossWeights())
    assert not report.loss.requires_grad
    torch.testing.assert_close(report.loss, graph.loss.detach())
