"""Draft trees in the engine: plain decoding's own output, whatever is drafted and who else runs."""

from __future__ import annotations

import pytest
import torch

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch
from dspark.engine import round as rounds
from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.engine.speculation.trees import draft
from dspark.errors import CompatibilityError, UsageError
from dspark.request import Request, SamplingParams
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_eagle3
from tests.helpers.targets import tiny_qwen3

DEPTH = 5


@pytest.fixture(scope="module")
def drafter(tiny, target):
    """One that is often right, so that paths of several nodes stay."""
    return tiny.make_drafter(target, block_size=DEPTH)


@pytest.fixture(scope="module", params=["lattice", "levels"])
def helpful(tiny, target, request):
    """A drafter that knows the target's own next tokens, and swaps the best two at times.

    So the tree's path that stays is often not its first.
    """
    levels = request.param == "levels"
    own = tiny.make_eagle3(target) if levels else tiny.make_drafter(target, block_size=DEPTH)
    return (HelpfulLevels if levels else HelpfulLattice)(target, own)


class HelpfulDrafter:
    """A drafter in whose logits the target's own greedy continuation is raised."""

    def __init__(self, target, drafter):
        self.target, self.drafter = target, drafter

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def raised(self, line):
        """The target's next token, and by how much it is raised."""
        last = torch.tensor([len(line) - 1])
        logits_V = self.target.forward(RaggedBatch.fresh([line]), logit_rows=last).logits_NV[0]
        # Only the likelier of two, when the line so far is odd: a second child then stays.
        own = int(logits_V.argmax())
        return own, 9.0 if (sum(line) + own) % 3 else 4.0


class HelpfulLattice(HelpfulDrafter):
    """Gives a lattice."""

    def check_lattice(self):
        pass

    def lattice(self, context, batch, candidates, parents):
        found = self.drafter.lattice(context, batch, candidates, parents)
        for r, tokens in enumerate(batch.tokens):
            line = list(tokens)
            for k in range(batch.num_drafts):
                own, bonus = self.raised(line)
                line.append(own)
                found.logits_RKPC[r, k, :, found.tokens_RKC[r, k] == own] += bonus
        return found


class HelpfulLevels(HelpfulDrafter):
    """Drafts level by level."""

    def check_levels(self):
        pass

    def levels(self, context, batch, expand):
        lines = [[list(tokens)] for tokens in batch.tokens]

        def helped(logits_NC, tokens=None):
            for n, line in enumerate(line for own in lines for line in own):
                own, bonus = self.raised(line)
                logits_NC[n, own] += bonus
            nodes = expand(logits_NC, tokens)
            for r, level in enumerate(nodes):
                lines[r] = [[*lines[r][row], token] for row, token in level]
            return nodes

        self.drafter.levels(context, batch, helped)


def requests_of(tiny, temperature=0.0, count=4, **params):
    prompts = tiny.make_prompts(count, 64)
    return tiny.make_requests(
        prompts, max_new_tokens=18, temperature=temperature, ignore_eos=True, **params
    )


