"""Drafters decode with packed weights where their target has them, and compute the same."""

from dataclasses import replace

import pytest
import torch

from dspark.targets.fast import products
from dspark.targets.fast.packing import Packer

TOKENS = torch.tensor([0, 2, 3, 7, 11, 20, 30, 36])
FORCED = [2, 3, 7, 11, 20]
KINDS = [
    pytest.param(
        "fp16",
        2e-3,
        marks=pytest.mark.skipif(not products.fp16_works(), reason="no FBGEMM for 16-bit weights"),
    ),
    pytest.param(
        "onednn",
        1e-5,
        marks=pytest.mark.skipif(
            not products.onednn_works(torch.float32), reason="no packed products of oneDNN"
        ),
    ),
]


class Counting:
    """A packer that remembers the shapes of what it has packed."""

    def __init__(self, kind):
        self.packer, self.shapes = Packer(kind), []

    def __call__(self, weights, biases=None, *, exact=True):
        self.shapes += [tuple(weight.shape) for weight in weights]
        return self.packer.pack(weights, biases, exact=exact)


def relative(got, expected):
    return max(
        float((g - e).norm() / e.norm()) for g, e in zip(got.logits, expected.logits, strict=True)
    )


@pytest.mark.parametrize(("kind", "bound"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_reduced_head_is_packed(make_drafter, make_parts, draft, kind, bound, bias):
    known = {"draft_vocab_size": 8, "draft_tokens": TOKENS}
    changes = {"logit_softcap": 3.0} | ({"head_bias_V": torch.linspace(-1, 1, 37)} if bias else {})
    contexts = [torch.randn(n, 48, generator=torch.Generator().manual_seed(n)) for n in (9, 4)]
    pack = Counting(kind)
    plain, packed = (
        draft(make_drafter(make_parts(**changes, **lent), **known), contexts, [1, 2], forced=FORCED)
        for lent in ({}, {"pack": pack})
    )
    assert (8, 16) in pack.shapes  # the head
    assert (8, 4) in pack.shapes  # the Markov table
    assert relative(packed[0], plain[0]) < bound
    torch.testing.assert_close(
        packed[1].confidence_logits_RK, plain[1].confidence_logits_RK, atol=10 * bound, rtol=0
    )


@pytest.mark.parametrize(("kind", "bound"), KINDS)
@pytest.mark.parametrize("case", ["reduced", "whole", "mtp of two layers"])
def test_eagle3s_layers_are_packed(make_eagle3, make_parts, draft, kind, bound, case):
    known = {"draft_vocab_size": 8, "draft_tokens": TOKENS} if case == "reduced" else {}
    if two := case == "mtp of two layers":
        own = make_eagle3().config.backbone
        backbone = replace(own, num_layers=2, num_taps=1, input_projection=True)
        known |= {"backbone": backbone, "target_layer_ids": (5,)}
    generator, width = torch.Generator().manual_seed(9), 16 if two else 48
    features = [torch.randn(length, width, generator=generator) for length in (3, 11, 6)]
    tokens = [torch.randint(0, 37, (len(rows),), generator=generator).tolist() for rows in features]
    anchors = [4, 5, 6]
    pack = Counting(kind)
    plain, packed = (
        draft(
            make_eagle3(make_parts(**lent), **known),
            features,
            anchors,
            tokens=tokens,
            forced=FORCED,
        )[0]
        for lent in ({}, {"pack": pack})
    )
    # Projection of features, query with key and value, these two alone, output, MLP, and the head;
    # a further layer's without its keys and values alone.
    assert len(pack.shapes) == (11 if two else 7)
    assert (24, 16 if two else 32) in pack.shapes
    assert relative(packed, plain) < 2 * bound


def test_the_targets_own_packed_head_is_used_as_it_is(make_drafter, make_parts):
    pack = Counting("plain")
    parts = make_parts(pack=pack)
    head = pack([parts.head_VH])
    borrowed = make_drafter(make_parts(pack=pack, head=head)).borrowed
    assert borrowed.packed() is borrowed
    assert borrowed.packed().head is head
