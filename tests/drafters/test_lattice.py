"""Lattices and levels say along every path what the drafter says when its draws are dictated."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch, LevelDrafter
from dspark.drafters.lattice import LatticeDrafter
from dspark.drafters.ngram import NgramDrafter
from dspark.errors import CompatibilityError
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark, tiny_eagle3
from tests.helpers.targets import tiny_qwen3

VOCAB, SLOTS = 12, 3


@pytest.fixture(scope="module")
def target():
    return Target.from_model(tiny_qwen3(seed=2, vocab_size=VOCAB), name="tiny")


def asked(target, **changes):
    """A drafter with a context of two requests, and the question for their next blocks."""
    return with_context(
        target, tiny_dspark(target, taps=(-1, 0), std=0.4, block_size=SLOTS, **changes)
    )


def with_context(target, drafter):
    tables = (BlockTable((0,)), BlockTable((1,)))
    batch = RaggedBatch.build([(tables[0], 0, [1, 2, 3]), (tables[1], 0, [4, 5])])
    context = PagedCache(drafter.context_shapes, 2)
    features = target.forward(batch, PagedCache(target.cache_shapes, 2), taps=drafter.taps)
    following = torch.tensor([2, 3, 6, 5, 7])
    drafter.observe(context, batch, features.features_TF, following)
    question = DraftBatch(tables, torch.tensor([6, 7]), (3, 2), ([1, 2, 3, 6], [4, 5, 7]), SLOTS)
    return drafter, context, question


def dictated(drafter, context, question, path):
    """Logits and confidence logits that the drafter gives where it must draw this path."""
    logits = []

    def draw(step, logits_RC, tokens=None):
        logits.append(logits_RC.clone())
        return torch.tensor([path[step]] * 2)

    proposal = drafter.propose(context, question, draw)
    return torch.stack(logits, dim=1), proposal.confidence_logits_RK


@pytest.mark.parametrize(
    "changes", [{}, {"markov_head_type": "gated"}, {"confidence_head": False}, {"markov_rank": 0}]
)
def test_every_row_is_what_the_drafter_says_after_that_token(target, changes):
    if changes.get("markov_rank") == 0:
        changes = {**changes, "confidence_head": False}
    drafter, context, question = asked(target, **changes)
    lattice = drafter.lattice(context, question, VOCAB, VOCAB)
    assert lattice.tokens_RKC.tolist() == [[list(range(VOCAB))] * SLOTS] * 2
    for path in product((0, 5, 9), repeat=SLOTS):
        logits_RKC, scores_RK = dictated(drafter, context, question, path)
        for r, k in product(range(2), range(SLOTS)):
            parents = lattice.parents_RKP[r, k].tolist()
            row = 0 if k == 0 else parents.index(path[k - 1])
            assert torch.allclose(lattice.logits_RKPC[r, k, row], logits_RKC[r, k], atol=1e-5)
            if scores_RK is not None:
                found = lattice.confidence_logits_RKP[r, k, row]
                assert torch.allclose(found, scores_RK[r, k], atol=1e-5)


def test_few_candidates_are_the_likeliest_before_the_bias_and_parents_by_all_paths(target):
    drafter, context, question = asked(target)
    whole = drafter.lattice(context, question, VOCAB, VOCAB)
    few = drafter.lattice(context, question, 6, 2)
    for r, k in product(range(2), range(SLOTS)):
        columns = few.tokens_RKC[r, k]
        assert columns.tolist() == sorted(columns.tolist())
        rows = [0] if k == 0 else few.tokens_RKC[r, k - 1][few.parents_RKP[r, k]].tolist()
        for p, token in enumerate(rows):
            row = 0 if k == 0 else whole.parents_RKP[r, k].tolist().index(token)
            expected = whole.logits_RKPC[r, k, row][columns]
            assert torch.allclose(few.logits_RKPC[r, k, p], expected, atol=1e-5)
    # By hand for the second slot: the chance of each first token is the anchor's row.
    chances = few.logits_RKPC[0, 0, 0].softmax(0)
    assert few.parents_RKP[0, 1].tolist() == chances.topk(2).indices.tolist()


def test_a_head_with_a_state_of_its_own_is_refused(target):
    drafter, _, _ = asked(target, markov_head_type="rnn")
    with pytest.raises(CompatibilityError, match="sees one token back"):
        drafter.check_lattice()
    assert not isinstance(NgramDrafter(), LatticeDrafter | LevelDrafter)


# Per level and request: (row of the parent in the level before, token).
TREES = (
    ([(0, 5), (0, 9), (0, 0)], [(0, 3), (0, 1)]),
    ([(2, 5), (0, 9), (0, 1), (2, 2)], [(1, 8)]),
    ([(3, 7), (1, 7), (3, 4)], []),
)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("known", [None, (0, 1, 2, 3, 4, 5, 7, 8, 9)])
def test_every_node_of_every_level_is_what_the_drafter_says_after_its_path(target, layers, known):
    backbone = tiny_backbone(target.hidden_size, 2, num_layers=layers)
    drafter, context, question = with_context(
        target,
        tiny_eagle3(target, taps=(-1, 0), std=0.4, ttt_length=4, backbone=backbone, known=known),
    )
    paths, found, seen = [[()], [()]], [], list[int]()  # (request, path, logits); rows of levels

    def expand(logits_NC, tokens=None):
        assert (tokens is None) == (known is None)
        places = [(r, path) for r, own in enumerate(paths) for path in own]
        found.extend((*place, row) for place, row in zip(places, logits_NC, strict=True))
        level = len(seen)
        seen.append(len(logits_NC))
        if level == len(TREES):
            return [], []
        for r, nodes in enumerate(TREES[level]):
            paths[r] = [(*paths[r][row], token) for row, token in nodes]
        return TREES[level]

    drafter.levels(context, question, expand)
    assert seen == [2, 5, 5, 3]
    for r, path, logits_C in found:
        whole = (*path, 1)
        logits_RKC, _ = dictated(drafter, context, replace(question, num_drafts=len(whole)), whole)
        assert torch.allclose(logits_C, logits_RKC[r, len(path)], atol=1e-5)


def test_p_eagle_is_refused(target):
    drafter = tiny_eagle3(target, taps=(-1, 0), mask_token_id=3)
    with pytest.raises(CompatibilityError, match="P-EAGLE"):
        drafter.check_levels()
