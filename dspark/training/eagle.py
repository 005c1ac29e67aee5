"""Eagle3's loss: the training-time test (Li et al. 2025; FORMAT_FACTS.md B.3).

The layer runs P times over whole sequences, each pass on what the pass before gave, as a chain of
drafts does. Pass t (0-based) reads at row i the embedding of token i + 1 + t, stands at position
i + t, sees the rows <= i of pass 0 (the context) and row i of the passes 1 .. t (its own chain),
and predicts token i + 2 + t: its label is the target's law at position i + 1 + t. The loss is the
cross-entropy against that law, times decay ** t. With a reduced vocabulary it is the law given
that the token is a known one: more a drafter cannot learn.

All rows that predict the same token share the target's law, so supervision is by teacher position
s = i + 1 + t, and only a chunk of these positions meets the vocabulary at once: its loss and exact
gradient are computed together, and no [rows, V] tensor lives whole.
Letters: B sequences, S tokens, P passes, M teacher positions; the others as elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.eagle3_layer import Eagle3Weights
from dspark.drafters.layers import rotary
from dspark.training.chain_attention import chain_attention
from dspark.training.losses import suitable_rows

Supervision = Literal["predicted", "reference"]


@dataclass(frozen=True)
class TTTReport:
    """Loss of a batch and what to log about it; all but `loss` are detached.

    Attributes:
        loss: to call backward on.
        ce_P: cross-entropy of each pass against the target's laws, as it enters the loss.
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


def ttt_passes(
    drafter: Eagle3Drafter, features_BSF: Tensor, input_ids_BS: Tensor, passes: int
) -> Tensor:
    """Hidden states [P, B, S, H] of every pass, before the final norm.

    The last rows of a pass, whose token lies beyond the sequence, read token 0.

    Args:
        drafter: bound.
        features_BSF: the target's captured features.
        input_ids_BS: tokens.
        passes: P.
    """
    weights = Eagle3Weights.of(drafter)
    config, dtype = weights.config, weights.fc.dtype
    rows_S = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
    hidden_BSH = weights.project(features_BSF.to(dtype))
    tokens_BS, keys, values, outputs = input_ids_BS, list[Tensor](), list[Tensor](), list[Tensor]()

    def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        keys.append(key)
        values.append(value)
        return chain_attention(query, keys, values, scale=config.attention_scale).transpose(1, 2)

    for t in range(passes):
        tokens_BS = F.pad(tokens_BS[:, 1:], (0, 1))
        embedded_BSH = drafter.borrowed.embed(tokens_BS).to(dtype)
        hidden_BSH = weights.step(embedded_BSH, hidden_BSH, rotary(rows_S + t, config, dtype), mix)
        outputs.append(hidden_BSH)
    return torch.stack(outputs)


