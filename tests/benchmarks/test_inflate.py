"""Inflation changes shapes and nothing else."""

import argparse
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.inflate import (
    inflate_drafter,
    inflate_eagle3,
    inflate_target,
    largest_deviation,
    layer_places,
)
from benchmarks.placement import Shape
from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.engine.engine import Engine
from dspark.errors import CompatibilityError
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target

VOCAB, WIDTH = 61, 20
SMALL = Shape(3, WIDTH, 4, 2, 8, 28)
LARGE = Shape(7, 64, 16, 4, 32, 96)  # 2 query heads per key head become 4
CONTEXT = 24


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def randomise(module, generator):
    """Weights far from their initial values, so that every one of them matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)


def small_model(generator, *, tied=True):
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=SMALL.hidden_size,
        intermediate_size=SMALL.intermediate_size,
        num_hidden_layers=SMALL.num_layers,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_kv_heads,
        head_dim=SMALL.head_dim,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    randomise(model, generator)
    return model


def small_drafter(generator, head="vanilla", mask_token_id=3):
    backbone = BackboneConfig(WIDTH, 24, 2, 4, 2, 8, num_taps=3, rope_theta=1e4)
    config = DSparkConfig(
        backbone=backbone,
        vocab_size=VOCAB,
        block_size=4,
        mask_token_id=mask_token_id,
        target_layer_ids=(-1, 0, 2),
        num_target_layers=SMALL.num_layers,
        markov_rank=6,
        markov_head_type=head,
    )
    drafter = DSparkDrafter(config)
    randomise(drafter, generator)
    return drafter.eval()


def pairs(model, drafter):
    """The small pair and the inflated one, each bound."""
    large, large_drafter = inflate_target(model, LARGE), inflate_drafter(drafter, LARGE)
    found = [(Target.from_model(model), drafter), (Target.from_model(large), large_drafter)]
    for target, own in found:
        own.bind(target.parts(), num_target_layers=target.num_layers)
    return found


def draft(target, drafter, ids):
    """Logits of every greedy draft after a prompt, and the confidences."""
    batch = RaggedBatch.fresh([ids], target.device)
    output = target.forward(batch, taps=drafter.taps)
    [segment] = batch.segments
    segment.table.append(len(segment.table.pages))  # room for the drafts
    context = PagedCache(drafter.context_shapes, len(segment.table.pages))
    following = batch.input_ids_T.roll(-1)
    drafter.observe(context, batch, output.features_TF, following)
    rows = []

    def draw(_step, logits_RV, _tokens=None):
        rows.append(logits_RV[0])
        return logits_RV.argmax(-1)

    anchor = torch.tensor([17])
    block = DraftBatch((segment.table,), anchor, (len(ids),), ([*ids, 17],), drafter.block_size)
    proposal = drafter.propose(context, block, draw)
    return torch.stack(rows), proposal.confidence_logits_RK


@pytest.mark.parametrize("tied", [True, False])
def test_target_logits_are_unchanged(generator, tied):
    model = small_model(generator, tied=tied)
    small, large = Target.from_model(model), Target.from_model(inflate_target(model, LARGE))
    assert large.hidden_size == 64
    assert large.num_layers == 7
    assert largest_deviation(small, large) < 1e-4


def test_features_stand_in_the_places_of_the_old_layers(generator):
    model = small_model(generator)
    small, large = Target.from_model(model), Target.from_model(inflate_target(model, LARGE))
    batch = RaggedBatch.fresh([[5, 9, 33, 60, 2]], small.device)
    old = small.forward(batch, taps=(0, 1, 2)).features_TF.unflatten(1, (3, -1))
    taps = layer_places(3, 7)
    new = large.forward(batch, taps=taps).features_TF.unflatten(1, (3, -1))
    torch.testing.assert_close(new[..., :WIDTH], old, atol=1e-4, rtol=1e-4)
    assert not new[..., WIDTH:].any()


@pytest.mark.parametrize(
    ("head", "mask"), [("vanilla", 3), ("gated", 3), ("rnn", 3), ("vanilla", None)]
)
def test_draft_logits_and_confidences_are_unchanged(generator, head, mask):
    model, drafter = small_model(generator), small_drafter(generator, head, mask)
    ids = torch.randint(VOCAB, (CONTEXT - 8,), generator=generator).tolist()
    (logits, confidence), (new_logits, new_confidence) = (
        draft(target, own, ids) for target, own in pairs(model, drafter)
    )
    torch.testing.assert_close(new_logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(new_confidence, confidence, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_is_unchanged(generator, temperature):
    found = pairs(small_model(generator), small_drafter(generator))
    requests = [Request((4, 8, 15 + i), SamplingParams(24, temperature, seed=i)) for i in range(6)]
    small, large = (
        Engine(target, own, max_requests=2, max_length=64, verifier="token").run(requests)
        for target, own in found
    )
    assert [o.token_ids for o in large] == [o.token_ids for o in small]
    assert [o.stats.accepted for o in large] == [o.stats.accepted for o in small]
    if temperature:
        assert sum(o.stats.accepted for o in small) > 0


@pytest.mark.parametrize(("taps", "passes"), [((2,), 1), ((-1, 0, 2), 4)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_an_eagle3_drafter_is_unchanged(generator, temperature, taps, passes):
    model = small_model(generator)
    backbone = BackboneConfig(WIDTH, 24, 1, 4, 2, 8, num_taps=len(taps), rope_theta=1e4)
    drafter = Eagle3Drafter(Eagle3Config(backbone, VOCAB, taps, 3, ttt_length=passes))
    randomise(drafter, generator)
    requests = [Request((4, 8, 15 + i), SamplingParams(24, temperature, seed=i)) for i in range(6)]
    outputs = []
    for target, own in (
        (Target.from_model(model), drafter.eval()),
        (Target.from_model(inflate_target(model, LARGE)), inflate_eagle3(drafter, LARGE)),
    ):
        own.bind(target.parts(), num_target_layers=target.num_layers)
        engine = Engine(target, own, max_requests=2, max_length=64, verifier="token")
        outputs.append(engine.run(requests))
    small, large = outputs
    assert [o.token_ids for o in large] == [o.token_ids for o in small]
    assert [o.stats.accepted for o in large] == [o.stats.accepted for o in small]
    if temperature:
        assert sum(o.stats.accepted for o in small) > 0


def test_a_reduced_vocabulary_cannot_be_inflated():
    backbone = BackboneConfig(WIDTH, 24, 1, 4, 2, 8, num_taps=1)
    drafter = Eagle3Drafter(Eagle3Config(backbone, VOCAB, (2,), 3, draft_vocab_size=9))
    with pytest.raises(CompatibilityError, match="reduced vocabulary"):
        inflate_eagle3(drafter, LARGE)


def test_shapes_have_names():
    assert Shape.parse("qwen3_4b").hidden_size == 2560
    assert Shape.parse("3,20,4,2,8,28") == SMALL
    with pytest.raises(argparse.ArgumentTypeError, match=r"one of qwen3_0\.6b, qwen3_4b"):
        Shape.parse("qwen3")


def test_random_numbers_are_multiplied_and_change_nothing(generator):
    model = small_model(generator)
    one, other = (inflate_target(model, LARGE, seed=seed) for seed in (1, 2))
    gates = [m.model.layers[0].mlp.gate_proj.weight for m in (one, other)]
    assert not torch.equal(*gates)
    assert all(gate.abs().min() > 0 for gate in gates)
    assert largest_deviation(Target.from_model(one), Target.from_model(other)) < 1e-4


def test_bf16_keeps_the_rotary_speeds(generator):
    large = inflate_target(small_model(generator), LARGE, dtype=torch.bfloat16)
    assert large.model.norm.weight.dtype == torch.bfloat16
    speeds = large.model.rotary_emb.inv_freq
    assert speeds.dtype == torch.float32
    torch.testing.assert_close(speeds[::4], 1e4 ** (-torch.arange(4) / 4))


def test_layers_are_spread_to_the_end():
    assert layer_places(12, 28) == (1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27)
    assert layer_places(3, 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 16}, "hidden_size is 20"),
        ({"num_layers": 2}, "num_layers is 3"),
        ({"head_dim": 12}, "head_dim must be a multiple"),
        ({"num_kv_heads": 16}, "as many query heads"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(generator, change, named):
    with pytest.raises(CompatibilityError, match=named):
        inflate_target(small_model(generator), replace(LARGE, **change))
