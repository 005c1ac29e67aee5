"""Attention of a row must not change a bit with what else is in the batch."""

import pytest
import torch

from dspark.attention.backends import Rule, cached_attention
from dspark.attention.choice import choose_attention
from dspark.attention.invariant import KEY_BLOCK, QUERY_ROWS, invariant_attention
from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.attention.varlen import VarlenAttention
from dspark.errors import UsageError

HEADS, GROUPS, DIM = 4, 2, 16
LENGTHS = (150, 70, 7)
# Pages of four tokens: backwards, in order, and apart.
PAGE = 4
TABLES = [BlockTable(pages, PAGE) for pages in (range(62, 24, -1), range(2, 20), (1, 21, 70))]
RULES = {
    "plain": Rule(0.3),
    "window": Rule(0.3, window=40),
    "narrow window": Rule(0.3, window=3),
    "sinks": Rule(0.3, window=40, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "softcap": Rule(0.3, softcap=2.0),
    "first": Rule(0.3, first=2),
}


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def setting(request):
    """Queries of three requests, and a cache that holds all their keys."""
    generator = torch.Generator().manual_seed(4)

    def noise(*sizes):
        return torch.randn(sizes, generator=generator).to(request.param)

    cache = PagedCache([CacheShape(GROUPS, DIM, DIM)], 71, PAGE, request.param)
    rows = cache.rows
    cache.write(0, torch.arange(rows), noise(rows, GROUPS, DIM), noise(rows, GROUPS, DIM))
    return [noise(length, HEADS, DIM) for length in LENGTHS], cache


def attend(function, setting, parts, rule):
    """Rows start:end of requests, `(request, start, end)`; [T, A, D]."""
    queries, cache = setting
    batch = RaggedBatch.build([(TABLES[r], start, range(end - start)) for r, start, end in parts])
    rows_TAD = torch.cat([queries[r][start:end] for r, start, end in parts])
    return function(rows_TAD.transpose(0, 1)[None], cache, 0, batch, rule)[0].transpose(0, 1)


def one_by_one(setting, rule):
    return [
        torch.cat(
            [
                attend(invariant_attention, setting, [(r, i, i + 1)], rule)
                for i in range(rule.first, n)
            ]
        )
        for r, n in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_row_is_the_same_alone_in_a_chunk_and_beside_others(setting, rule):
    alone = one_by_one(setting, rule)
    whole = [(r, rule.first, n) for r, n in enumerate(LENGTHS)]
    assert torch.equal(attend(invariant_attention, setting, whole, rule), torch.cat(alone))
    pieces = [(0, 61, 69), (2, 3, 7), (1, 69, 70), (0, 127, 150)]
    expected = torch.cat(
        [alone[r][start - rule.first : end - rule.first] for r, start, end in pieces]
    )
    assert torch.equal(attend(invariant_attention, setting, pieces, rule), expected)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_it_is_the_attention_that_all_others_compute(setting, rule):
    pieces = [(1, rule.first, 70), (0, 100, 150), (2, 6, 7)]
    got = attend(invariant_attention, setting, pieces, rule).float()
    expected = attend(cached_attention, setting, pieces, rule).float()
    limit = 1e-5 if setting[1].dtype == torch.float32 else 2e-2
    assert (got - expected).abs().max() < limit
    other = attend(cached_attention, setting, pieces, Rule(0.2, window=9)).float()
    assert (got - other).abs().max() > 10 * limit


def test_control_the_default_attention_does_change_with_the_batch(setting):
    whole = attend(cached_attention, setting, [(0, 0, 150)], RULES["plain"])
    alone = [attend(cached_attention, setting, [(0, i, i + 1)], RULES["plain"]) for i in range(150)]
    assert not torch.equal(whole, torch.cat(alone))


def test_keys_that_are_not_there_yet_do_not_matter(setting):
    """Rejected drafts leave keys behind a request's last row."""
    cache = setting[1]
    before = attend(invariant_attention, setting, [(0, 120, 130)], RULES["plain"])
    rows = torch.full((20, GROUPS, DIM), 50.0, dtype=cache.dtype)
    cache.write(0, torch.tensor(TABLES[0].rows(130, 150)), rows, rows)
    after = attend(invariant_attention, setting, [(0, 120, 130)], RULES["plain"])
    assert torch.equal(before, after)
    assert QUERY_ROWS <= KEY_BLOCK < 120


def test_it_is_what_plain_means_in_this_mode():
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "batch_invariant": True}
    shapes = [CacheShape(GROUPS, DIM, DIM)]
    for name in ("auto", "plain"):
        chosen = choose_attention(name, shapes, **options)
        assert (chosen.name, chosen.attend) == ("plain", invariant_attention)
    with pytest.raises(UsageError, match="'flex' cannot be batch-invariant"):
        choose_attention("flex", shapes, **options)
    with pytest.raises(UsageError, match="'varlen' cannot run on cpu"):
        choose_attention("varlen", shapes, **options)


def test_what_varlen_leaves_to_others_is_invariant_where_keys_are_not_split(setting):
    parts = [(0, 120, 130), (2, 3, 7)]
    for splits, expected in ((1, invariant_attention), (None, cached_attention)):
        got = attend(VarlenAttention(splits), setting, parts, RULES["softcap"])
        assert torch.equal(got, attend(expected, setting, parts, RULES["softcap"]))
