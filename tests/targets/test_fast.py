"""Packed weights and the flat decoder compute what the plain path computes."""

import copy

import pytest
import torch
from torch import nn

from dspark.attention.paged_cache import BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import UsageError
from dspark.targets.fast import products
from dspark.targets.fast.packing import Packer, choose_packer
from dspark.targets.target import Target

FLAT = ["qwen3", "qwen3 windows", "llama", "mistral", "gemma3"]
MODULES = ["gemma2", "gemma4", "gpt_oss", "qwen3_moe"]
ROWS = (1, 2, 7, 8, 32)
fp16 = pytest.mark.skipif(not products.fp16_works(), reason="no FBGEMM for 16-bit weights")
onednn = pytest.mark.skipif(
    not products.onednn_works(torch.float32), reason="no packed products of oneDNN"
)
int8 = pytest.mark.skipif(not products.int8_works(), reason="no FBGEMM for 8-bit integers")


def short(model):
    """The same model, its weights those of a bfloat16 checkpoint."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model


@torch.inference_mode()
def decode(target, steps=((5, 3), (1, 1), (4, 2), (1, 9))):
    """Logits and features of two requests, fed in pieces side by side."""
    cache = target.new_cache(4)
    tables, starts, found = (BlockTable((3, 1)), BlockTable((2, 0))), [0, 0], []
    for step, counts in enumerate(steps):
        parts = []
        for i, count in enumerate(counts):
            ids = [(7 * step + 3 * i + j) % target.vocab_size for j in range(count)]
            parts.append((tables[i], starts[i], ids))
            starts[i] += count
        out = target.forward(RaggedBatch.build(parts), cache, taps=(2, -1), logit_rows="all")
        found.append(torch.cat((out.logits_NV, out.features_TF), -1))
    return torch.cat(found)


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", [*FLAT, *MODULES])
def test_packed_targets_equal_plain_ones(tiny_model, family):
    model = short(tiny_model(family))
    expected = decode(Target.from_model(copy.deepcopy(model)))
    target = Target.from_model(model, weights="packed")
    assert target.weights.endswith("flat") == (family in FLAT)
    assert relative(decode(target), expected) < 2e-6


@pytest.mark.parametrize("family", FLAT)
def test_the_flat_decoder_in_bfloat16(tiny_model, family):
    expected = decode(Target.from_model(tiny_model(family).bfloat16()))
    target = Target.from_model(tiny_model(family).bfloat16(), weights="packed")
    assert relative(decode(target), expected) < 0.04


def test_without_a_cache_as_in_training(tiny_model):
    ids = [[3, 4, 5, 6], [7, 8]]
    plain, packed = (
        Target.from_model(short(tiny_model("qwen3")), weights=weights).forward(
            RaggedBatch.fresh(ids), taps=(0, 3)
        )
        for weights in ("plain", "packed")
    )
    assert relative(packed.features_TF, plain.features_TF) < 2e-6


def test_packing_releases_the_layers_weights_and_keeps_the_tables(tiny_model):
    model = short(tiny_model("qwen3"))
    embedding = model.get_input_embeddings().weight
    target = Target.from_model(model, weights="packed")
    linear = [m for m in model.model.layers.modules() if type(m) is nn.Linear]
    assert sum(m.weight.numel() for m in linear) == 0
    parts = target.parts()
    assert parts.embedding_VH is embedding
    assert parts.head_VH is embedding
    hidden = torch.randn(3, target.hidden_size)
    assert relative(parts.head(hidden), hidden @ embedding.T) < 2e-6


def test_a_flat_step_that_differs_keeps_the_modules(tiny_model):
    model = short(tiny_model("llama"))
    for layer in model.model.layers:  # as in a family whose residual stream is scaled
        layer.mlp.register_forward_hook(lambda _module, _args, out: 0.5 * out)
    target = Target.from_model(model, weights="packed")
    assert "flat" not in target.weights


@fp16
def test_fp16_keeps_the_values_of_short_floats():
    weight = torch.randn(48, 32).bfloat16().float() * 2.0 ** torch.arange(-20, -4)[:, None].repeat(
        3, 1
    )
    assert products.loses_to_fp16(weight) <= products.FP16_BOUND
    eye = torch.eye(32)
    for threads in (False, True):
        back = products.fp16_product(weight, None, threads)(eye).T
        exact = weight.abs() >= 2.0**-17
        assert torch.equal(back[exact], weight[exact])
        assert float((back - weight).abs().max()) <= products.FP16_BOUND


@fp16
def test_weights_that_fp16_would_change_take_another_kind():
    weight = torch.randn(48, 32)
    assert products.loses_to_fp16(weight) > products.FP16_BOUND
    assert products.loses_to_fp16(torch.full((2, 2), 1e6)) == float("inf")
    rows = torch.randn(5, 32)
    expected = rows.double() @ weight.double().T
    assert relative(Packer("fp16").pack([weight])(rows), expected) < 1e-6
    assert relative(Packer("fp16").pack([weight], exact=False)(rows), expected) > 1e-5


def by_rows(product, inputs):
    """The numbers of rows whose results differ from those in a batch of 64."""
    rows = torch.randn(64, inputs, generator=torch.Generator().manual_seed(1))
    whole = product(rows)
    return {
        count
        for count in ROWS
        for start in (0, 5, 31)
        if not torch.equal(
            product(rows[start : start + count].clone()), whole[start : start + count]
        )
    }


@torch.inference_mode()
@int8
def test_a_row_in_int8_does_not_depend_on_its_company():
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    product = products.int8_product(weight, torch.randn(96))
    assert by_rows(product, 160) == set()
    rows = torch.randn(3, 160)
    beside = torch.cat((rows, 1000 * torch.randn(2, 160)))
    assert torch.equal(product(beside)[:3], product(rows))


@torch.inference_mode()
@int8
def test_control_one_scale_for_all_rows_mixes_requests():
    """Why the int8 kind scales rows itself."""
    held = torch.ops.quantized.linear_prepack(
        torch.quantize_per_tensor(torch.randn(32, 32), 0.02, 0, torch.qint8), None
    )
    shared = torch.ops.quantized.linear_dynamic
    rows = torch.randn(3, 32)
    beside = torch.cat((rows, 1000 * torch.randn(2, 32)))
    assert not torch.equal(shared(beside, held)[:3], shared(rows, held))


@torch.inference_mode()
@int8
def test_int8_is_near_the_weights():
    weight, bias = torch.randn(96, 160), torch.randn(96)
    rows = torch.randn(7, 160) * torch.logspace(-3, 3, 7)[:, None]
    rows[3] = 0
    expected = rows @ weight.T + bias
    got = products.int8_product(weight, bias)(rows)
    assert float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 0.03
    assert torch.equal(got[3], bias)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_several_weights(bias):
    weights = [torch.randn(n, 24).bfloat16().float() for n in (16, 8, 40)]
    biases = [torch.randn(16), None, torch.randn(40)] if bias else None
    rows = torch.randn(2, 3, 24)
    expected = torch.cat(
        [
            nn.functional.linear(rows, w, b)
            for w, b in zip(weights, biases or [None] * 3, strict=True)
        ],
        -1,
    )
    for kind in ("plain", "onednn", "fp16"):
        assert relative(Packer(kind).pack(weights, biases)(rows), expected) < 1e-6


def test_what_cannot_be_is_refused(tiny_model):
    like = torch.randn(8, 8)
    with pytest.raises(UsageError, match="weights is 'fast', but must be one of auto"):
        choose_packer("fast", None, like)
    with pytest.raises(UsageError, match="quantize is 'int3', but must be int8"):
        choose_packer("auto", "int3", like)
    with pytest.raises(UsageError, match="leave weights at auto"):
        choose_packer("plain", "int8", like)
    with pytest.raises(UsageError, match="on a CPU only"):
        choose_packer("packed", None, like.to("meta"))
    with pytest.raises(UsageError, match="Packed weights and batch_invariant exclude"):
        Target.from_model(tiny_model("qwen3"), weights="packed", batch_invariant=True)
    with pytest.raises(UsageError, match="Packed weights and compile exclude"):
        Target.from_model(tiny_model("qwen3"), quantize="int8", compile=True)


def test_where_packing_is_slower_auto_leaves_weights_plain(monkeypatch):
    from dspark.targets.fast import packing

    monkeypatch.setattr(packing, "_seconds", lambda product, weight: 1.0)
    like = torch.randn(8, 8).bfloat16().float()
    assert choose_packer("auto", None, like).kind != "plain"
    slow = iter([2.0, 2.0, 1.0])
    monkeypatch.setattr(packing, "_seconds", lambda product, weight: next(slow))
    monkeypatch.setattr(packing, "_candidates", lambda like: ["fp16", "onednn"])
    assert choose_packer("auto", None, like).kind == "plain"
    assert choose_packer("plain", None, like).kind == "plain"
