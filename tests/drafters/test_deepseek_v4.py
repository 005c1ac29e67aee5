"""DeepSeek-V4's draft module, against a slow one in float64 and against transformers' layers.

The slow one (`helpers.deepseek_v4`) reads the file's tensors under the file's names. transformers'
layers run as they are, with their own attention and a cache that lays the context's rows before the
block's.
"""

from dataclasses import replace

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import (
    DeepseekV4Config as TheirConfig,
)

from dspark.drafters.checkpoints.checkpoint import save
from dspark.drafters.checkpoints.files import read_weights
from dspark.errors import CompatibilityError
from dspark.training.losses.blocks import LossWeights, block_loss
from tests.helpers.deepseek_v4 import SlowModule, tiny_config, tiny_drafter, tiny_layers

WIDTH, VOCAB, ANCHOR = 32, 37, 4
NEAR = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def parts(make_parts):
    return make_parts(VOCAB, WIDTH)


@pytest.fixture(params=["V4", "V4.1"])
def drafter(request, parts):
    layers = tiny_layers(WIDTH, carried_mix=request.param == "V4.1")
    return tiny_drafter(parts, tiny_config(VOCAB, layers))


@pytest.fixture
def slow(drafter, tmp_path):
    save(drafter, tmp_path, "deepseek_v4", dtype=None)
    borrowed = drafter.borrowed
    return SlowModule(
        read_weights(tmp_path), drafter.config, borrowed.embedding_VH, borrowed.head_VH
    )


def features(length, seed=5):
    return torch.randn(length, 2 * WIDTH, generator=torch.Generator().manual_seed(seed))


def test_decoding_equals_the_slow_module(drafter, slow, draft):
    """One request within its window, one beyond it, in one round; contexts come in pieces."""
    lengths = (4, 11)
    draw, proposal = draft(drafter, [features(n, n) for n in lengths], [ANCHOR, 9], chunks=3)
    for r, (length, anchor) in enumerate(zip(lengths, (ANCHOR, 9), strict=True)):
        hidden_KH, logits_KV = slow(features(length, length), anchor)
        previous = [anchor, *(int(tokens[r]) for tokens in draw.tokens[:-1])]
        for k, token in enumerate(previous):
            embedded, bias = slow.markov(token)
            logits = draw.logits[k][r].double()
            torch.testing.assert_close(logits, logits_KV[k] + bias, **NEAR)
            confidence = proposal.confidence_logits_RK[r, k].double()
            torch.testing.assert_close(confidence, slow.confidence(hidden_KH[k], embedded), **NEAR)


def test_a_target_in_bfloat16_has_drafts_near_those(drafter, slow, draft, parts):
    """The hyper-connections stay in float32, all else runs in the target's dtype."""
    names = ("embedding_VH", "head_VH")
    drafter.bind(replace(parts, **{name: getattr(parts, name).bfloat16() for name in names}))
    draw, _ = draft(drafter, [features(11).bfloat16()], [ANCHOR])
    _, logits_KV = slow(features(11), ANCHOR)
    first = logits_KV[0] + slow.markov(ANCHOR)[1]
    gap = (draw.logits[0][0].double() - first).abs().max() / first.abs().max()
    assert 1e-5 < gap < 0.05


@torch.no_grad()
def test_training_equals_the_slow_module(drafter, slow, run_training):
    """Blocks of two samples, one of them at the start of its own."""
    ids = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    rows_TF = features(24)
    hidden, blocks = run_training(drafter, rows_TF, ids, lengths=(15, 9), anchors=4)
    states = drafter.head_states(hidden)
    anchors = zip(blocks.first_M.tolist(), blocks.anchors_M.tolist(), strict=True)
    for m, (first, anchor) in enumerate(anchors):
        hidden_KH, logits_KV = slow(rows_TF[first:anchor], ids[anchor])
        torch.testing.assert_close(hidden[m].double(), hidden_KH, **NEAR)
        torch.testing.assert_close(drafter.base_logits(states[m]).double(), logits_KV, **NEAR)


class Behind:
    """A cache of transformers that lays given rows before those of the pass."""

    def __init__(self, rows):
        self.rows = rows

    def update(self, key, value, layer):
        both = torch.cat((self.rows[layer], key), 2)
        return both, both