def ttt_loss(
    drafter: Eagle3Drafter,
    hidden_PBSH: Tensor,
    teacher_BSH: Tensor,
    loss_mask_BS: Tensor,
    *,
    decay: float = 0.8,
    supervision: Supervision = "predicted",
    chunk_rows: int | None = None,
) -> TTTReport:
    """Loss of the passes over a batch.

    Args:
        drafter: whose norm and head turn hidden states into laws.
        hidden_PBSH: what `ttt_passes` gave.
        teacher_BSH: the target's states after its final norm.
        loss_mask_BS: nonzero where a token is an answer's.
        decay: factor from one pass's weight to the next's.
        supervision: `predicted` counts the rows whose predicted token is an answer's, and each
            pass's cross-entropy is the mean over them. `reference` repeats the published training
            run, to compare with it: the mask of the token two places before the predicted one,
            without the sequence's last token, and sums divided by all B S rows.
        chunk_rows: rows that meet the vocabulary at once; None for as many as suit the device.
    """
    passes, batch, length, _ = hidden_PBSH.shape
    chosen_BS = _teacher_positions(loss_mask_BS, supervision)
    sequence_M, position_M = chosen_BS.nonzero(as_tuple=True)
    passes_P1 = torch.arange(passes, device=position_M.device).unsqueeze(1)
    row_PM = position_M - 1 - passes_P1
    real_PM = row_PM >= 0
    dtype = torch.promote_types(hidden_PBSH.dtype, torch.float32)
    counts_P = real_PM.sum(dim=1).clamp(min=1).to(dtype)
    if supervision == "reference":
        counts_P = torch.full_like(counts_P, batch * length)
    weight_PM = real_PM * (decay ** passes_P1.to(dtype)) / counts_P.unsqueeze(1)
    hidden_PMH = hidden_PBSH[passes_P1, sequence_M, row_PM.clamp(min=0)]
    chunk_rows = chunk_rows or suitable_rows(position_M.device, drafter.config.vocab_size)
    rows = _Rows(
        drafter=drafter,
        teacher_MH=teacher_BSH[sequence_M, position_M],
        weight_PM=weight_PM,
        chunk=max(1, chunk_rows // passes),
        with_gradient=torch.is_grad_enabled() and hidden_PMH.requires_grad,
    )
    normed_PMH = torch.rms_norm(
        hidden_PMH,
        (hidden_PMH.shape[-1],),
        drafter.norm.weight,
        drafter.config.backbone.rms_norm_eps,
    )
    loss, ce_PM, accept_PM = _LawLoss.apply(normed_PMH, rows)  # type: ignore[no-untyped-call]
    return TTTReport(
        loss=loss,
        ce_P=(real_PM * ce_PM).sum(dim=1) / counts_P,
        accept_rate_P=(real_PM * accept_PM).sum(dim=1) / real_PM.sum(dim=1).clamp(min=1),
        accepted_length=_accepted_length(accept_PM, sequence_M, row_PM, (batch, length)),
        supervised=int(real_PM.sum()),
    )


def _teacher_positions(loss_mask_BS: Tensor, supervision: Supervision) -> Tensor:
    """True [B, S] where the target's law at a position is a label."""
    mask_BS = loss_mask_BS != 0
    if supervision == "predicted":
        return F.pad(mask_BS[:, 1:], (0, 1))
    mask_BS = mask_BS.clone()
    mask_BS[:, -1] = False
    return F.pad(mask_BS[:, :-1], (1, 0))


def _accepted_length(
    accept_PM: Tensor, sequence_M: Tensor, row_PM: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Mean over chains: the rows of one chain lie on a diagonal of [P, M]."""
    passes = accept_PM.shape[0]
    table_PBS = accept_PM.new_zeros(passes, *shape)
    real_PM = row_PM >= 0
    pass_PM = torch.arange(passes, device=row_PM.device).unsqueeze(1).expand_as(row_PM)
    sequence_PM = sequence_M.expand_as(row_PM)
    table_PBS[pass_PM[real_PM], sequence_PM[real_PM], row_PM[real_PM]] = accept_PM[real_PM]
    starts_BS = torch.zeros(shape, dtype=torch.bool, device=row_PM.device)
    starts_BS[sequence_M[real_PM[0]], row_PM[0][real_PM[0]]] = True
    gained_BS = 1 + table_PBS.cumprod(dim=0).sum(dim=0)
    return gained_BS[starts_BS].sum() / starts_BS.sum().clamp(min=1)


@dataclass(frozen=True)
class _Rows:
    """The constants of the supervised rows."""

    drafter: Eagle3Drafter
    teacher_MH: Tensor
    weight_PM: Tensor
    chunk: int
    with_gradient: bool


def _labels(drafter: Eagle3Drafter, teacher_MH: Tensor) -> tuple[Tensor, Tensor | None]:
    """The target's laws [M, V], and with a reduced vocabulary what they give to other tokens.

    With a reduced vocabulary they are laws [M, Vd], given that the token is a known one: more a
    drafter cannot learn. The chance [M, 1] of the others is none otherwise.
    """
    logits_MV = drafter.target_logits(teacher_MH)
    known_MV = drafter.over_drafts(logits_MV)
    unknown_M1 = None
    if drafter.t2d is not None:
        shares = known_MV.logsumexp(-1, keepdim=True) - logits_MV.logsumexp(-1, keepdim=True)
        unknown_M1 = 1 - shares.exp()
    return F.softmax(known_MV, dim=-1), unknown_M1


class _LawLoss(torch.autograd.Function):
    """sum w_tm CE(p_t, p_d), positions chunk by chunk, and its gradient."""

    @staticmethod
    def forward(ctx: Any, normed_PMH: Tensor, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        weight_PM = rows.weight_PM
        grad_PMH = torch.zeros_like(normed_PMH) if rows.with_gradient else None
        ce_PM, accept_PM = torch.zeros_like(weight_PM), torch.zeros_like(weight_PM)
        for start in range(0, weight_PM.shape[1], rows.chunk):
            part = slice(start, start + rows.chunk)
            teacher_MV, unknown_M1 = _labels(rows.drafter, rows.teacher_MH[part])
            with torch.set_grad_enabled(rows.with_gradient):
                # Rows of one matrix: as a stack the head would be copied once per pass.
                normed_NH = normed_PMH[:, part].detach().flatten(0, 1)
                logits_NV = rows.drafter.base_logits(normed_NH.requires_grad_(rows.with_gradient))
            shape = (weight_PM.shape[0], -1)
            log_law_PMV = torch.unflatten(F.log_softmax(logits_NV.detach(), dim=-1), 0, shape)
            ce_PM[:, part] = -(log_law_PMV * teacher_MV).sum(dim=-1)
            law_PMV = log_law_PMV.exp_()
            if unknown_M1 is None:
                gap_PMV = law_PMV.sub_(teacher_MV)  # the cross-entropy's gradient
                distance_PM = gap_PMV.abs().sum(dim=-1)
            else:
                distance_PM = (law_PMV - (1 - unknown_M1) * teacher_MV).abs().sum(dim=-1)
                distance_PM += unknown_M1.squeeze(-1)
                gap_PMV = law_PMV.sub_(teacher_MV)
            accept_PM[:, part] = (1 - 0.5 * distance_PM).clamp(0, 1)
            if grad_PMH is not None:
                [grad_NH] = torch.autograd.grad(logits_NV, [normed_NH], [gap_PMV.flatten(0, 1)])
                grad_part_PMH = torch.unflatten(grad_NH, 0, shape)
                grad_PMH[:, part] = grad_part_PMH * weight_PM[:, part].unsqueeze(-1)
        ctx.save_for_backward(*(() if grad_PMH is None else (grad_PMH,)))
        ctx.mark_non_differentiable(ce_PM, accept_PM)
        return (weight_PM * ce_PM).sum(), ce_PM, accept_PM

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        [grad_PMH] = ctx.saved_tensors
        return grad_PMH * grad_loss, None
