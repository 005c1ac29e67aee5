"""Verification of trees: the path that stays, and the token after it.

Where a draft stays while it is the target's own token, the path follows these tokens as long as
there is a child of the name. Elsewhere the children of a node are tested in the order in which they
were drawn, by recursive rejection (`sampling.recursive_rejection`), whatever the verifier's rule
for a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.engine.requests.logprobs import logprobs_of
from dspark.engine.speculation.rows import compute_rows
from dspark.engine.speculation.sampling_state import Kind, RoundState
from dspark.engine.speculation.trees.forest import Forest
from dspark.engine.speculation.verify import Verdict, of_the_target
from dspark.errors import DSparkError, NumericsError
from dspark.request import Logprob
from dspark.sampling.distribution import Distribution, Sparse
from dspark.sampling.logits_processors import greedy_tokens, token_distribution
from dspark.sampling.recursive_rejection import judge
from dspark.sampling.verification import coupled_tokens


def verify_trees(logits_NV: Tensor, forest: Forest, state: RoundState) -> Verdict:
    """Decide which path of each tree stays and draw the token after it.

    Rows without a distribution are treated as in `verify`: the walk ends there.

    Args:
        logits_NV: the target's logits of every request's anchor and nodes, request by request.
        forest: what was verified.
        state: of the R requests.
    """
    count = len(forest.trees)
    committed, paths = list[Sequence[int]]([()] * count), list[Sequence[int]]([()] * count)
    ends, broken, void = dict[int, DSparkError](), set[int](), set[int]()
    begins = [0]
    for tree in forest.trees:
        begins.append(begins[-1] + 1 + len(tree))
    mask_NV, faults = None, dict[int, DSparkError]()
    if state.masks is not None:
        prefixes = [(r, path) for r, tree in enumerate(forest.trees) for path in tree.paths()]
        mask_NV, faults = state.masks.rows(prefixes)
    for kind, (requests_M, own) in state.groups().items():
        numbers = requests_M.tolist()
        rows = [n for r in numbers for n in range(begins[r], begins[r + 1])]
        own_forest, own_NV, own_mask_NV = forest, logits_NV, mask_NV
        if len(numbers) < count:
            rows_M = torch.tensor(rows, device=logits_NV.device)
            own_forest, own_NV = forest.rows(numbers), logits_NV[rows_M]
            own_mask_NV = None if mask_NV is None else mask_NV[rows_M]
        own_faults = {i: faults[n] for i, n in enumerate(rows) if n in faults}
        walk = _Walk.of(kind, own_NV, own_forest, own, own_mask_NV, own_faults)
        for i, request in enumerate(numbers):
            path, token = walk.outcome(i)
            tree, fault = forest.trees[request], walk.fault(i, path)
            tokens = [tree.tokens[node] for node in path]
            if fault is None:
                committed[request], paths[request] = [*tokens, token], path
            elif isinstance(fault, NumericsError) and len(tree):
                void.add(request)
            else:
                committed[request], paths[request] = tokens, path
                ends[request] = of_the_target(fault)
            if walk.is_broken(i):
                broken.add(request)
    return Verdict(
        committed,
        [len(path) for path in paths],
        _logprobs(logits_NV, begins, committed, paths, state.sampling.logprobs),
        ends,
        frozenset(broken),
        frozenset(void),
        paths,
    )


@dataclass(frozen=True)
class _Walk:
    """The requests of one kind, ready to be walked from the anchor on.

    Attributes:
        forest: their trees.
        begins: row of each request's anchor.
        children: of each request, of the anchor and of each node.
        faults: of rows.
        tokens_N: the target's own token of each row, where drafts are judged by these.
        kept: per row, whether the node's test is passed; elsewhere.
        drawn: the token after each row if its path ends there; of the rows that can be ends.
    """

    forest: Forest
    begins: Sequence[int]
    children: Sequence[Sequence[Sequence[int]]]
    faults: dict[int, DSparkError]
    tokens_N: Sequence[int] | None
    judged: _Judged | None

    @classmethod
    def of(
        cls,
        kind: Kind,
        logits_NV: Tensor,
        forest: Forest,
        state: RoundState,
        mask_NV: Tensor | None,
        faults: dict[int, DSparkError],
    ) -> _Walk:
        """Everything that is computed for all rows at once."""
        device, sampling = logits_NV.device, state.sampling
        sizes = [1 + len(tree) for tree in forest.trees]
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        request_N = torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)], device=device)
        depths = [d for tree in forest.trees for d in (0, *tree.depths)]
        depth_N = torch.tensor(depths, device=device)
        plain = sampling.chain.greedy and sampling.chain.plain
        chain_N = sampling.chain if plain else sampling.chain.rows(request_N)
        counts_N = sampling.counts
        if counts_N is not None:
            own = counts_N.rows(request_N)
            drafts_NK = _padded([path for tree in forest.trees for path in tree.paths()], device)
            counts_N = own.after_drafts(
                torch.arange(len(depths), device=device), depth_N, drafts_NK
            )
        children = [tree.children() for tree in forest.trees]
        if kind.form == "greedy":
            own_N = compute_rows(greedy_tokens, logits_NV, chain_N, counts_N, mask_NV, faults)
            return cls(forest, begins, children, faults, own_N.tolist(), None)
        found = compute_rows(token_distribution, logits_NV, chain_N, counts_N, mask_NV, faults)
        if kind.verifier == "coupled":
            positions_N = state.anchors_R[request_N] + depth_N + 1
            own_N = coupled_tokens(found, sampling.seeds_R[request_N], positions_N)
            return cls(forest, begins, children, faults, own_N.tolist(), None)
        judged = _Judged.of(found, forest, children, state)
        return cls(forest, begins, children, faults, None, judged)

    def outcome(self, request: int) -> tuple[list[int], int]:
        """The path that stays, and the token after it."""
        path, node = list[int](), -1
        begin, children = self.begins[request], self.children[request]
        tree = self.forest.trees[request]
        while begin + node + 1 not in self.faults:
            stays = self._stays(request, begin, node, children[node + 1], tree.tokens)
            if stays is None:
                break
            path.append(stays)
            node = stays
        row = begin + node + 1
        if row in self.faults:
            return path, 0
        if self.tokens_N is not None:
            return path, self.tokens_N[row]
        assert self.judged is not None
        return path, self.judged.next_token(request, row, len(path))

    def _stays(
        self,
        request: int,
        begin: int,
        node: int,
        children: Sequence[int],
        tokens: Sequence[int],
    ) -> int | None:
        """The child of a node that stays."""
        if self.tokens_N is not None:
            own = self.tokens_N[begin + node + 1]
            return next((child for child in children if tokens[child] == own), None)
        assert self.judged is not None
        return next((c for c in children if self.judged.passed[request][c]), None)

    def fault(self, request: int, path: Sequence[int]) -> DSparkError | None:
        """What is wrong with the row where the path ends."""
        node = path[-1] if path else -1
        return self.faults.get(self.begins[request] + node + 1)

    def is_broken(self, request: int) -> bool:
        """Whether any row of a request was no numbers."""
        begin = self.begins[request]
        rows = range(begin, begin + 1 + len(self.forest.trees[request]))
        return any(isinstance(self.faults.get(row), NumericsError) for row in rows)


@dataclass(frozen=True)
class _Judged:
    """Tests of all nodes, and what they leave of the distributions that their parents have.

    Attributes:
        found: the target's distributions.
        passed: per request and node, whether it stays if it is tested.
        lost: what the children of a row take from it where none stays; None without children.
        place: of each row in `lost`.
        state: gives the uniform numbers.
    """

    found: Distribution
    passed: Sequence[Sequence[bool]]
    lost: Sparse | None
    place: dict[int, int]
    state: RoundState

    @classmethod
    def of(
        cls,
        found: Distribution,
        forest: Forest,
        children: Sequence[Sequence[Sequence[int]]],
        state: RoundState,
    ) -> _Judged:
        """Judge the children of every row that has some."""
        device = found.probs_NC.device
        rows, laws, columns, owners = list[int](), list[tuple[int, ...]](), list[list[int]](), []
        begin = 0
        for r, tree in enumerate(forest.trees):
            for node, own in enumerate(children[r], start=-1):
                if own:
                    slot, law = (0, 0) if node < 0 else (tree.depths[node], tree.rows[node])
                    rows.append(begin + node + 1)
                    laws.append((r, slot, law))
                    columns.append([tree.columns[child] for child in own])
                    owners.append((r, own))
            begin += 1 + len(tree)
        passed = [[False] * len(tree) for tree in forest.trees]
        if not rows:
            return cls(found, passed, None, {}, state)
        assert forest.law_DKPC is not None
        rows_N, laws_N3 = torch.tensor(rows, device=device), torch.tensor(laws, device=device)
        request_N, slot_N, law_N = laws_N3.unbind(1)
        shared = forest.tokens_DKTC.shape[2] == 1
        tokens_NC = forest.tokens_DKTC[request_N, slot_N, 0 if shared else law_N]
        q_NC = forest.law_DKPC[request_N, slot_N, law_N]
        p_NC = found.at(rows_N, tokens_NC).double()
        rest_N = _masses(found, rows_N) - p_NC.sum(dim=1)
        keep_NB, left_NC = judge(p_NC, rest_N, q_NC, _padded(columns, device, -1))
        most = max(map(len, forest.trees))
        tests = state.verify_uniforms(most).tolist()
        for (r, own), keeps in zip(owners, keep_NB.tolist(), strict=True):
            for child, keep in zip(own, keeps, strict=False):
                passed[r][child] = tests[r][child] <= keep
        lost_NC = (p_NC - left_NC).to(found.probs_NC.dtype)
        lost = Sparse(lost_NC, found.vocab_size, tokens_NC)
        return cls(found, passed, lost, {row: n for n, row in enumerate(rows)}, state)

    def next_token(self, request: int, row: int, depth: int) -> int:
        """The token after a row of whose children none stays."""
        device = self.found.probs_NC.device
        row_1 = torch.tensor([row], device=device)
        if self.lost is None or row not in self.place:
            law = self.found.rows(row_1)
        else:
            one_1 = torch.ones(1, dtype=self.found.probs_NC.dtype, device=device)
            place_1 = torch.tensor([self.place[row]], device=device)
            law = self.found.excess(row_1, self.lost, place_1, one_1)
        return int(law.draw(self.state.next_uniforms[request, depth][None]))


def _masses(found: Distribution, rows_N: Tensor) -> Tensor:
    return found.rows(rows_N).mass()


def _padded(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Tensor:
    width = max(map(len, rows), default=0)
    filled = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device).view(len(rows), width)


def _logprobs(
    logits_NV: Tensor,
    begins: Sequence[int],
    committed: Sequence[Sequence[int]],
    paths: Sequence[Sequence[int]],
    wanted: Sequence[int | None],
) -> tuple[tuple[Logprob, ...] | None, ...]:
    """Of every committed token, from the row of its parent."""
    if all(count is None for count in wanted):
        return ()
    found = list[tuple[Logprob, ...] | None]()
    for begin, tokens, path, count in zip(begins, committed, paths, wanted, strict=False):
        rows = [begin, *(begin + 1 + node for node in path)][: len(tokens)]
        rows_MV = logits_NV[torch.tensor(rows, dtype=torch.int64, device=logits_NV.device)]
        found.append(None if count is None else logprobs_of(rows_MV, tokens, count))
    return tuple(found)
