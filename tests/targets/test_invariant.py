"""Batch-invariant mode: a token's result is the same to the last bit in any company."""

import pytest
import torch
from torch import nn

from dspark.attention.paged_cache import BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import CompatibilityError
from dspark.targets import invariant as mode
from dspark.targets.target import Target

LENGTHS = (30, 17, 9, 40, 5, 21, 33, 12)
REQUESTS = [[(7 + 13 * i * (r + 1) + r) % 61 for i in range(n)] for r, n in enumerate(LENGTHS)]
TAPS = (0, 2)
# Pages of four tokens, scattered.
PAGE, PAGES = 4, 97
TABLES = [
    BlockTable([(37 * (10 * r + i)) % PAGES for i in range(10)], PAGE) for r in range(len(REQUESTS))
]


def everything(out):
    return torch.cat((out.hidden_TH, out.features_TF, out.logits_NV), -1)


def in_chunks(target, ids, *sizes):
    """One request alone, fed in chunks."""
    cache, outs, start = target.new_cache(10, PAGE), [], 0
    table = BlockTable(range(10), PAGE)
    for size in sizes:
        piece = ids[start : start + size]
        if piece:
            batch = RaggedBatch.build([(table, start, piece)], target.device)
            outs.append(everything(target.forward(batch, cache, taps=TAPS, logit_rows="all")))
        start += size
    return torch.cat(outs)


def together(target):
    """All requests, in changing order and in pieces of changing size."""
    cache = target.new_cache(PAGES, PAGE)
    outs, starts, step = [[] for _ in REQUESTS], [0] * len(REQUESTS), 0
    while any(start < n for start, n in zip(starts, LENGTHS, strict=True)):
        parts, who = [], []
        for i in range(len(REQUESTS)):
            r = (3 * i + step) % len(REQUESTS)
            piece = REQUESTS[r][starts[r] :][: (1, 7, 2, 5, 11, 3, 1, 4)[(r + step) % 8]]
            if piece:
                parts.append((TABLES[r], starts[r], piece))
                who.append(r)
                starts[r] += len(piece)
        batch = RaggedBatch.build(parts, target.device)
        rows = everything(target.forward(batch, cache, taps=TAPS, logit_rows="all"))
        for r, piece in zip(who, rows.split([len(part[2]) for part in parts]), strict=True):
            outs[r].append(piece)
        step += 1
    return [torch.cat(pieces) for pieces in outs]


@torch.inference_mode()
def changed(target):
    """How many requests come out different in another company, and in other chunks."""
    alone = [in_chunks(target, ids, len(ids)) for ids in REQUESTS]
    pieces = [in_chunks(target, ids, 3, 1, 8, 1, 30) for ids in REQUESTS]
    beside = together(target)
    return tuple(
        sum(not torch.equal(a, b) for a, b in zip(alone, other, strict=True))
        for other in (beside, pieces)
    )


def load(tiny_model, name, dtype=torch.bfloat16, **options):
    return Target.from_model(tiny_model(name).to(dtype), batch_invariant=True, **options)


def test_no_bit_depends_on_the_batch(tiny_model, family):
    assert changed(load(tiny_model, family)) == (0, 0)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma4", "gpt_oss"])
def test_nor_in_float32(tiny_model, name):
    assert changed(load(tiny_model, name, torch.float32)) == (0, 0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("qwen3", torch.bfloat16), ("qwen3", torch.float32), ("qwen3_moe", torch.float32)],
)
def test_control_by_default_bits_do_depend_on_the_batch(tiny_model, name, dtype):
    beside, pieces = changed(Target.from_model(tiny_model(name).to(dtype)))
    assert beside > 0
    assert pieces > 0


