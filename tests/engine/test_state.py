"""After any mixture of acceptance and rejection, caches hold exactly what was committed."""

from __future__ import annotations

import pytest
import torch

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.engine.engine import Engine
from dspark.request import Request, SamplingParams


def next_logits(target, cache, table, tokens, cached):
    batch = RaggedBatch.build([(table, cached, tokens[cached:])])
    last = torch.tensor([len(tokens) - cached - 1])
    with torch.inference_mode():
        return target.forward(batch, cache, logit_rows=last).logits_NV[0]


def fresh_context(target, drafter, tokens, table):
    """The drafter's context after one prefill of all these tokens but the last."""
    pages = len(table.pages)
    context = PagedCache(drafter.context_shapes, pages, dtype=target.dtype)
    batch = RaggedBatch.build([(table, 0, tokens[:-1])])
    with torch.inference_mode():
        output = target.forward(batch, target.new_cache(pages), taps=drafter.taps)
        drafter.observe(context, batch, output.features_TF, torch.tensor(tokens[1:]))
    return context


def check_caches(engine, request, *, tolerance=1e-9):
    """Compare a running request with a fresh prefill of its tokens."""
    target, tokens = engine.target, list(request.tokens)
    assert request.cached == len(tokens) - 1
    pages = len(request.table.pages)
    table = BlockTable(range(pages))
    fresh = next_logits(target, target.new_cache(pages), table, tokens, 0)
    own = next_logits(target, engine.memory.cache, request.table, tokens, request.cached)
    torch.testing.assert_close(own, fresh, rtol=tolerance, atol=tolerance)
    speculator = engine._speculator
    speculator.context.flush()
    expected = fresh_context(target, speculator.drafter, tokens, table)
    first = int(speculator.drafter.reads_next_token)
    written = (first, first + request.cached)
    for layer in range(len(speculator.drafter.context_shapes)):
        own_pair = speculator.context.cache.heads(layer, request.table, *written)
        for mine, theirs in zip(own_pair, expected.heads(layer, table, *written), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def distracted_drafter(tiny, target, name="dspark"):
    """A drafter that observes and drafts, and proposes what is accepted now and then."""
    drafter = tiny.make_drafter(target) if name == "dspark" else tiny.make_eagle3(target)
    own, better = drafter.propose, tiny.TargetDrafter(target, spoil=4)

    def propose(context, batch, draw):
        own(context, batch, lambda step, logits_RV, tokens=None: logits_RV.argmax(-1))
        return better.propose(context, batch, draw)

    drafter.propose = propose
    return drafter


@pytest.mark.parametrize("name", ["dspark", "eagle3"])
@pytest.mark.parametrize("verifier", ["token", "block", "coupled"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_caches_hold_the_committed_prefix(tiny, verifier, temperature, name):
    target = tiny.make_target(dtype=torch.float64)
    drafter = distracted_drafter(tiny, target, name)
    engine = Engine(target, drafter, max_requests=3, max_length=80, verifier=verifier)
    for i, prompt in enumerate(tiny.make_prompts(5, 64, seed=2)):
        params = SamplingParams(8 + 2 * i, temperature=temperature, seed=i)
        engine.add(Request(tuple(prompt), params))
    outcomes = set()
    while engine.has_work:
        engine.step()
        for request in engine.roster.running:
            check_caches(engine, request)
            stats = request.stats
            outcomes.add((stats.accepted > 0, stats.accepted < stats.verified))
    assert (True, True) in outcomes  # drafts were kept, and drafts were rejected


def test_the_check_sees_a_rejected_token(tiny):
    """Control: a cache that is one token off is not taken for the right one."""
    target = tiny.make_target(dtype=torch.float64)
    engine = Engine(target, distracted_drafter(tiny, target), max_requests=1, max_length=60)
    engine.add(Request((1, 2, 3, 4), SamplingParams(30)))
    for _ in range(4):
        engine.step()
    [request] = engine.roster.running
    check_caches(engine, request)
    request.tokens[-2] = (request.tokens[-2] + 1) % 64
    with pytest.raises(AssertionError, match="not close"):
        check_caches(engine, request)


def test_a_drafter_sees_every_committed_row_once_and_no_rejected_one(tiny):
    """Drafters that fold rows into a state could not take a rejected one back."""
    target = tiny.make_target(dtype=torch.float64)
    drafter = distracted_drafter(tiny, target)
    seen, following, observe = {}, {}, drafter.observe

    def spy(context, batch, features_TF, next_tokens_T):
        assert len(features_TF) == len(batch.positions_T) == len(next_tokens_T)
        for segment, offset in zip(batch.segments, batch.offsets, strict=False):
            rows = slice(offset, offset + segment.length)
            seen.setdefault(segment.table, []).extend(batch.positions_T[rows].tolist())
            following.setdefault(segment.table, []).extend(next_tokens_T[rows].tolist())
        observe(context, batch, features_TF, next_tokens_T)

    drafter.observe = spy
    engine = Engine(target, drafter, max_requests=2, max_length=40)
    for tokens in ((1, 2, 3), (4, 5)):
        engine.add(Request(tokens, SamplingParams(20, temperature=1.0, seed=tokens[0])))
    for _ in range(4):
        engine.step()
        engine._speculator.context.flush()
        for request in engine.roster.running:
            assert seen[request.table] == list(range(request.cached))
            assert following[request.table] == request.tokens[1:]
    verified, accepted = (
        sum(getattr(request.stats, name) for request in engine.roster.running)
        for name in ("verified", "accepted")
    )
    assert 0 < accepted < verified
