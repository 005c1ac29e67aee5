"""Verification of a round: which drafts stay, and the token after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from dspark.engine.requests.logprobs import emitted_logprobs
from dspark.engine.speculation.draft import Drafts
from dspark.engine.speculation.rows import compute_rows
from dspark.engine.speculation.sampling_state import Kind, RoundState
from dspark.errors import DSparkError, NumericsError
from dspark.request import Logprob
from dspark.sampling.distribution import Distribution
from dspark.sampling.logits_processors import greedy_tokens, token_distribution
from dspark.sampling.verification import (
    Blocks,
    Rule,
    accepted_by_identity,
    accepted_lengths,
    coupled_tokens,
    keep_probabilities,
    next_distribution,
)


@dataclass(frozen=True)
class Verdict:
    """What a round decided, per request.

    Attributes:
        committed: the kept drafts and the token after them, which a request with a fault lacks.
        accepted: how many of these are drafts.
        logprobs: of what is committed; None for requests that want none.
        faults: why a request, by number, has no token after its kept drafts.
        broken: requests with a row of NaN or infinite logits, whether they came to it or not.
        void: those of them that came to it with drafts behind it. A draft's keys of NaN reach the
            rows before it too (hidden keys enter products with weight 0), so nothing is known:
            nothing is committed, and the next round, without drafts, tells.
        paths: of draft trees, the nodes of each request that stay; empty for chains.
    """

    committed: Sequence[Sequence[int]]
    accepted: Sequence[int]
    logprobs: Sequence[tuple[Logprob, ...] | None] = ()
    faults: Mapping[int, DSparkError] = field(default_factory=dict)
    broken: frozenset[int] = frozenset()
    void: frozenset[int] = frozenset()
    paths: Sequence[Sequence[int]] = ()


def verify(logits_NV: Tensor, drafts: Drafts, state: RoundState) -> Verdict:
    """Decide what stays and draw the token after it.

    A row that has no distribution (the target gave no numbers, or the request's mask fails there)
    is the last that is looked at of its request. The drafts before it are verified as if no more
    had been sent, which is allowed, since a row depends on the drafts before it only; if all of
    them stay, the request has come to that row, and ends with its fault. The others never see it.

    Args:
        logits_NV: the target's logits of every request's last 1 + length rows, request by request.
        drafts: what was verified.
        state: of the R requests.
    """
    lengths, faults, mask_NV = drafts.lengths, dict[int, DSparkError](), None
    if state.masks is not None:
        mask_NV, faults = state.masks.rows(
            [(r, kept[:k]) for r, kept in enumerate(drafts.tokens) for k in range(len(kept) + 1)]
        )
    groups = state.groups()
    if len(groups) == 1:
        [(kind, (_rows, own))] = groups.items()
        verdict = _verify_kind(kind, logits_NV, drafts, own, mask_NV, faults)
    else:
        verdict = _verify_kinds(groups, logits_NV, drafts, mask_NV, faults)
    if any(count is not None for count in state.sampling.logprobs):
        found = emitted_logprobs(logits_NV, lengths, verdict.committed, state.sampling.logprobs)
        verdict = replace(verdict, logprobs=found)
    return verdict


def _verify_kinds(
    groups: Mapping[Kind, tuple[Tensor, RoundState]],
    logits_NV: Tensor,
    drafts: Drafts,
    mask_NV: Tensor | None,
    faults: Mapping[int, DSparkError],
) -> Verdict:
    """Judge the requests of each kind by themselves, which no request notices."""
    lengths = drafts.lengths
    begins = list(accumulate((1 + length for length in lengths), initial=0))
    committed, accepted = [list[Sequence[int]]([()] * len(lengths)), [0] * len(lengths)]
    ends, broken, void = dict[int, DSparkError](), set[int](), set[int]()
    for kind, (requests_M, state) in groups.items():
        numbers = requests_M.tolist()
        rows = [n for r in numbers for n in range(begins[r], begins[r + 1])]
        own = {i: faults[n] for i, n in enumerate(rows) if n in faults}
        rows_M = torch.tensor(rows, device=logits_NV.device)
        mask_MV = None if mask_NV is None else mask_NV[rows_M]
        found = _verify_kind(
            kind, logits_NV[rows_M], drafts.rows(kind, requests_M), state, mask_MV, own
        )
        for i, request in enumerate(numbers):
            committed[request], accepted[request] = found.committed[i], found.accepted[i]
        ends |= {numbers[i]: fault for i, fault in found.faults.items()}
        broken |= {numbers[i] for i in found.broken}
        void |= {numbers[i] for i in found.void}
    return Verdict(committed, accepted, faults=ends, broken=frozenset(broken), void=frozenset(void))


def _verify_kind(
    kind: Kind,
    logits_NV: Tensor,
    drafts: Drafts,
    state: RoundState,
    mask_NV: Tensor | None,
    faults: dict[int, DSparkError],
) -> Verdict:
    """Judge requests of one kind."""
    lengths, sampling = drafts.lengths, state.sampling
    table = _row_table(lengths, logits_NV.device)
    chain_N, counts_N = sampling.chain, sampling.counts
    if table.longest:
        if not (chain_N.greedy and chain_N.plain):  # what the plain argmax never looks at
            chain_N = sampling.chain_rows(lengths, table.request_N)
        if counts_N is not None:
            counts_N = counts_N.after_drafts(table.request_N, table.step_N, drafts.tokens_RK)
    tokens_N = found_N = None
    if kind.form == "greedy":
        tokens_N = compute_rows(greedy_tokens, logits_NV, chain_N, counts_N, mask_NV, faults)
    else:
        found_N = compute_rows(token_distribution, logits_NV, chain_N, counts_N, mask_NV, faults)
        if kind.verifier == "coupled":
            positions_N = state.anchors_R[table.request_N] + table.step_N + 1
            tokens_N = coupled_tokens(found_N, sampling.seeds_R[table.request_N], positions_N)
    ends = _first_faults(faults, lengths)
    if ends:
        known = [ends[r][0] if r in ends else length for r, length in enumerate(lengths)]
        table = replace(table, lengths_R=torch.tensor(known, device=logits_NV.device))
    if tokens_N is not None:
        verdict = _by_identity(tokens_N, table, drafts)
    else:
        assert found_N is not None
        verdict = _by_rejection(
            found_N, drafts.distributions.get(kind), table, drafts, state, _rule(kind)
        )
    return _with_faults(verdict, ends, faults, lengths) if ends else verdict


def _first_faults(
    faults: Mapping[int, DSparkError], lengths: Sequence[int]
) -> dict[int, tuple[int, DSparkError]]:
    """Of each request that has a row at fault: the first such row's step, and what is wrong."""
    found, begin = dict[int, tuple[int, DSparkError]](), 0
    for request, length in enumerate(lengths if faults else ()):
        steps = [step for step in range(length + 1) if begin + step in faults]
        if steps:
            found[request] = steps[0], faults[begin + steps[0]]
        begin += length + 1
    return found


def _with_faults(
    verdict: Verdict,
    ends: Mapping[int, tuple[int, DSparkError]],
    faults: Mapping[int, DSparkError],
    lengths: Sequence[int],
) -> Verdict:
    """Take back the token that was drawn from a row at fault."""
    committed, accepted = list(verdict.committed), list(verdict.accepted)
    reached, void = dict[int, DSparkError](), set[int]()
    for request, (step, fault) in ends.items():
        if accepted[request] != step:
            continue
        if isinstance(fault, NumericsError) and lengths[request]:
            committed[request], accepted[request] = (), 0
            void.add(request)
        else:
            committed[request] = committed[request][:-1]
            reached[request] = of_the_target(fault)
    owners = [request for request, length in enumerate(lengths) for _ in range(length + 1)]
    broken = {owners[row] for row, f in faults.items() if isinstance(f, NumericsError)}
    return Verdict(
        committed, accepted, faults=reached, broken=frozenset(broken), void=frozenset(void)
    )


def of_the_target(fault: DSparkError) -> DSparkError:
    """The fault as a request is told of it: numbers that are none come from the target."""
    if not isinstance(fault, NumericsError):
        return fault
    return NumericsError(
        "The target failed: its logits have NaN or no finite maximum; check the model's weights "
        "and dtype."
    )


@dataclass(frozen=True)
class _RowTable:
    """Where the ragged rows of R requests stand in a table of L = 1 + longest length columns.

    Attributes:
        request_N: request of each ragged row.
        step_N: drafts before each ragged row, within its request.
        row_RL: ragged row of (request, step); steps past a length repeat its last row.
        lengths_R: verified drafts.
        longest: the longest length.
    """

    request_N: Tensor
    step_N: Tensor
    row_RL: Tensor
    lengths_R: Tensor
    longest: int


@lru_cache(maxsize=256)
def _row_table(lengths: tuple[int, ...], device: torch.device) -> _RowTable:
    longest = max(lengths)
    request, step, table, row = list[int](), list[int](), list[list[int]](), 0
    for r, length in enumerate(lengths):
        request += [r] * (length + 1)
        step += range(length + 1)
        table.append([row + min(k, length) for k in range(longest + 1)])
        row += length + 1
    return _RowTable(
        request_N=torch.tensor(request, device=device),
        step_N=torch.tensor(step, device=device),
        row_RL=torch.tensor(table, device=device),
        lengths_R=torch.tensor(lengths, device=device),
        longest=longest,
    )


def _rule(kind: Kind) -> Rule:
    return "token" if kind.verifier == "token" else "block"


def _by_identity(own_N: Tensor, table: _RowTable, drafts: Drafts) -> Verdict:
    """Keep drafts while they are the target's own tokens."""
    own_RL = own_N[table.row_RL]
    own = own_RL.tolist()
    if table.longest == 0:
        return Verdict(own, [0] * len(own))
    drafts_RK = drafts.tokens_RK[:, : table.longest]
    accepted = accepted_by_identity(own_RL, drafts_RK, table.lengths_R).tolist()
    # Kept drafts equal the target's own tokens, so those are what is committed.
    return Verdict([row[: n + 1] for row, n in zip(own, accepted, strict=True)], accepted)


def _by_rejection(
    found_N: Distribution,
    drafted: Distribution | None,
    table: _RowTable,
    drafts: Drafts,
    state: RoundState,
    rule: Rule,
) -> Verdict:
    """Keep drafts by the rule of the verifier, and correct the distribution of what follows."""
    lengths_R = table.lengths_R
    if table.longest == 0 or drafted is None:
        tokens_R = found_N.draw(state.next_uniform(lengths_R))
        return Verdict([[token] for token in tokens_R.tolist()], [0] * len(tokens_R))
    if table.longest == 1:  # of single drafts both rules say the same, to the bit
        rule = "token"
    drafts_RK = drafts.tokens_RK[:, : table.longest]
    p = Blocks(found_N, table.row_RL)
    q = Blocks(drafted, _drafted_rows(drafts, len(drafted), table.longest))
    keep_RK = keep_probabilities(rule, p, q, drafts_RK, lengths_R)
    uniforms_RK = state.verify_uniforms(table.longest)
    accepted_R = accepted_lengths(rule, keep_RK, uniforms_RK, lengths_R)
    following = next_distribution(rule, p, q, drafts_RK, lengths_R, accepted_R)
    next_R = following.draw(state.next_uniform(accepted_R))
    accepted = accepted_R.tolist()
    rows = zip(drafts.tokens, accepted, next_R.tolist(), strict=True)
    return Verdict([[*kept[:n], token] for kept, n, token in rows], accepted)


def _drafted_rows(drafts: Drafts, count: int, longest: int) -> Tensor:
    """The row of (request, step) among `count` rows, step by step, of those that drafted, [R, K].

    The requests that did not stand behind them, and have no drafts to look at: any row will do.
    """
    device, num_drafts = drafts.tokens_RK.device, drafts.tokens_RK.shape[1]
    requests = count // num_drafts
    steps_K = torch.arange(longest, device=device) * requests
    requests_R = torch.arange(len(drafts.tokens), device=device).clamp(max=requests - 1)
    return requests_R[:, None] + steps_K
