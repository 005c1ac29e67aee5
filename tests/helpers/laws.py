"""What processors do to a law, slowly and obviously."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.sampling.logits_processors import Chain

Law = npt.NDArray[np.float64]


def tempered_top_p(scores_V: Law, temperature: float, top_p: float) -> Law:
    """The softmax at a temperature, then its likeliest tokens until they hold `top_p`."""
    probs = np.exp((scores_V - scores_V.max()) / temperature)
    probs /= probs.sum()
    kept, mass = np.zeros(len(probs), dtype=bool), 0.0
    for token in np.argsort(-probs):
        if mass >= top_p:
            break
        kept[token], mass = True, mass + probs[token]
    law: Law = np.where(kept, probs, 0.0) / probs[kept].sum()
    return law


def dense_law(logits_NV: Tensor, chain: Chain) -> Tensor:
    """Temperature and filters over whole rows: sort everything, sum everything."""
    rows = []
    for n, row_V in enumerate(logits_NV):
        scores_V = row_V / float(chain.temperature_N[n])
        order_V = scores_V.sort(descending=True, stable=True).indices  # equal ones by rising id
        kept = int(chain.top_k_N[n]) or len(row_V)
        probs_V = torch.zeros_like(scores_V)
        likeliest = order_V[:kept]
        probs_V[likeliest] = scores_V[likeliest].softmax(0)
        if float(chain.top_p_N[n]) < 1:
            mass_V = probs_V[order_V].cumsum(0, dtype=torch.float64)
            reached_V = torch.cat([mass_V.new_zeros(1), mass_V[:-1]]) >= float(chain.top_p_N[n])
            probs_V[order_V[reached_V]] = 0
        probs_V[probs_V < float(chain.min_p_N[n]) * probs_V.max()] = 0
        rows.append(probs_V / probs_V.sum())
    return torch.stack(rows)


def dense_sample(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """The first token whose cumulated mass exceeds u times the total."""
    cdf_NV = probs_NV.cumsum(dim=1, dtype=torch.float64)
    mass_N = uniforms_N * cdf_NV[:, -1]
    return (cdf_NV <= mass_N[:, None]).sum(dim=1).clamp(max=probs_NV.shape[1] - 1)


def chi_squared(counts: Law, probs: Law) -> tuple[float, float]:
    """Pearson's statistic of counts under a law, and what it hardly ever reaches if they follow it.

    Cells of less than 5 expected counts are one; the limit lies 4 standard deviations above the
    mean of the statistic.
    """
    expected = probs * counts.sum()
    many = expected >= 5
    cells = [(counts[many], expected[many])]
    if expected[~many].sum() >= 5:
        cells.append((counts[~many].sum(keepdims=True), expected[~many].sum(keepdims=True)))
    found = sum(float(((c - e) ** 2 / e).sum()) for c, e in cells)
    freedom = sum(len(c) for c, _ in cells) - 1
    return found, freedom + 4 * float(np.sqrt(2 * freedom))
