"""Gemma4's layers in the shared forward, against transformers' own modules.

The reference runs `Gemma4TextDecoderLayer` as it is, with a cache that lays the context's keys and
values before the block's; only how the context is made (docs/method.md, 2.1) is written out here.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextDecoderLayer,
    Gemma4TextRotaryEmbedding,
    Gemma4TextScaledWordEmbedding,
    apply_rotary_pos_emb,
)

from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.drafters.config import GEMMA4_PARTS, BackboneConfig
from dspark.drafters.layers import rotary
from dspark.errors import CheckpointError, CompatibilityError
from tests.helpers.checkpoints import save_published, save_speculators

WIDTH, HEAD, LAYERS, BLOCK, MASK, FULL = 16, 8, 2, 5, 36, "full_attention"


@pytest.fixture(params=["k_eq_v", "own values"])
def shared(request):
    return request.param == "k_eq_v"


@pytest.fixture
def gemma4_parts(make_parts):
    """A target's parts as Gemma4 has them: scaled embeddings, capped logits."""
    return make_parts(embedding_scale=WIDTH**0.5, logit_softcap=1.5)


@pytest.fixture
def make_gemma4(make_drafter, gemma4_parts):
    def make(shared, **changes):
        backbone = BackboneConfig(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_layers=LAYERS,
            num_heads=4,
            num_kv_heads=1 if shared else 2,
            head_dim=HEAD,
            num_taps=3,
            value_from_key=shared,
            rotary_fraction=0.25,
            **GEMMA4_PARTS,
        )
        drafter = make_drafter(gemma4_parts, backbone=backbone, **changes)
        source = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, tensor in drafter.state_dict().items():
                if "norm" in name or "scalar" in name:
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=source))
        return drafter

    return make


class Behind:
    """A cache of transformers that lays given rows before those of the pass."""

    def __init__(self, rows):
        self.rows = rows

    def update(self, key, value, layer):
        before = self.rows[layer]
        return torch.cat((before[0], key), 2), torch.cat((before[1], value), 2)


def reference(drafter, features, anchor, length):
    """Hidden states [block, H] of one block, by transformers' modules."""
    backbone = drafter.config.backbone
    config = Gemma4TextConfig(
        vocab_size=37,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        global_head_dim=HEAD,
        num_global_key_value_heads=1 if backbone.value_from_key else None,
        attention_k_eq_v=backbone.value_from_key,
        hidden_size_per_layer_input=0,
        layer_types=[FULL] * LAYERS,
        attn_implementation="eager",
    )
    state = drafter.state_dict()
    norm = Gemma4RMSNorm(WIDTH, eps=1e-6)
    norm.weight.data = state["hidden_norm.weight"]
    context = norm(features @ state["fc.weight"].T)[None]
    turn = Gemma4TextRotaryEmbedding(config)
    positions = torch.arange(length + drafter.config.block_size)[None]
    cosine, sine = turn(context, positions, FULL)
    layers, rows = [], []
    for i in range(LAYERS):
        layer = Gemma4TextDecoderLayer(config, i).eval()
        prefix = f"layers.{i}."
        own = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
        missing, extra = layer.load_state_dict(own, strict=True)
        assert not missing
        assert not extra
        a = layer.self_attn
        heads = (1, length, -1, HEAD)
        key = a.k_proj(context).view(heads)
        value = key if a.v_proj is None else a.v_proj(context).view(heads)
        key = apply_rotary_pos_emb(
            a.k_norm(key), cosine[:, :length], sine[:, :length], unsqueeze_dim=2
        )
        rows.append((key.transpose(1, 2), a.v_norm(value).transpose(1, 2)))
        layers.append(layer)
    embed = Gemma4TextScaledWordEmbedding(37, WIDTH, 0, embed_scale=WIDTH**0.5)
    embed.weight.data = drafter.borrowed.embedding_VH
    x = embed(torch.tensor([[anchor, *[MASK] * (drafter.config.block_size - 1)]]))
    for layer in layers:
        x = layer(
            x,
            position_embeddings=(cosine[:, length:], sine[:, length:]),
            attention_mask=torch.zeros(1, 1, x.shape[1], length + x.shape[1]),
            past_key_values=Behind(rows),
        )
    norm.weight.data = state["norm.weight"]
    return norm(x)[0]


