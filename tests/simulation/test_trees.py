"""Draft trees in the simulation: what a record of whole trees says of smaller ones."""

from dataclasses import replace

import numpy as np
import pytest

import dspark
from dspark.data.conversations import Prompt
from dspark.engine.speculation.round_record import Spent
from dspark.engine.speculation.schedule import Schedule
from dspark.evaluation.evaluate import evaluate, settings_of
from dspark.evaluation.records import RunRecords, TreeRound
from dspark.evaluation.tasks import Question, Task
from dspark.scheduling.cost_table import CostPoint, CostTable
from dspark.simulation.acceptance_source import of_records
from dspark.simulation.arrivals import Arrivals
from dspark.simulation.decisions import Decisions
from dspark.simulation.fleet import Fleet, closed_loop
from dspark.simulation.jobs import Job
from dspark.simulation.server import Limits, Way
from dspark.simulation.trees import Trees, first_children, trees_behind

DEPTH = 4


def a_tree(generator, nodes):
    """A tree, and a path from its anchor that may end anywhere."""
    parents, depths = [], []
    while len(parents) < nodes:
        parent = int(generator.integers(-1, len(parents)))
        depth = 1 + (depths[parent] if parent >= 0 else 0)
        if depth <= DEPTH:
            parents.append(parent)
            depths.append(depth)
    path, end = [], -1
    while (children := [n for n, p in enumerate(parents) if p == end]) and generator.random() < 0.8:
        end = int(generator.choice(children))
        path.append(end)
    survival = np.sort(generator.random(nodes))[::-1]
    return TreeRound(tuple(parents), tuple(survival.tolist()), tuple(path))


def obvious(tree, start, budget):
    """Drafts kept where the first `budget` nodes behind path node `start` are verified."""
    root = tree.path[start - 1] if start else -1
    inside = [root]
    for node, parent in enumerate(tree.parents):
        if parent in inside:
            inside.append(node)
    verified, kept = set(inside[1 : 1 + budget]), 0
    for node in tree.path[start:]:
        if node not in verified:
            break
        kept += 1
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_smaller_trees_keep_what_lies_within_them(seed):
    generator = np.random.default_rng(seed)
    rounds = [a_tree(generator, int(n)) for n in generator.integers(0, 12, 5)]
    found = Trees.of([trees_behind(rounds, DEPTH)], DEPTH)
    token = 0
    for tree in rounds:
        for start in range(len(tree.path) + 1):
            for budget in range(found.nodes + 1):
                assert found.kept(np.array([token]), [budget]) == [obvious(tree, start, budget)]
            token += 1
    assert token == len(found.path_TK)
    assert (np.diff(found.survival_TM, axis=1) <= 0).all()


def test_a_chain_is_the_first_children():
    tree = TreeRound((-1, 0, 0, 1, 2), (0.9, 0.5, 0.3, 0.2, 0.1), (0, 2, 4))
    assert first_children(tree.parents) == [0, 1, 3]
    # Node 2 is a second child; node 4 is the first of its parent; the last token ends the round.
    assert trees_behind([tree], DEPTH).first_T.tolist() == [True, False, True, True]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Records of the bundled pair with trees of 6 nodes."""
    model = dspark.load("bundled", dtype="float32", weights="plain")
    texts = ("What is 12 times 7?", "Tom has 3 apples and buys 5 more. How many has he?")
    prompts = [Prompt(({"role": "user", "content": text},), text) for text in texts]
    questions = tuple(Question(str(i), prompt) for i, prompt in enumerate(prompts))
    settings = settings_of(
        model, "bundled", "d", "d", max_new_tokens=32, tree_nodes=6, batch_size=2
    )
    out = tmp_path_factory.mktemp("evaluation")
    run = evaluate(model, settings, [Task("a", "x", questions, "", 2)], out)
    read = RunRecords.load(run.path)
    assert read.records == run.records
    return read


def test_recorded_trees_are_played_again_round_by_round(recorded, costs):
    turns = [record.turns[0] for record in recorded.records.values()]
    assert any(tree.path != first_children(tree.parents) for t in turns for tree in t.trees)
    profile = of_records(recorded)
    assert profile.trees.nodes == 6
    dear = tuple(CostPoint(r + n, r, 10.0 + r + n, 3.0) for r in (1, 8) for n in (0, r, 6 * r))
    tree_costs = CostTable(dear, costs.machine)
    way = Way("trees", costs, profile, Schedule("fixed"), tree_costs=tree_costs)
    for stream, turn in enumerate(turns):
        rounds = len(turn.kept) - turn.cut
        tokens = 1 + sum(turn.kept[:rounds]) + rounds
        arrivals = Arrivals(*(np.array([each]) for each in (0.0, 8, tokens, stream)))
        run = closed_loop(way, arrivals, Fleet(Limits(1)), 1)
        counts = run.servers[0].counts
        assert counts.rounds == rounds
        assert counts.busy_s == pytest.approx((13 + rounds * (17 + 3 + 1)) / 1e3)


def test_trees_are_chosen_where_they_are_faster(recorded, costs):
    """Where nodes are free trees make more tokens than chains; where they are dear they do not."""
    profile = of_records(recorded)
    requests = Arrivals(np.zeros(12), np.full(12, 8), np.full(12, 200), np.arange(12) % 2)

    def speed(node_ms, tree_ms, *, trees):
        points = tuple(
            CostPoint(r + n, r, 10 + node_ms * (r + n), 2.0) for r in (1, 2) for n in (0, r, 6 * r)
        )
        table = replace(costs, points=points)
        dearer = tuple(replace(point, draft_ms=tree_ms) for point in points)
        tree_costs = replace(costs, points=dearer) if trees else None
        way = Way("trees", table, profile, Schedule("lagged"), tree_costs=tree_costs)
        run = closed_loop(way, requests, Fleet(Limits(1)), 1)
        return run.tokens / run.seconds

    assert speed(0.01, 2.0, trees=True) > 1.03 * speed(0.01, 2.0, trees=False)
    assert speed(0.01, 30.0, trees=True) > 0.97 * speed(0.01, 2.0, trees=False)


def test_chains_draft_where_trees_pause(recorded, costs, monkeypatch):
    profile = of_records(recorded)
    dear = tuple(CostPoint(r + n, r, 10.0 + r + n, 3.0) for r in (1, 2) for n in (0, r, 6 * r))
    decisions = Decisions(Schedule("auto"), costs, profile, CostTable(dear, costs.machine))
    monkeypatch.setattr(decisions._choice, "decide", lambda *_: True)
    jobs = [Job(i, 8, 40, 0.0, i) for i in range(2)]
    for job in jobs:
        job.ready = job.drafts = True

    def play(rounds):
        seen = set()
        for _ in range(rounds):
            decisions._held.clear()
            made = decisions.decide(jobs, [], np.zeros(2, np.int64))
            drafted = sum(made.lengths)
            decisions.learn([0, 0], Spent(2 + drafted, float(drafted > 0), 0.0, 10.0))
            seen |= {made.tree} if drafted else set()
        return seen

    assert True in play(12)
    monkeypatch.setattr(decisions._trees[0], "limits", lambda _, most: [0] * len(most))
    assert play(12) == {False}