def test_results_are_those_of_the_default_mode(tiny_model, family):
    dtype = torch.float64 if family == "gpt2" else torch.float32
    batch = RaggedBatch.fresh(REQUESTS[:3])
    logits, hidden = [], []
    for invariant in (True, False):
        torch.manual_seed(0)  # of parameters that keep their random start
        target = Target.from_model(tiny_model(family).to(dtype), batch_invariant=invariant)
        assert target.batch_invariant == invariant
        out = target.forward(batch, target.new_cache(6), logit_rows="all")
        logits.append(out.logits_NV)
        hidden.append(out.hidden_TH)
    assert (logits[0] - logits[1]).abs().max() <= 1e-4
    assert torch.equal(target.logits(hidden[0][:0]), logits[0][:0])


def test_without_a_cache_tokens_see_their_own_segment(tiny_model):
    target = load(tiny_model, "qwen3")
    batch = RaggedBatch.fresh(REQUESTS)
    got = target.forward(batch, logit_rows="all").logits_NV
    expected = [in_chunks(target, ids, len(ids))[:, -61:] for ids in REQUESTS]
    assert torch.equal(got, torch.cat(expected))


def test_experts_equal_a_loop_over_rows(tiny_model, monkeypatch):
    seen = []
    tiled = mode.tiled_experts

    def spy(module, hidden_TH, index_TE, weights_TE):
        out = tiled(module, hidden_TH, index_TE, weights_TE)
        seen.append((module, hidden_TH, index_TE, weights_TE, out))
        return out

    monkeypatch.setitem(mode.ExpertsInterface._global_mapping, mode.EXPERTS, spy)
    target = load(tiny_model, "qwen3_moe", torch.float32)
    target.forward(RaggedBatch.fresh([REQUESTS[0]]))
    module, hidden_TH, index_TE, weights_TE, out_TH = seen[-1]
    assert len(hidden_TH) == 16
    for row, chosen, weights, out in zip(hidden_TH, index_TE, weights_TE, out_TH, strict=True):
        expected = torch.zeros_like(out)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = (module.gate_up_proj[expert] @ row).chunk(2)
            expected += weight * (module.down_proj[expert] @ (nn.functional.silu(gate) * up))
        assert torch.allclose(out, expected, atol=1e-5)


class Mixing(nn.Module):
    """Scales its input by what the whole tile holds, as products in eight bits may."""

    def __init__(self, inner):
        super().__init__()
        self.weight = inner.weight

    def forward(self, x):
        scale = x.abs().amax() / 127
        return nn.functional.linear((x / scale).round() * scale, self.weight)


class Choosy(nn.Module):
    """Works on the rows that want it, as experts in a list of modules do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        chosen = x[0, :, 0] > 0
        out = x.new_zeros(x.shape[1], self.inner.out_features)
        out[chosen] = self.inner(x[0, chosen])
        return out[None]


class Packed(nn.Module):
    """Experts in one tensor, and no way to replace the products."""

    def __init__(self, inner):
        super().__init__()
        self.weight = nn.Parameter(inner.weight[None].clone())

    def forward(self, x):
        return x @ self.weight[0].T


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Mixing, "what layers.1.mlp.up_proj makes of a row changes with the others"),
        (Choosy, "how many rows layers.1.mlp.up_proj.inner works on depends on the batch"),
        (Packed, r"the expert products of layers.1.mlp.up_proj \(Packed\) are not replaceable"),
    ],
)
def test_what_cannot_be_made_invariant_is_refused_by_name(tiny_model, kind, message):
    model = tiny_model("qwen3").to(torch.bfloat16)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = kind(mlp.up_proj)
    with pytest.raises(CompatibilityError, match=f"^Qwen3ForCausalLM cannot .*{message}") as caught:
        Target.from_model(model, batch_invariant=True)
    assert str(caught.value).count(".\n") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["auto", "plain"])
def test_cuda_no_bit_depends_on_the_batch(tiny_model, family, attention):
    model = tiny_model(family).to(torch.bfloat16).cuda()
    assert changed(Target.from_model(model, batch_invariant=True, attention=attention)) == (0, 0)
