"""What is counted, against traces worked out by hand."""

from __future__ import annotations

import pytest

from dspark.engine.requests.sequence import ActiveRequest
from dspark.request import Request, SamplingParams, Stats, merge_stats


def active(*, end_ids=(), max_tokens=100, **params) -> ActiveRequest:
    """A request in its rounds: prompt of two tokens, first token drawn."""
    request = Request((1, 2), SamplingParams(**params))
    made = ActiveRequest(0, request, "", frozenset(end_ids), max_tokens, None)
    made.commit([3], 0, 0)
    return made


def test_rounds_by_hand():
    stats = Stats()
    stats.record_round(4, 2, 3, cut=False)  # rejected at the third draft
    stats.record_round(4, 4, 5, cut=False)  # all kept, and the bonus token
    stats.record_round(2, 0, 1, cut=False)  # trimmed, rejected at once
    stats.record_round(0, 0, 1, cut=False)  # nothing verified
    assert stats.offered == [3, 2, 2, 1]
    assert stats.survived == [2, 2, 1, 1]
    assert stats.conditional_acceptance == [2 / 3, 1.0, 0.5, 1.0]
    assert (stats.rounds, stats.tokens, stats.verified, stats.accepted) == (4, 10, 10, 6)
    assert stats.accepted_length == 2.5


def test_a_round_cut_by_the_end_says_nothing_about_the_draft_behind_it():
    stats = Stats()
    stats.record_round(4, 2, 2, cut=True)
    assert stats.offered == [1, 1, 0, 0]
    assert stats.conditional_acceptance == [1.0, 1.0, None, None]


@pytest.mark.parametrize(
    ("tokens", "kept", "offered", "survived"),
    [
        ([5, 6, 9, 7], 3, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]),  # ends at the last kept draft
        ([5, 9, 6, 7], 2, [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]),  # ends before it
        ([5, 6, 7, 9], 4, [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]),  # ends at the corrected token
        ([9], 1, [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_what_lies_behind_the_end_is_not_counted(tokens, kept, offered, survived):
    accepted = len(tokens) - 1
    request = active(end_ids=(9,))
    pieces = request.commit(tokens, accepted, 5)
    assert [piece.token_id for piece in pieces] == tokens[:kept]
    assert list(request.output_ids) == [3, *tokens[:kept]]
    assert [piece.drafted for piece in pieces] == [i < accepted for i in range(kept)]
    assert request.finish_reason == "stop"
    stats = request.stats
    assert (stats.tokens, stats.accepted, stats.verified) == (kept, min(accepted, kept), 5)
    assert (stats.offered, stats.survived) == (offered, survived)


def test_a_limit_cuts_a_round():
    request = active(max_new_tokens=3)
    pieces = request.commit([5, 6, 7], 2, 2)
    assert [piece.token_id for piece in pieces] == [5, 6]
    assert request.finish_reason == "length"
    assert (request.stats.offered, request.stats.survived) == ([1, 1], [1, 1])


def test_the_prompts_own_round_is_not_counted():
    request = active()
    assert (request.stats.rounds, request.stats.tokens) == (0, 0)
    assert (request.cached, request.round) == (2, 1)


def test_cached_tokens_are_all_but_the_anchor():
    request = active()
    for tokens in ([5, 6, 7], [8], [9, 10]):
        request.commit(tokens, len(tokens) - 1, 4)
        assert request.cached == len(request.tokens) - 1


def test_sums():
    one, other = Stats(), Stats()
    one.record_round(1, 1, 2, cut=False)
    other.record_round(3, 1, 2, cut=False)
    other.drafted = 5
    one.add(other)
    assert (one.rounds, one.tokens, one.drafted, one.verified) == (2, 4, 5, 4)
    assert (one.offered, one.survived) == ([2, 1, 0], [2, 0, 0])


def test_a_perfect_drafter_in_numbers(tiny, target):
    requests = tiny.make_requests([[1, 2], [3, 4, 5]], max_new_tokens=19)
    outputs = tiny.decode(target, tiny.TargetDrafter(target, block_size=5), requests)
    stats = merge_stats(outputs)
    # One token with the prompt, then three rounds of five drafts and a bonus token.
    assert (stats.rounds, stats.tokens, stats.accepted_length) == (6, 36, 6.0)
    assert stats.drafted == stats.verified == stats.accepted == 30
    assert stats.conditional_acceptance == [1.0] * 5


def test_trimmed_drafts_were_drafted_but_not_verified(tiny, target):
    requests = tiny.make_requests([[1, 2]], max_new_tokens=12)
    [output] = tiny.decode(target, tiny.MarkovDrafter(64), requests, threshold=1.0)
    assert output.stats.verified == 0
    assert output.stats.drafted > 20
    assert output.stats.accepted_length == 1.0
    assert output.stats.conditional_acceptance == []
