"""Drafting from the likeliest tokens of each slot (`draft_top_k`)."""

import pytest
import torch

from dspark.drafters.target_bound import Borrowed
from dspark.engine.model import Model
from dspark.errors import UsageError

TOKENS = torch.tensor([0, 2, 3, 7, 11, 20, 30, 36])


def contexts(*lengths):
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(length, 48, generator=generator) for length in lengths]


def masked(drafter, top_k, monkeypatch):
    """The reference: every row is computed whole, then all but its candidates are masked."""
    plain = Borrowed.logits_by_rows

    def logits_by_rows(borrowed, hidden_KRH):
        base = plain(borrowed, hidden_KRH)
        least = base.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
        return base.masked_fill(base < least, float("-inf"))

    monkeypatch.setattr(Borrowed, "logits_by_rows", logits_by_rows)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("known", [None, TOKENS], ids=["all", "some"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_candidates_are_the_dense_rows_with_all_others_masked(
    make_drafter, make_parts, draft, monkeypatch, kind, known, top_k
):
    changes = {} if known is None else {"draft_vocab_size": 8, "draft_tokens": known}
    drafter = make_drafter(make_parts(), markov_head_type=kind, **changes)
    features, anchors = contexts(3, 11, 6), [5, 6, 7]
    drafter.draft_top_k = top_k
    ours, proposal = draft(drafter, features, anchors)
    drafter.draft_top_k = None
    masked(drafter, top_k, monkeypatch)
    dense, expected = draft(drafter, features, anchors)
    for k in range(drafter.block_size):
        assert ours.logits[k].shape == (3, top_k)
        assert bool((ours.known[k].diff(dim=1) > 0).all())
        torch.testing.assert_close(ours.tokens[k], dense.tokens[k])
        whole = torch.full((3, 37), float("-inf"))
        theirs = whole.clone()
        whole.scatter_(1, ours.known[k], ours.logits[k])
        columns = torch.arange(37) if known is None else known
        theirs[:, columns] = dense.logits[k]
        torch.testing.assert_close(whole, theirs)
    torch.testing.assert_close(proposal.confidence_logits_RK, expected.confidence_logits_RK)


def test_as_many_candidates_as_tokens_change_nothing(make_drafter, draft):
    drafter, features = make_drafter(), contexts(4)
    plain, _ = draft(drafter, features, [5])
    drafter.draft_top_k = 37
    every, _ = draft(drafter, features, [5])
    for one, other in zip(plain.logits, every.logits, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "top_k", "said"),
    [
        ({}, 0, "draft_top_k is 0, but must be at least 1"),
        ({"markov_rank": 0, "confidence_head": False}, 4, "has no Markov head"),
        (None, 4, "there is no drafter"),
    ],
)
def test_what_cannot_draft_from_candidates_is_refused(make_drafter, changes, top_k, said):
    drafter = None if changes is None else make_drafter(**changes)
    with pytest.raises(UsageError, match=said):
        Model(None, drafter, draft_top_k=top_k)


def test_a_model_restricts_its_drafter(make_drafter):
    drafter = make_drafter()
    assert Model(None, drafter).draft_top_k is None
    assert Model(None, drafter, draft_top_k=4).draft_top_k == 4
    assert drafter.draft_top_k == 4
