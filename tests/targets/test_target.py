import math

import pytest
import torch

from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import UsageError
from dspark.targets.target import Target


@pytest.fixture
def target(tiny_model, shared):
    if "plain" not in shared:
        shared["plain"] = Target.from_model(tiny_model("qwen3"), name="tiny")
    return shared["plain"]


def test_properties(target):
    assert (target.name, target.hidden_size, target.num_layers) == ("tiny", 24, 4)
    assert (target.vocab_size, target.max_context) == (61, 64)
    assert (target.dtype, target.device) == (torch.float32, torch.device("cpu"))
    assert target.eos_token_ids == {1}
    assert target.tokenizer is None


def test_end_tokens_of_configuration_and_generation_settings(tiny_model):
    model = tiny_model("llama")
    model.config.eos_token_id = [3, 4]
    model.generation_config.eos_token_id = 9
    assert Target.from_model(model).eos_token_ids == {3, 4, 9}


def test_only_asked_for_logits_and_features_are_computed(target):
    batch = RaggedBatch.fresh([[1, 2, 3]])
    out = target.forward(batch)
    assert out.logits_NV is None
    assert out.features_TF is None
    rows = target.forward(batch, logit_rows=torch.tensor([2, 0])).logits_NV
    every = target.forward(batch, logit_rows="all").logits_NV
    assert torch.allclose(rows, every[[2, 0]], atol=1e-6)
    assert torch.allclose(target.logits(out.hidden_TH), every, atol=1e-6)


def test_features_come_in_the_order_asked_for_and_leave_no_hook(target):
    batch = RaggedBatch.fresh([[1, 2, 3]])
    one = target.forward(batch, taps=(2, -1, 0)).features_TF
    other = target.forward(batch, taps=(-1, 0, 2)).features_TF
    assert one.shape == (3, 72)
    assert torch.equal(one, other[:, [*range(48, 72), *range(48)]])
    assert not torch.equal(one, other)
    assert not target._anatomy.layers[0]._forward_hooks
    assert not target._anatomy.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("tap", [-2, 4])
def test_taps_must_name_layers(target, tap):
    with pytest.raises(UsageError, match=f"layer {tap}"):
        target.forward(RaggedBatch.fresh([[1]]), taps=(0, tap))
    assert not target._anatomy.layers[0]._forward_hooks


def test_features_may_enter_a_computation_with_gradients(target):
    features = target.forward(RaggedBatch.fresh([[1, 2]]), taps=(0,)).features_TF
    assert not features.requires_grad
    weight = torch.ones(24, requires_grad=True)
    (features * weight).sum().backward()
    assert torch.allclose(weight.grad, features.sum(0))


def test_runs_in_inference_mode(target):
    with torch.inference_mode():
        cache = target.new_cache(1)
        out = target.forward(RaggedBatch.fresh([[1, 2]]), cache, taps=(1,))
    assert out.features_TF.is_inference()


def test_the_model_is_frozen(target):
    assert not any(p.requires_grad for p in target._anatomy.decoder.parameters())
    assert not target._anatomy.decoder.training


def test_parts_are_borrowed_not_copied(target):
    parts = target.parts()
    anatomy = target._anatomy
    assert parts.embedding_VH.data_ptr() == anatomy.embedding.weight.data_ptr()
    assert parts.head_VH.data_ptr() == anatomy.head.weight.data_ptr()
    assert torch.equal(parts.final_norm_H, anatomy.norm.weight)
    assert (parts.vocab_size, parts.hidden_size) == (61, 24)
    assert (parts.embedding_scale, parts.logit_softcap, parts.head_bias_V) == (1.0, None, None)


@pytest.mark.parametrize("name", ["gemma2", "gemma4"])
def test_parts_reproduce_embedding_and_logits(tiny_model, name):
    target = Target.from_model(tiny_model(name))
    parts = target.parts()
    batch = RaggedBatch.fresh([[5, 6, 7]])
    out = target.forward(batch, taps=(-1, 3), logit_rows="all")
    embedded, last = out.features_TF.split(24, -1)
    own = parts.embedding_VH[[5, 6, 7]] * parts.embedding_scale
    assert parts.embedding_scale == pytest.approx(math.sqrt(24))
    assert torch.allclose(embedded, own, atol=1e-6)
    variance = last.pow(2).mean(-1, keepdim=True) + target._anatomy.config.rms_norm_eps
    normed = last * variance.rsqrt() * parts.final_norm_H
    assert torch.allclose(normed, out.hidden_TH, atol=1e-5)
    raw = normed @ parts.head_VH.T
    assert parts.logit_softcap == 4.0
    assert torch.allclose(4.0 * torch.tanh(raw / 4.0), out.logits_NV, atol=1e-5)


def test_attention_is_one_switch(tiny_model):
    ids, found = [5, 9, 2, 30, 7, 7], {}
    for name in ("auto", "plain", "flex"):
        target = Target.from_model(tiny_model("qwen3"), attention=name)
        batch = RaggedBatch.fresh([ids, ids[:2]])
        with torch.inference_mode():
            out = target.forward(batch, target.new_cache(2), logit_rows="all")
        found[name] = target.attention_backend, out.logits_NV
    assert [name for name, _ in found.values()] == ["plain", "plain", "flex"]
    assert torch.equal(found["auto"][1], found["plain"][1])
    torch.testing.assert_close(found["flex"][1], found["plain"][1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="'varlen' cannot run on cpu"):
        Target.from_model(tiny_model("qwen3"), attention="varlen")
