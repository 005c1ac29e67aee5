import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dspark.drafters.checkpoint import load_drafter
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.training.anchors import AnchorBlocks, attention_tiles, sample_anchors
from dspark.training.losses import DFLASH_WEIGHTS, LossWeights, block_loss, position_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "dspark_vanilla"


@dataclass(frozen=True)
class Parts:
    embedding_VH: Tensor
    head_VH: Tensor
    vocab_size: int
    hidden_size: int
    embedding_scale: float = 1.0
    head_bias_V: Tensor | None = None
    logit_softcap: float | None = None
    final_norm_H: Tensor | None = None


@pytest.fixture(scope="module")
def golden():
    """Drafter, tensors and report of the reference's training forward."""
    tensors = load_file(GOLDEN / "target" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    drafter = load_drafter(GOLDEN / "draft")
    drafter.bind(Parts(embedding, head, *embedding.shape))
    report = json.loads((GOLDEN / "report.json").read_text())
    return drafter, load_file(GOLDEN / "train.safetensors"), report


def golden_blocks(data):
    return AnchorBlocks.build(
        data["input_ids"], data["loss_mask"], data["anchor_positions"], data["anchor_keep"], 4
    )


def golden_hidden(drafter, data, blocks):
    tiles = attention_tiles(blocks, data["input_ids"].shape[1], anchors_per_tile=4)
    return drafter(data["target_hidden_states"], blocks.tokens_BN, blocks.positions_BNK, tiles)


def test_training_forward_equals_the_reference(golden):
    drafter, data, _ = golden
    blocks = golden_blocks(data)
    chosen = data["eval_mask"]
    assert torch.equal(blocks.supervised_BNK, chosen)
    assert torch.equal(blocks.labels_BNK[chosen], data["target_ids"][chosen])
    hidden = golden_hidden(drafter, data, blocks)
    feature = drafter.markov_head.block(blocks.previous_BNK.flatten(0, 1), hidden.flatten(0, 1))
    bias = drafter.markov_head.bias(feature).view(data["draft_logits"].shape)
    pairs = {
        "draft_logits": drafter.base_logits(hidden) + bias,
        "confidence_pred": drafter.confidence_logits(hidden, blocks.previous_BNK),
        "aligned_target_logits": drafter.target_logits(
            data["target_last_hidden_states"][
                torch.arange(2)[:, None, None], blocks.positions_BNK.clamp(max=39)
            ]
        ),
    }
    for name, mine in pairs.items():
        torch.testing.assert_close(
            mine[chosen], data[name][chosen], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("chunk_rows", [7, 1024])
@pytest.mark.parametrize(
    ("name", "weights"), [("dspark", LossWeights()), ("dflash", DFLASH_WEIGHTS)]
)
def test_losses_gradients_and_metrics_equal_the_reference(golden, name, weights, chunk_rows):
    drafter, data, report = golden
    blocks = golden_blocks(data)
    drafter.zero_grad()
    hidden = golden_hidden(drafter, data, blocks)
    teacher = data["target_last_hidden_states"]
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


def tiny(kind="vanilla", softcap=None):
    """A float64 drafter, its blocks' hidden states and the teacher's states."""
    source = torch.Generator().manual_seed(0)
    backbone = BackboneConfig(WIDTH, 8, 1, 2, 1, 4, 2)
    config = DSparkConfig(backbone, VOCAB, BLOCK, 12, (0, 1), 4, 3, kind)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    parts = Parts(
        draw(VOCAB, WIDTH), draw(VOCAB, WIDTH), VOCAB, WIDTH,
        head_bias_V=draw(VOCAB), logit_softcap=softcap,
    )  # fmt: skip
    drafter = DSparkDrafter.from_target(parts, config, generator=source, init_std=0.5).double()
    ids = torch.randint(VOCAB, (2, 12), generator=source)
    loss_mask = torch.ones(2, 12, dtype=torch.int64)
    loss_mask[0, :6] = 0
    blocks = AnchorBlocks.build(ids, loss_mask, *sample_anchors(loss_mask, 6, source), BLOCK)
    hidden = draw(*blocks.labels_BNK.shape, WIDTH)
    return drafter, blocks, hidden, draw(2, 12, WIDTH)


def obvious_loss(drafter, hidden, teacher, blocks, weights):
    """The losses over every slot, whole tensors, plain autograd."""
    b, n, k = blocks.labels_BNK.shape
    feature = drafter.markov_head.block(blocks.previous_BNK.flatten(0, 1), hidden.flatten(0, 1))
    logits = drafter.base_logits(hidden) + drafter.markov_head.bias(feature).view(b, n, k, VOCAB)
    rows = teacher[torch.arange(b)[:, None, None], blocks.positions_BNK.clamp(max=11)]
    target, law = drafter.target_logits(rows).softmax(-1), logits.softmax(-1)
    w = position_weights(blocks, weights.decay, torch.float64)
    ce = -(logits.log_softmax(-1).gather(-1, blocks.labels_BNK[..., None])[..., 0])
    tv = (law - target).abs().sum(-1)
    label = (1 - 0.5 * tv).clamp(0, 1).detach()
    confidence = drafter.confidence_logits(hidden, blocks.previous_BNK).sigmoid()
    bce = -(label * confidence.log() + (1 - label) * (1 - confidence).log())
    total = weights.ce * ce + weights.tv * tv + weights.confidence * bce
    return (w * total).sum() / (w.sum() + 1e-6)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_chunked_gradients_are_exact(kind, chunk_rows):
    drafter, blocks, hidden, teacher = tiny(kind, softcap=2.0)
    weights = LossWeights(ce=0.3, tv=0.8, confidence=0.5, decay=2.0)
    found = []
    for loss_of in (
        lambda h: block_loss(drafter, h, teacher, blocks, weights, chunk_rows=chunk_rows).loss,
        lambda h: obvious_loss(drafter, h, teacher, blocks, weights),
    ):
        drafter.zero_grad()
        leaf = hidden.clone().requires_grad_()
        loss = loss_of(leaf)
        (3.0 * loss).backward()
        heads = {n: p.grad for n, p in drafter.named_parameters() if "head" in n}
        assert all(grad.abs().sum() > 0 for grad in heads.values())
        found.append({"loss": loss.detach(), "hidden": leaf.grad, **heads})
    assert found[0].keys() == found[1].keys()
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
    parts = []
    for b in range(2):
        row = slice(b, b + 1)
        fields = {name: getattr(blocks, name)[row] for name in blocks.__dataclass_fields__}
        own = AnchorBlocks(**fields)
        parts.append(
            block_loss(drafter, hidden[row], teacher[row], own, weights, total_weight=total).loss
        )
    torch.testing.assert_close(sum(parts), whole.loss)


def test_a_perfect_drafter_has_no_distance_left():
    drafter, blocks, _, teacher = tiny()
    with torch.no_grad():
        drafter.markov_head.markov_w2.weight.zero_()
    rows = teacher[torch.arange(2)[:, None, None], blocks.positions_BNK.clamp(max=11)]
    report = block_loss(drafter, rows, teacher, blocks, LossWeights())
    assert report.tv.item() == pytest.approx(0.0, abs=1e-6)
    assert report.accept_rate_K.tolist() == pytest.approx([1.0] * BLOCK)
    lengths = 1 + blocks.supervised_BNK.sum(-1)[blocks.keep_BN].double().mean()
    assert report.accepted_length.item() == pytest.approx(lengths.item())


def test_a_batch_without_supervision_costs_nothing():
    drafter, blocks, hidden, teacher = tiny()
    nothing = replace(blocks, supervised_BNK=torch.zeros_like(blocks.supervised_BNK))
    leaf = hidden.clone().requires_grad_()
    report = block_loss(drafter, leaf, teacher, nothing, LossWeights())
    report.loss.backward()
    assert report.loss.item() == 0.0
    assert report.supervised == 0
    assert not leaf.grad.any()
    assert torch.isfinite(report.accepted_length)


def test_evaluation_needs_no_graph():
    drafter, blocks, hidden, teacher = tiny()
    with torch.no_grad():
        report = block_loss(drafter, hidden, teacher, blocks, LossWeights())
    graph = block_loss(drafter, hidden, teacher, blocks, LossWeights())
    assert not report.loss.requires_grad
    torch.testing.assert_close(report.loss, graph.loss.detach())
