import math

import pytest
import torch

from dspark.attention.paged_cache import BlockTable
from dspark.drafters.base import DraftBatch
from dspark.drafters.ngram import NgramDrafter
from dspark.errors import CompatibilityError, UsageError


def obvious(tokens, count, longest=3, shortest=1):
    """Search as the words say it: longest suffix first, then the latest earlier place."""
    n = len(tokens)
    for size in range(min(longest, n - 1), shortest - 1, -1):
        for start in range(n - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[n - size :]:
                text = list(tokens)
                for _ in range(count):
                    text.append(text[start + size + len(text) - n])
                return text[n:]
    return []


def test_lookup_equals_the_obvious_search():
    generator = torch.Generator().manual_seed(0)
    drafter = NgramDrafter(block_size=6)
    found = 0
    for _ in range(300):
        length = int(torch.randint(1, 25, (), generator=generator))
        tokens = torch.randint(6, (length,), generator=generator).tolist()
        found += bool(drafter.lookup(tokens, 6))
        assert drafter.lookup(tokens, 6) == obvious(tokens, 6), tokens
    assert 100 < found < 300


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 9, 9, 1, 2, 3], [4, 9, 9, 1]),  # three tokens beat the later single one
        ([1, 5, 2, 1, 6, 2, 1], [6, 2, 1, 6]),  # the latest place, repeated at its distance
        ([7, 7], [7, 7, 7, 7]),
        ([1, 2, 3], []),
        ([4], []),
    ],
)
def test_lookup_examples(tokens, expected):
    assert NgramDrafter().lookup(tokens, 4) == expected


def test_minimum_length_is_kept():
    assert NgramDrafter(min_ngram=2).lookup([1, 5, 2, 1], 4) == []
    assert NgramDrafter(min_ngram=2).lookup([1, 5, 2, 1, 5], 2) == [2, 1]


def test_proposals_are_one_hot_and_their_lengths_are_told(make_parts):
    drafter = NgramDrafter()
    drafter.bind(make_parts())
    tokens = ([1, 2, 3, 1], [4, 5, 6])
    batch = DraftBatch((BlockTable(), BlockTable()), torch.tensor([1, 6]), (3, 2), tokens, 3)
    laws = []

    def draw(step, logits, tokens):
        assert (logits.shape, tokens.shape) == ((2, 1), (2, 1))
        laws.append(tokens)
        return tokens[:, 0]

    proposal = drafter.propose(None, batch, draw)
    assert proposal.lengths == (3, 0)
    assert proposal.confidence_logits_RK.shape == (2, 3)
    assert proposal.confidence_logits_RK[1].tolist() == [-math.inf] * 3
    assert [int(tokens[0, 0]) for tokens in laws] == [2, 3, 1]


def test_nothing_is_drawn_when_nothing_matches(make_parts):
    drafter = NgramDrafter()
    drafter.bind(make_parts())
    batch = DraftBatch((BlockTable(),), torch.tensor([3]), (2,), ([1, 2, 3],), 3)

    def draw(step, logits, tokens):
        raise AssertionError("no draw expected")

    assert drafter.propose(None, batch, draw).lengths == (0,)


def test_bad_options_and_an_unbound_drafter_are_refused():
    with pytest.raises(UsageError, match="max_ngram 1"):
        NgramDrafter(max_ngram=1, min_ngram=2)
    with pytest.raises(CompatibilityError, match="bind"):
        NgramDrafter().propose(None, DraftBatch((), torch.zeros(0), (), (), 1), None)


def obvious_confidence(tokens, length, window=16):
    """Hits among the one-token lookups of the last tokens, the match's length as prior."""
    guesses = [(obvious(tokens[:at], 1), tokens[at]) for at in range(1, len(tokens))][-window:]
    found = [guess == [token] for guess, token in guesses if guess]
    return (sum(found) + 2 * length / (length + 1)) / (len(found) + 2)


def test_confidence_is_the_running_acceptance_with_the_match_as_prior():
    generator = torch.Generator().manual_seed(0)
    drafter = NgramDrafter()
    for _ in range(100):
        tokens = torch.randint(4, (24,), generator=generator).tolist()
        for length in (1, 2, 3):
            expected = obvious_confidence(tokens, length)
            logit = torch.tensor(drafter.confidence_logit(tokens, length))
            assert torch.sigmoid(logit).item() == pytest.approx(expected)


def test_confidence_rises_with_the_match_and_with_what_came_true():
    confidence = NgramDrafter().confidence_logit
    fresh = [1, 2, 3, 4]
    assert confidence(fresh, 1) == 0.0
    assert confidence(fresh, 1) < confidence(fresh, 2) < confidence(fresh, 3)
    assert confidence([5, 6] * 6, 3) > confidence(fresh, 3) > confidence([1, 2, 1, 3, 1, 4, 1], 3)


def test_confidence_is_left_out_where_nobody_reads_it(make_parts):
    drafter = NgramDrafter()
    drafter.bind(make_parts())
    batch = DraftBatch((BlockTable(),), torch.tensor([1]), (1,), ([1, 1],), 2, confidences=False)
    proposal = drafter.propose(None, batch, lambda step, logits, tokens: logits.argmax(-1))
    assert proposal.lengths == (2,)
    assert proposal.confidence_logits_RK is None