def costs():
    points = tuple(
        CostPoint(tokens, requests, 4.0 + 2.0 * (tokens // 24), 0.1)
        for requests in (1, 4, 8)
        for tokens in sorted({requests, *range(max(requests, 8), 17 * requests + 1, 8)})
    )
    return CostTable(points, MachineKey("test", 1, "float32", "tiny", "tiny"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("nodes", [1, 16])
@pytest.mark.parametrize("kind", ["dspark", "eagle3", "mtp"])
def test_output_is_plain_decodings_own(tiny, target, drafter, kind, nodes, temperature):
    if kind != "dspark":
        drafter = tiny.make_eagle3(target, mtp=kind == "mtp", std=0.02)
    requests = requests_of(tiny, temperature)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    for max_requests in (1, 3):
        outputs = tiny.decode(
            target,
            drafter,
            requests,
            tree_nodes=nodes,
            max_requests=max_requests,
            verifier="coupled",
            strict=True,
        )
        assert tiny.token_ids(outputs) == plain
        assert sum(output.stats.accepted for output in outputs) > 0


@pytest.mark.parametrize("schedule", ["auto", "prefix", "lagged", "lookahead"])
def test_under_every_schedule(tiny, target, helpful, schedule):
    requests = requests_of(tiny)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    weighing = Scheduler(Schedule(schedule), "block", 16, None, costs(), tree_depth=DEPTH)
    outputs = tiny.decode(
        target, helpful, requests, tree_nodes=16, schedule=weighing, max_requests=4, strict=True
    )
    assert tiny.token_ids(outputs) == plain
    stats = [output.stats for output in outputs]
    assert sum(s.accepted for s in stats) > 0
    if schedule == "lagged":
        assert sum(s.verified for s in stats) < sum(s.drafted for s in stats)


def watched(target, drafter, requests, **options):
    """Outputs, and the records of all rounds."""
    records = []
    engine = Engine(target, drafter, max_length=96, watch=records.append, strict=True, **options)
    return engine.run(requests), records


def test_paths_beside_the_first_stay_and_their_rows_are_moved(tiny, target, helpful):
    requests = requests_of(tiny)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    outputs, records = watched(target, helpful, requests, tree_nodes=16, max_requests=4)
    assert tiny.token_ids(outputs) == plain
    moved = 0
    for record in records:
        if record.parents is None:
            continue
        for parents, drafts, committed, kept in zip(
            record.parents, record.drafts, record.committed, record.accepted, strict=True
        ):
            assert len(parents) <= len(drafts)
            node, path = -1, []
            for token in committed[:kept]:
                [node] = [n for n, p in enumerate(parents) if p == node and drafts[n] == token]
                path.append(node)
            moved += path != list(range(kept))
    assert moved > 4
    stats = [output.stats for output in outputs]
    assert sum(s.tokens for s in stats) > 1.8 * sum(s.rounds for s in stats)
    assert all(len(s.offered) <= DEPTH for s in stats)


def test_control_rows_that_are_not_moved(tiny, target, helpful, monkeypatch):
    requests = requests_of(tiny)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    monkeypatch.setattr(rounds, "compact", lambda *_: None)
    outputs = tiny.decode(target, helpful, requests, tree_nodes=16)
    assert tiny.token_ids(outputs) != plain


def test_control_positions_by_index(tiny, target, helpful, monkeypatch):
    requests = requests_of(tiny)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    right = rounds.with_trees

    def indexed(batch, parents):
        found = right(batch, parents)
        found.positions_T.copy_(batch.positions_T)
        return found

    monkeypatch.setattr(rounds, "with_trees", indexed)
    outputs = tiny.decode(target, helpful, requests, tree_nodes=16)
    assert tiny.token_ids(outputs) != plain


def test_windows_limits_stops_processors_and_logprobs(tiny, target, helpful):
    prompts = tiny.make_prompts(6, 64, seed=3)
    kinds = (
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"stop_token_ids": tuple(range(0, 64, 7))},
        {"logprobs": 2, "repetition_penalty": 1.4, "presence_penalty": 0.5},
        {"logit_bias": {7: 4.0, 9: float("-inf")}, "logprobs": 0},
        {"top_k": 3},
    )
    for temperature in (0.0, 0.9):
        requests = [
            Request(tuple(p), SamplingParams(**{"max_new_tokens": 20, "seed": i, **kind}))
            for i, (p, kind) in enumerate(zip(prompts, kinds, strict=True))
        ]
        requests = [
            Request(r.prompt_ids, r.params.__class__(**{**vars_of(r), "temperature": temperature}))
            for r in requests
        ]
        options = {"max_requests": 3, "verifier": "coupled"}
        plain = tiny.decode(target, None, requests, **options)
        outputs = tiny.decode(target, helpful, requests, tree_nodes=12, strict=True, **options)
        assert tiny.token_ids(outputs) == tiny.token_ids(plain)
        for ours, theirs in zip(outputs, plain, strict=True):
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            for a, b in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
                assert a.token_id == b.token_id
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def vars_of(request):
    names = ("max_new_tokens", "seed", "stop_token_ids", "logprobs", "repetition_penalty")
    more = ("presence_penalty", "logit_bias", "top_k")
    return {name: getattr(request.params, name) for name in (*names, *more)}


def test_a_target_with_windows(tiny):
    model = tiny_qwen3(
        seed=5,
        vocab_size=64,
        num_hidden_layers=2,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=96,
    )
    target = Target.from_model(model, name="windows")
    helpful = HelpfulLattice(target, tiny.make_drafter(target, block_size=DEPTH))
    requests = requests_of(tiny, count=4)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    outputs = tiny.decode(target, helpful, requests, tree_nodes=16, max_requests=2, strict=True)
    assert tiny.token_ids(outputs) == plain


def test_pages_are_shared_and_given_up_as_with_chains(tiny, target, helpful):
    """A cache so small that requests give their pages up, and prompts that share a beginning."""
    shared = list(range(20))
    prompts = [[*shared, *own] for own in tiny.make_prompts(4, 64, longest=5)]
    requests = tiny.make_requests(prompts, max_new_tokens=18, ignore_eos=True)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    outputs = tiny.decode(
        target, helpful, requests, tree_nodes=12, cache_tokens=128, max_requests=4, strict=True
    )
    assert tiny.token_ids(outputs) == plain


def test_drafts_of_nan_are_not_sent(tiny, target, drafter, monkeypatch):
    requests = requests_of(tiny, count=4)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    lattice = drafter.lattice

    def broken(context, batch, candidates, parents):
        found = lattice(context, batch, candidates, parents)
        if len(batch.lengths) > 1:  # that no request has a draft would be a fault
            found.logits_RKPC[0, 0] = float("nan")
        return found

    monkeypatch.setattr(drafter, "lattice", broken)
    outputs = tiny.decode(target, drafter, requests, tree_nodes=8, max_requests=4)
    assert tiny.token_ids(outputs) == plain


def test_levels_of_nan_are_not_sent(tiny, target, monkeypatch):
    """The second level of one request is broken; the others draft on."""
    drafter = tiny.make_eagle3(target, std=0.02)
    levels, spoiled = drafter.levels, []

    def broken(context, batch, expand):
        sizes = []

        def second(logits_NC, tokens=None):
            sizes.append(len(logits_NC))
            if len(sizes) == 2 and len(batch.lengths) > 1:
                logits_NC[0] = float("nan")
                spoiled.append(batch.tokens)
            return expand(logits_NC, tokens)

        levels(context, batch, second)

    monkeypatch.setattr(drafter, "levels", broken)
    for temperature, verifier in ((0.0, "block"), (1.0, "coupled")):
        options = {"max_requests": 4, "verifier": verifier}
        requests = requests_of(tiny, temperature, count=4)
        plain = tiny.token_ids(tiny.decode(target, None, requests, **options))
        outputs = tiny.decode(target, drafter, requests, tree_nodes=16, **options)
        assert tiny.token_ids(outputs) == plain
        assert sum(output.stats.accepted for output in outputs) > 0
    outputs = tiny.decode(
        target, drafter, requests_of(tiny, 1.0, count=4), tree_nodes=8, max_requests=4
    )
    assert all(len(output.token_ids) == 18 for output in outputs)
    assert len(spoiled) > 10


def of_fresh_context(target, drafter, tokens):
    """The drafter's first logits where all but the last token have just been read."""
    page = PagedCache(drafter.context_shapes, 6)
    table = BlockTable(range(6))
    batch = RaggedBatch.build([(table, 0, tokens[:-1])])
    read = target.forward(batch, PagedCache(target.cache_shapes, 6), taps=drafter.taps)
    drafter.observe(page, batch, read.features_TF, torch.tensor(tokens[1:]))
    found = []

    def draw(step, logits_RC, tokens=None):
        found.append(logits_RC)
        return logits_RC.argmax(dim=1)

    anchor = torch.tensor(tokens[-1:])
    drafter.propose(page, DraftBatch((table,), anchor, (len(tokens) - 1,), (tokens,), 1), draw)
    return found[0][0]


@pytest.mark.parametrize("wrong", [False, True])
def test_context_rows_after_rounds_of_trees_are_those_of_a_fresh_reading(
    tiny, target, monkeypatch, wrong
):
    """Of Eagle3, whose rows hold the features of the path that stayed; a control leaves others."""
    if wrong:
        monkeypatch.setattr(rounds, "in_order_of_paths", lambda *_: None)
    drafter = HelpfulLevels(target, tiny.make_eagle3(target))
    own, differences = drafter.drafter, []
    levels = own.levels

    def watched_levels(context, batch, expand):
        first = []

        def seen(logits_NC, tokens=None):
            if not first:
                first.append(logits_NC.clone())
            return expand(logits_NC, tokens)

        levels(context, batch, lambda logits, tokens=None: seen(logits, tokens))
        for r, tokens in enumerate(batch.tokens):
            fresh_C = of_fresh_context(target, own, list(tokens))
            differences.append(float((first[0][r] - fresh_C).abs().max()))

    monkeypatch.setattr(own, "levels", watched_levels)
    tiny.decode(target, drafter, requests_of(tiny, count=3), tree_nodes=12, strict=True)
    assert len(differences) > 10
    assert (max(differences) > 1e-2) if wrong else (max(differences) < 1e-4)


def test_what_cannot_draft_trees_is_refused(tiny, target, drafter):
    with pytest.raises(UsageError, match="at least 1"):
        Engine(target, drafter, tree_nodes=0)
    with pytest.raises(UsageError, match="Eagle3 or MTP"):
        Engine(target, tiny.ngram(target), tree_nodes=8)
    with pytest.raises(CompatibilityError, match="P-EAGLE"):
        Engine(target, tiny_eagle3(target, taps=(-1, 0), mask_token_id=3), tree_nodes=8)
    with pytest.raises(CompatibilityError, match="one token back"):
        Engine(target, tiny.make_drafter(target, head="rnn"), tree_nodes=8)
    with pytest.raises(UsageError, match="threshold"):
        Engine(target, drafter, tree_nodes=8, schedule=Schedule("threshold", 0.5))
    assert draft.check_trees(8, drafter, target, "fixed") is drafter