def features(length=9):
    return torch.randn(length, 3 * WIDTH, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_decoding_equals_transformers_layers(make_gemma4, draft, shared):
    drafter = make_gemma4(shared)
    draw, proposal = draft(drafter, [features()], [4], chunks=3)
    hidden = reference(drafter, features(), 4, 9)
    head = drafter.borrowed.head_VH
    previous = torch.tensor([4, *(int(t) for t in draw.tokens[:-1])])
    state = drafter.state_dict()
    w1, w2 = state["markov_head.markov_w1.weight"], state["markov_head.markov_w2.weight"]
    capped = 1.5 * torch.tanh(hidden @ head.T / 1.5)
    expected = capped + w1[previous] @ w2.T  # the bias comes after the cap, and is not capped
    torch.testing.assert_close(torch.stack(draw.logits, 1)[0], expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 1.5
    torch.testing.assert_close(
        proposal.confidence_logits_RK[0], drafter.confidence_logits(hidden, previous)
    )


@torch.no_grad()
@pytest.mark.parametrize("from_anchor", [True, False])
def test_training_equals_transformers_layers(make_gemma4, run_training, shared, from_anchor):
    drafter = make_gemma4(shared, sample_from_anchor=from_anchor)
    ids = torch.randint(36, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    hidden, blocks = run_training(drafter, features(20), ids, anchors=5)
    for n, anchor in enumerate(blocks.anchors_M.tolist()):
        alone = reference(drafter, features(20)[:anchor], ids[anchor], anchor)
        wanted = alone if from_anchor else alone[1:]
        torch.testing.assert_close(hidden[n], wanted, atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter(make_gemma4, one_block, shared):
    drafter = make_gemma4(shared, markov_rank=0, confidence_head=False).train()
    positions = torch.arange(9, 9 + BLOCK)[None]
    context, token = torch.arange(len(features())), torch.tensor([4])
    hidden = drafter(features(), context, token, positions, one_block(9, BLOCK))
    drafter.base_logits(hidden).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in drafter.parameters())
    assert not any("layer_scalar" in name for name, _ in drafter.named_parameters())


def test_the_state_dict_is_the_published_one(make_gemma4, shared):
    keys = make_gemma4(shared).state_dict().keys()
    own = {name.removeprefix("layers.0.") for name in keys if name.startswith("layers.0.")}
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    expected = {f"{n}_layernorm.weight" for n in norms} | {"layer_scalar"}
    expected |= {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    expected |= {
        f"self_attn.{n}.weight" for n in ("q_proj", "k_proj", "o_proj", "q_norm", "k_norm")
    }
    if not shared:
        expected.add("self_attn.v_proj.weight")
    assert own == expected
    assert len(own) == (13 if shared else 14)


def published(directory, **changes):
    """Rewrite config.json as the published stack writes it: the target's text config, changed."""
    path = directory / "config.json"
    data = json.loads(path.read_text()) | {
        "model_type": "gemma4_unified_text",
        "target_model_type": "gemma4_unified",
        "head_dim": 4,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "final_logit_softcapping": 1.5,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }
    data |= changes
    path.write_text(json.dumps({name: x for name, x in data.items() if x is not ...}))
    return data


def test_published_files_are_read_and_written_back(make_gemma4, gemma4_parts, draft, tmp_path):
    drafter = make_gemma4(True)
    save_published(drafter, tmp_path, dtype=None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Gemma4DSparkModel"]
    assert config["model_type"] == "gemma4_text"
    data = published(tmp_path)
    loaded = load_drafter(tmp_path)
    loaded.bind(gemma4_parts)
    assert loaded.config.backbone == drafter.config.backbone
    one, two = draft(drafter, [features()], [4])[0], draft(loaded, [features()], [4])[0]
    assert torch.equal(torch.stack(one.logits), torch.stack(two.logits))
    save_published(loaded, tmp_path / "again", dtype=None)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == data
    save_attached(loaded, tmp_path / "again", dtype=None)
    assert load_drafter(tmp_path / "again").config.backbone == drafter.config.backbone


def test_layers_with_values_of_their_own_travel_too(make_gemma4, tmp_path):
    drafter = make_gemma4(False)
    save_published(drafter, tmp_path, dtype=None)
    assert load_drafter(tmp_path).config.backbone == drafter.config.backbone


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"global_head_dim": ...}, CheckpointError, "lacks global_head_dim"),
        ({"enable_moe_block": True}, CompatibilityError, "enable_moe_block True"),
        ({"hidden_size_per_layer_input": 6}, CompatibilityError, "hidden_size_per_layer_input 6"),
        ({"hidden_activation": "silu"}, CompatibilityError, "hidden_activation 'silu'"),
        ({"layer_types": ["sliding_attention"] * 2}, CompatibilityError, "sliding_attention"),
        ({"rope_parameters": {}}, CheckpointError, "rope_parameters None for full_attention"),
        ({"attention_k_eq_v": False}, CheckpointError, "v_proj"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}},
         CompatibilityError, "partial_rotary_factor 0.5 with rope_type default"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e6, "rope_type": "proportional",
          "factor": 8.0}}}, CompatibilityError, "factor 8"),
    ],
)  # fmt: skip
def test_bad_configs_are_named(make_gemma4, tmp_path, changes, error, words):
    save_published(make_gemma4(True), tmp_path)
    published(tmp_path, **changes)
    with pytest.raises(error, match=words):
        load_drafter(tmp_path)


def test_speculators_cannot_carry_them(make_gemma4, tmp_path):
    with pytest.raises(CompatibilityError, match="Gemma4's layers"):
        save_speculators(make_gemma4(True), tmp_path)


def test_a_qwen3_drafter_may_serve_such_a_target(make_drafter, gemma4_parts, draft):
    drafter = make_drafter(gemma4_parts)
    draw, _ = draft(drafter, [features()], [4])
    assert len(draw.logits) == BLOCK


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_only_the_first_pairs_turn(tiny_config, fraction):
    config = replace(tiny_config.backbone, head_dim=8, rotary_fraction=fraction)
    cosine, sine = rotary(torch.tensor([3]), config, torch.float32).unbind(-3)
    turning = int(4 * fraction)
    assert (sine[0, 0, :4] != 0).tolist() == [True] * turning + [False] * (4 - turning)
    assert cosine[0, 0, turning:4].eq(1).all()
