"""Eagle3's loss: the training-time test (Li et al. 2025, arXiv 2503.01840; docs/method.md).

The layer runs P times over whole sequences, each pass on the output of the pass before, as a chain
of drafts does. Pass t (0-based) reads at row i the embedding of token i + 1 + t, has position i +
t, attends to the rows <= i of pass 0 (the context) and row i of the passes 1 .. t (its own chain),
and predicts token i + 2 + t: its label is the target's distribution at position i + 1 + t. The loss
is the cross-entropy against that distribution, times decay ** t. With a reduced vocabulary it is
conditioned on the known tokens, which is all that a drafter can learn.

All rows that predict the same token share the target's distribution (`chunked.SupervisedRows`).

Letters: T rows of packed samples, P passes, N supervised rows of all passes; the others as
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dspark.data.samples import SampleBatch
from dspark.drafters.eagle3 import Eagle3Drafter, Eagle3Weights, final_states
from dspark.drafters.layers import rotary
from dspark.training.losses.chain_attention import chain_attention
from dspark.training.losses.chunked import LossInputs, SupervisedRows, chunked_loss, suitable_rows
from dspark.training.losses.terms import TermWeights

Supervision = Literal["predicted", "reference"]
SOFT_CE = TermWeights(soft_ce=1.0)


@dataclass(frozen=True)
class TTTReport:
    """Loss and metrics of a batch; all but `loss` are detached.

    Attributes:
        loss: to call backward on.
        ce_P: cross-entropy of each pass against the target's distributions, as in the loss.
        accept_rate_P: mean c* = 1 - |p_d - p_t|_1 / 2 of each pass's supervised rows.
        accepted_length: mean over chains of 1 + sum_t prod_{u<=t} c*_u; a chain starts at a row
            whose first pass is supervised, and ends before its first row that is not.
        supervised: number of supervised rows of all passes.
    """

    loss: Tensor
    ce_P: Tensor
    accept_rate_P: Tensor
    accepted_length: Tensor
    supervised: int


@dataclass(frozen=True)
class ChainRows:
    """What each pass reads and which of its rows are supervised, for packed samples.

    Attributes:
        tokens_PT: the token whose embedding each row reads; 0 past the sample's end.
        positions_T: rows' positions at pass 0.
        lengths: rows of each sample.
        rows: the supervised rows, as t T + i, by the target row that teaches them.
        counts_P: what each pass's sum is divided by.
    """

    tokens_PT: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]
    rows: SupervisedRows
    counts_P: Tensor

    @classmethod
    def build(
        cls, batch: SampleBatch, passes: int, supervision: Supervision = "predicted"
    ) -> ChainRows:
        """Of packed samples, on the CPU.

        Args:
            batch: the samples.
            passes: P.
            supervision: `predicted` counts the rows whose predicted token belongs to an answer, and
                each pass's cross-entropy is their mean. `reference` reproduces the published
                training run for comparison: the mask of the token two places before the predicted
                one, and sums divided by all T rows.
        """
        rows_T, ends_T = torch.arange(batch.positions_T.numel()), batch.ends_T
        read_PT = rows_T + 1 + torch.arange(passes).unsqueeze(1)
        last, real_PT = rows_T.numel() - 1, read_PT < ends_T
        tokens_PT = batch.input_ids_T[read_PT.clamp(max=last)] * real_PT
        # The label is the distribution at row i + 1 + t, which predicts the token after that row.
        if supervision == "predicted":
            tested_PT = read_PT + 1
            supervised_PT = tested_PT < ends_T
        else:
            tested_PT, supervised_PT = read_PT - 1, real_PT
        supervised_PT = supervised_PT & batch.loss_mask_T[tested_PT.clamp(max=last)]
        counts_P = supervised_PT.sum(dim=1)
        if supervision == "reference":
            counts_P = torch.full_like(counts_P, rows_T.numel())
        rows = SupervisedRows.build(read_PT, supervised_PT)
        return cls(tokens_PT, batch.positions_T, batch.lengths, rows, counts_P)

    def to(self, device: torch.device) -> ChainRows:
        """The same on a device."""
        names = ("tokens_PT", "positions_T", "rows", "counts_P")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def ttt_passes(drafter: Eagle3Drafter, features_TF: Tensor, chains: ChainRows) -> Tensor:
    """Hidden states [P, T, H] of every pass, which `final_states` makes ready for the head.

    Args:
        drafter: bound.
        features_TF: the target's captured features.
        chains: what the passes read, on the features' device.
    """
    weights = Eagle3Weights.of(drafter)
    config, dtype = weights.config, drafter.norm.weight.dtype
    hidden_TH = weights.project(features_TF.to(dtype))
    outputs = list[Tensor]()
    past = [(list[Tensor](), list[Tensor]()) for _ in weights.layers]

    def mix(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        keys, values = past[layer]
        keys.append(key)
        values.append(value)
        mixed = chain_attention(
            query, keys, values, lengths=chains.lengths, scale=config.attention_scale
        )
        return mixed.transpose(0, 1)

    for t, tokens_T in enumerate(chains.tokens_PT):
        embedded_TH = drafter.borrowed.embed(tokens_T).to(dtype)
        table = rotary(chains.positions_T + t, config, dtype)
        hidden_TH = weights.step(embedded_TH, hidden_TH, table, mix)
        outputs.append(hidden_TH)
    return torch.stack(outputs)


def ttt_loss(
    drafter: Eagle3Drafter,
    hidden_PTH: Tensor,
    teacher_TH: Tensor,
    chains: ChainRows,
    *,
    decay: float = 0.8,
    weights: TermWeights = SOFT_CE,
    total_counts_P: Tensor | None = None,
    log_total_T: Tensor | None = None,
    chunk_rows: int | None = None,
) -> TTTReport:
    """Loss of the passes over a batch.

    Args:
        drafter: its norm and head map hidden states to distributions.
        hidden_PTH: from `ttt_passes`.
        teacher_TH: the target's states after its final norm.
        chains: which rows are supervised, on the states' device.
        decay: factor from one pass's weight to the next's.
        weights: of the terms; none may need the true token.
        total_counts_P: divisor of each pass's sum; None for the batch's own counts. Give the sum
            over all parts if several share a step.
        log_total_T: of the target's rows, as `totals.LogTotals` keeps them.
        chunk_rows: rows per vocabulary chunk; None for a number that suits the device.
    """
    passes, length, _ = hidden_PTH.shape
    slots_N, device = chains.rows.slots_N, hidden_PTH.device
    dtype = torch.promote_types(hidden_PTH.dtype, torch.float32)
    counts_P = chains.counts_P if total_counts_P is None else total_counts_P
    decays_P = decay ** torch.arange(passes, device=device, dtype=dtype)
    pass_N = slots_N // length
    states_NH = final_states(
        hidden_PTH.flatten(0, 1)[slots_N], drafter.norm.weight, drafter.config.backbone
    )
    inputs = LossInputs(
        head=drafter,
        hidden_NH=states_NH,
        feature_Nr=None,
        bias_Vr=None,
        teacher_UH=teacher_TH[chains.rows.teacher_U],
        labels_N=None,
        weight_N=(decays_P / counts_P.clamp(min=1))[pass_N],
        log_total_U=None if log_total_T is None else log_total_T[chains.rows.teacher_U],
    )
    vocab = drafter.config.draft_vocab_size or drafter.config.vocab_size
    chunk_rows = chunk_rows or suitable_rows(device, vocab)
    loss, terms = chunked_loss(inputs, chains.rows, weights, chunk_rows=chunk_rows)

    def by_pass(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(passes).index_add_(0, pass_N, values_N)

    return TTTReport(
        loss=loss,
        ce_P=by_pass(terms.soft_ce) / counts_P.clamp(min=1),
        accept_rate_P=by_pass(terms.accept) / by_pass(torch.ones_like(terms.accept)).clamp(min=1),
        accepted_length=_accepted_length(terms.accept, slots_N, (passes, length)),
        supervised=slots_N.numel(),
    )


def _accepted_length(accept_N: Tensor, slots_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """Mean over chains: each is a column of [P, T], which unsupervised rows end."""
    table_PT = accept_N.new_zeros(shape[0] * shape[1]).index_copy_(0, slots_N, accept_N).view(shape)
    starts_T = torch.zeros_like(table_PT, dtype=torch.bool)
    starts_T = starts_T.flatten().index_fill_(0, slots_N, True).view(shape)[0]
    gained_T = 1 + table_PT.cumprod(dim=0).sum(dim=0)
    return (gained_T * starts_T).sum() / starts_T.sum().clamp(min=1)