def by_transformers(drafter, context_TF, anchor):
    """States [K, H] before the final norm, by transformers' modules alone."""
    layers, length = drafter.config.backbone, len(context_TF)
    config = TheirConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, moe_intermediate_size=layers.intermediate_size,
        num_hidden_layers=3, num_attention_heads=4, head_dim=16, q_lora_rank=32, o_lora_rank=16,
        o_groups=2, qk_rope_head_dim=8, n_routed_experts=6, num_experts_per_tok=2,
        swiglu_limit=layers.swiglu_limit, sliding_window=6, num_hash_layers=0,
        layer_types=["sliding_attention"] * 3, attn_implementation="eager",
        experts_implementation="eager",
    )  # fmt: skip
    state = drafter.state_dict()

    def filled(module, prefix):
        own = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
        module.load_state_dict(own, strict=True)
        return module.eval()

    norm = filled(v4.DeepseekV4RMSNorm(WIDTH), "hidden_norm.")
    main = norm(context_TF @ state["fc.weight"].T)[None, -6:]
    turn = v4.DeepseekV4RotaryEmbedding(config)
    positions = torch.arange(length + 5)[None]
    cosine, sine = turn(main, positions, layer_type="main")
    before, block = slice(max(0, length - 6), length), slice(length, None)
    modules = [filled(v4.DeepseekV4DecoderLayer(config, i), f"layers.{i}.") for i in range(3)]
    rows = []
    for layer in modules:
        row = layer.self_attn.kv_norm(layer.self_attn.kv_proj(main)).unsqueeze(1)
        rows.append(v4.apply_rotary_pos_emb(row, cosine[:, before], sine[:, before]))
    tokens = torch.tensor([anchor] + [drafter.config.mask_token_id] * 4)
    streams = drafter.borrowed.embedding_VH[tokens][None, :, None].expand(1, 5, 4, WIDTH)
    for layer in modules:
        streams = layer(
            streams.contiguous(),
            position_embeddings={"main": (cosine[:, block], sine[:, block])},
            position_ids=positions[:, block],
            attention_mask=torch.zeros(1, 1, 5, main.shape[1] + 5),
            past_key_values=Behind(rows),
        )
    return filled(v4.DeepseekV4HyperHead(config), "hc_head.")(streams)[0]


@torch.no_grad()
def test_training_equals_transformers_layers(parts, one_block):
    drafter = tiny_drafter(parts, tiny_config(VOCAB, tiny_layers(WIDTH)))
    for length in (1, 6, 13):
        hidden = drafter(
            features(length), torch.arange(length), torch.tensor([ANCHOR]),
            length + torch.arange(5)[None], one_block(length, 5),
        )  # fmt: skip
        expected = by_transformers(drafter, features(length), ANCHOR)
        torch.testing.assert_close(hidden[0], expected, **NEAR)


@torch.no_grad()
def test_control_a_window_that_moves_with_the_slots_is_another_module(drafter, slow, one_block):
    """The reference's ring holds the same context for all slots; llama.cpp's moves on."""
    anchored, _ = slow(features(11), ANCHOR)
    slow.layers.__dict__["sliding_window"] = 5
    moved, _ = slow(features(11), ANCHOR)
    slow.layers.__dict__["sliding_window"] = 6
    assert (anchored - moved).abs().max() > 1e-3


@torch.no_grad()
def test_control_a_confidence_after_the_norm_is_another(drafter, slow):
    hidden_KH, _ = slow(features(11), ANCHOR)
    embedded, _ = slow.markov(ANCHOR)
    normed = drafter.head_states(hidden_KH[0].float()).double()
    gap = slow.confidence(hidden_KH[0], embedded) - slow.confidence(normed, embedded)
    assert abs(float(gap)) > 1e-2


def test_gradients_reach_every_parameter(drafter, run_training):
    ids = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    drafter.train()
    hidden, blocks = run_training(drafter, features(24), ids, anchors=8)
    teacher = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1))
    report = block_loss(drafter, hidden, teacher, blocks, LossWeights())
    report.loss.backward()
    without = [n for n, p in drafter.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert report.supervised > 0


def test_a_step_without_blocks_has_gradients_too(drafter, one_block):
    drafter.train()
    none = torch.zeros(0, dtype=torch.long)
    hidden = drafter(
        features(3), torch.arange(3), none, none.view(0, 5), type(one_block(1, 5))(none, none, 5)
    )
    assert hidden.shape == (0, 5, WIDTH)
    hidden.sum().backward()
    backbone = {n for n, _ in drafter.named_parameters() if not n.startswith(("mark", "conf"))}
    assert all(drafter.get_parameter(name).grad is not None for name in backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 2}, "1 key head"),
        ({"sliding_layers": (0, 1)}, "window in every layer"),
        ({"experts_per_token": 7}, "experts_per_token is 7"),
        ({"o_groups": 3}, "o_groups is 3"),
        ({"rope_head_dim": 7}, "rope_head_dim is 7"),
    ],
)
def test_layers_that_cannot_be_are_refused(change, message):
    with pytest.raises(CompatibilityError, match=message):
        tiny_layers(WIDTH, **change)


def test_another_layout_is_refused_by_name(drafter, tmp_path):
    with pytest.raises(CompatibilityError, match="DeepSeek-V4's"):
        save(drafter, tmp_path / "there", "speculators")
    assert not (tmp_path / "there").exists()
