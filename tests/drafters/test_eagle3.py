import logging
from dataclasses import replace

import pytest
import torch

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.errors import CompatibilityError

LENGTHS = (3, 11, 6)


def inputs(*lengths, width=48):
    """Features and tokens of requests; the last token of each is its anchor."""
    generator = torch.Generator().manual_seed(9)
    features = [torch.randn(length, width, generator=generator) for length in lengths]
    tokens = [torch.randint(0, 37, (n + 1,), generator=generator).tolist() for n in lengths]
    return features, [ids[:-1] for ids in tokens], [ids[-1] for ids in tokens]


def rms(x, weight=1.0, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x, position, fraction=1.0, theta=1e6):
    """Rotary embedding of heads [heads, D], pair by pair; only the first pairs turn."""
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(int(half * fraction)):
        angle = torch.tensor(position * theta ** (-2 * i / x.shape[-1]))
        a, b = x[:, i], x[:, i + half]
        out[:, i] = a * angle.cos() - b * angle.sin()
        out[:, i + half] = b * angle.cos() + a * angle.sin()
    return out


def sigmoid_gate(x):
    return x * x.sigmoid()


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def chain_by_hand(drafter, features, tokens, anchor, drafts, kind="qwen3"):
    """Logits of each draft: one row at a time, heads one by one (docs/method.md, 2.4)."""
    gemma4 = kind.startswith("gemma4")
    state = drafter.state_dict()
    layer = {n.removeprefix("layers.0."): p for n, p in state.items() if n.startswith("layers.0.")}
    backbone, borrowed = drafter.config.backbone, drafter.borrowed
    scale, fraction = (1.0, 0.5) if gemma4 else (backbone.head_dim**-0.5, 1.0)
    keys, values = [], []

    def linear(x, name):
        return layer[f"{name}.weight"] @ x + layer.get(f"{name}.bias", 0)

    def head_norm(x, name):
        return x if kind.startswith("llama") else rms(x, layer[f"self_attn.{name}_norm.weight"])

    def row(token, hidden, position):
        embedded = borrowed.embedding_VH[token] * (4.0 if gemma4 else 1.0)
        own = "token_norm" if kind == "mtp" else "input_layernorm"
        x = torch.cat((
            rms(embedded, layer[f"{own}.weight"]),
            rms(hidden, layer["hidden_norm.weight"]),
        ))  # fmt: skip
        if kind == "mtp":
            hidden = linear(x, "input_proj")
            x = rms(hidden, layer["input_layernorm.weight"])
        names = "qkk" if kind == "gemma4 k_eq_v" else "qkv"
        query, key, value = (
            linear(x, f"self_attn.{n}_proj").view(-1, backbone.head_dim) for n in names
        )
        keys.append(turned(head_norm(key, "k"), position, fraction))
        values.append(rms(value) if gemma4 else value)
        query = turned(head_norm(query, "q"), position, fraction)
        mixed = []
        for head in range(backbone.num_heads):
            group = head * backbone.num_kv_heads // backbone.num_heads
            scores = torch.stack([key[group] @ query[head] for key in keys])
            weights = (scores * scale).softmax(0)
            mixed.append(sum(w * v[group] for w, v in zip(weights, values, strict=True)))
        if kind.endswith("normed"):
            hidden = rms(hidden, layer["hidden_norm.weight"])
        attended = linear(torch.cat(mixed), "self_attn.o_proj")
        if gemma4:
            hidden = hidden + rms(attended, layer["post_attention_layernorm.weight"])
            x = rms(hidden, layer["pre_feedforward_layernorm.weight"])
            x = gelu_tanh(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj")
            x = rms(linear(x, "mlp.down_proj"), layer["post_feedforward_layernorm.weight"])
            return (hidden + x) * layer["layer_scalar"]
        hidden = hidden + attended
        x = rms(hidden, layer["post_attention_layernorm.weight"])
        x = sigmoid_gate(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj")
        hidden = hidden + linear(x, "mlp.down_proj")
        return rms(hidden, state["norm.weight"]) if kind == "mtp" else hidden

    following = [*tokens[1:], anchor]
    for i, token in enumerate(following):
        first = features[i] if kind == "mtp" else state["fc.weight"] @ features[i]
        hidden = row(token, first, i)
    logits = []
    for k, draft in enumerate(drafts):
        read = hidden if kind == "mtp" else rms(hidden, state["norm.weight"])
        row_of_logits = borrowed.head_VH @ read
        logits.append(1.5 * torch.tanh(row_of_logits / 1.5) if gemma4 else row_of_logits)
        hidden = row(draft, hidden, len(features) + k)
    return torch.stack(logits)


KINDS = ("qwen3", "qwen3 normed", "llama", "llama normed", "gemma4", "gemma4 k_eq_v", "mtp")


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_equals_one_row_at_a_time_by_hand(make_eagle3_layer, draft, kind):
    drafter = make_eagle3_layer(kind)
    features, tokens, anchors = inputs(*LENGTHS, width=16 * len(drafter.taps))
    draw, proposal = draft(drafter, features, anchors, tokens=tokens)
    assert (proposal.confidence_logits_RK, proposal.lengths) == (None, None)
    for r in range(3):
        drafts = [int(step[r]) for step in draw.tokens]
        with torch.no_grad():
            expected = chain_by_hand(drafter, features[r], tokens[r], anchors[r], drafts, kind)
        seen = torch.stack([step[r] for step in draw.logits])
        torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    assert len({tuple(step.tolist()) for step in draw.tokens}) > 1


def test_with_a_reduced_vocabulary_the_law_is_the_full_one_on_known_tokens(
    make_eagle3_layer, make_eagle3, make_parts, draft
):
    known = torch.tensor([0, 2, 3, 7, 11, 20, 30, 36])
    reduced = make_eagle3_layer("qwen3", draft_vocab_size=8, draft_tokens=known)
    full, (features, tokens, anchors) = make_eagle3_layer("qwen3"), inputs(*LENGTHS)
    assert reduced.borrowed.head_VH.shape == (8, 16)
    assert torch.equal(reduced.t2d.nonzero().flatten(), known)
    forced = [2, 3, 7, 11, 20]
    mine, _ = draft(reduced, features, anchors, tokens=tokens, forced=forced)
    theirs, _ = draft(full, features, anchors, tokens=tokens, forced=forced)
    assert all(torch.equal(tokens, known) for tokens in mine.known)
    for own, other in zip(mine.logits, theirs.logits, strict=True):
        torch.testing.assert_close(own, other[:, known])
    with pytest.raises(CompatibilityError, match="draft_tokens"):
        make_eagle3(draft_vocab_size=8)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_batch_drafts_what_each_request_drafts_alone(make_eagle3, draft, chunks, layers):
    drafter = make_eagle3(backbone=replace(make_eagle3().config.backbone, num_layers=layers))
    features, tokens, anchors = inputs(*LENGTHS)
    together, _ = draft(drafter, features, anchors, tokens=tokens, chunks=chunks)
    for r in range(3):
        one = slice(r, r + 1)
        alone, _ = draft(drafter, features[one], anchors[one], tokens=tokens[one])
        for k in range(drafter.block_size):
            torch.testing.assert_close(alone.logits[k][0], together.logits[k][r])


def test_fewer_drafts_are_a_prefix_of_all(make_eagle3, draft):
    drafter, (features, tokens, anchors) = make_eagle3(), inputs(*LENGTHS)
    full, _ = draft(drafter, features, anchors, tokens=tokens)
    some, _ = draft(drafter, features, anchors, tokens=tokens, num_drafts=2)
    assert len(some.logits) == 2
    for few, many in zip(some.logits, full.logits, strict=False):
        torch.testing.assert_close(few, many)


@pytest.mark.parametrize("layers", [1, 3])
def test_rows_of_drafts_are_replaced_by_what_is_committed(make_eagle3, draft, layers):
    """A second round in the same cache drafts what a fresh cache would."""
    drafter = make_eagle3(backbone=replace(make_eagle3().config.backbone, num_layers=layers))
    [features], [tokens], [anchor] = inputs(9)
    cache, table = PagedCache(drafter.context_shapes, 1), BlockTable((0,))
    following = torch.tensor([*tokens[1:], anchor])
    seen = []

    def draw(step, logits_RV, tokens=None):
        seen.append(logits_RV[0])
        return logits_RV.argmax(-1)

    for start, stop in ((0, 4), (4, 9)):
        seen.clear()
        rows = slice(start, stop)
        batch = RaggedBatch.build([(table, start, tokens[rows])])
        drafter.observe(cache, batch, features[rows], following[rows])
        last = following[stop - 1 : stop]
        drafter.propose(cache, DraftBatch((table,), last, (stop,), ([],), 5), draw)
    fresh, _ = draft(drafter, [features], [anchor], tokens=[tokens])
    torch.testing.assert_close(torch.stack(seen), torch.cat(fresh.logits))


def test_the_last_row_needs_the_anchor(make_eagle3, draft):
    drafter, (features, tokens, anchors) = make_eagle3(), inputs(*LENGTHS)
    one, _ = draft(drafter, features, anchors, tokens=tokens)
    other, _ = draft(drafter, features, [(a + 1) % 37 for a in anchors], tokens=tokens)
    assert (one.logits[0] - other.logits[0]).abs().amax(-1).min() > 1e-3


def test_mtp_is_one_pass_over_one_tap(make_eagle3, make_parts, draft):
    base = make_eagle3().config
    config = replace(
        base, backbone=replace(base.backbone, num_taps=1), target_layer_ids=(5,), ttt_length=1
    )
    generator = torch.Generator().manual_seed(1)
    drafter = Eagle3Drafter.from_target(make_parts(), config, generator=generator).eval()
    assert (drafter.block_size, drafter.taps) == (1, (5,))
    features, tokens, anchors = inputs(4, width=16)
    draw, _ = draft(drafter, features, anchors, tokens=tokens)
    assert len(draw.logits) == 1


def test_decoding_runs_in_the_targets_dtype_and_leaves_parameters_alone(
    make_eagle3, make_parts, draft
):
    parts, (features, tokens, anchors) = make_parts(), inputs(7)
    single, _ = draft(make_eagle3(), features, anchors, tokens=tokens)
    drafter = make_eagle3(
        make_parts(embedding_VH=parts.embedding_VH.double(), head_VH=parts.head_VH.double())
    )
    cache, table = PagedCache(drafter.context_shapes, 1, dtype=torch.float64), BlockTable((0,))
    following = torch.tensor([*tokens[0][1:], *anchors])
    batch = RaggedBatch.build([(table, 0, tokens[0])])
    drafter.observe(cache, batch, features[0].double(), following)
    seen = []

    def draw(step, logits_RV, tokens=None):
        seen.append(logits_RV)
        return single.tokens[step]

    with torch.inference_mode():
        drafter.propose(cache, DraftBatch((table,), torch.tensor(anchors), (7,), ([],), 5), draw)
    assert (seen[0].dtype, drafter.fc.weight.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(
        torch.stack(seen).float(), torch.stack(single.logits), atol=1e-4, rtol=1e-4
    )


def test_fused_weights_follow_the_parameters(make_eagle3, draft):
    drafter, other, (features, tokens, anchors) = make_eagle3(), make_eagle3(seed=2), inputs(7)
    before, _ = draft(drafter, features, anchors, tokens=tokens)
    wanted, _ = draft(other, features, anchors, tokens=tokens)
    drafter.load_state_dict(other.state_dict())
    after, _ = draft(drafter, features, anchors, tokens=tokens)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(wanted.logits))
    assert not torch.allclose(torch.stack(before.logits), torch.stack(wanted.logits))
    with torch.no_grad():
        for mine, theirs in zip(drafter.parameters(), make_eagle3().parameters(), strict=True):
            mine.copy_(theirs)
    drafter.eval()
    again, _ = draft(drafter, features, anchors, tokens=tokens)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(before.logits))


def test_embedding_and_head_are_borrowed(make_parts, make_eagle3, caplog):
    parts = make_parts(logit_softcap=0.5)
    drafter = make_eagle3(parts)
    assert drafter.borrowed.embedding_VH is parts.embedding_VH
    held = {t.data_ptr() for t in (*drafter.parameters(), *drafter.buffers())}
    assert not held & {parts.embedding_VH.data_ptr(), parts.head_VH.data_ptr()}
    hidden = torch.randn(3, 16)
    expected = 0.5 * torch.tanh(hidden @ parts.head_VH.T / 0.5)
    torch.testing.assert_close(drafter.base_logits(hidden), expected)
    drafter.own_head_VH = parts.head_VH + 1
    with caplog.at_level(logging.WARNING):
        drafter.bind(parts)
    assert "lm_head.weight" in caplog.text
    torch.testing.assert_close(drafter.target_logits(hidden), expected)
    assert not torch.allclose(drafter.base_logits(hidden), expected)


def test_from_target_is_seeded_and_takes_the_final_norm(make_eagle3, make_parts):
    def make(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        config = make_eagle3().config
        return Eagle3Drafter.from_target(make_parts(), config, generator=generator, **options)

    one, same, other = make(3), make(3), make(4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert torch.equal(one.norm.weight, make_parts().final_norm_H)
    assert torch.equal(make(3, copy_final_norm=False).norm.weight, torch.ones(16))
    assert one.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_layer_ids": (1, 1, 4)}, "strictly increasing"),
        ({"target_layer_ids": (0, 1, 6)}, "to 5"),
        ({"target_layer_ids": (0, 1)}, "num_taps is 3"),
        ({"ttt_length": 0}, "ttt_length is 0"),
        ({"vocab_size": 36}, "vocab_size is 36.*target's is 37"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make_eagle3, changes, words):
    with pytest.raises(CompatibilityError, match=words):
        make_eagle3(**changes)


def test_taps_beyond_the_target_are_refused_and_unbound_says_so(make_eagle3, make_parts):
    drafter = make_eagle3()
    with pytest.raises(CompatibilityError, match=r"\[-1, 1, 4\].*has 4 layers"):
        drafter.bind(make_parts(), num_target_layers=4)
    with pytest.raises(CompatibilityError, match="bind"):
        Eagle3Drafter(drafter.config).base_logits(torch.zeros(1, 16))
