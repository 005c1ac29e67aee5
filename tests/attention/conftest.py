"""Slow, obvious attention in float64, to which the fast ones must be equal."""

import math

import pytest
import torch


def _reference(query_LAD, key_SGD, value_SGD, visible_LS, *, scale, sinks=None, softcap=None):
    """Row by row, head by head: weights of the visible keys, then their values."""
    rows, heads = query_LAD.shape[:2]
    shared = heads // key_SGD.shape[1]
    query, key, value = query_LAD.double(), key_SGD.double(), value_SGD.double()
    out = torch.zeros(rows, heads, value.shape[-1], dtype=torch.float64)
    for i in range(rows):
        for a in range(heads):
            seen = [j for j in range(key.shape[0]) if visible_LS[i][j]]
            scores = [float(query[i, a] @ key[j, a // shared]) * scale for j in seen]
            if softcap is not None:
                scores = [softcap * math.tanh(s / softcap) for s in scores]
            weights = [math.exp(s) for s in scores]
            total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[a])))
            for weight, j in zip(weights, seen, strict=True):
                out[i, a] += weight / total * value[j, a // shared]
    return out


@pytest.fixture
def reference():
    return _reference


@pytest.fixture
def causal_reference():
    def run(query_LAD, key_SGD, value_SGD, start, *, scale, window=None, **options):
        visible = [
            [j <= p and (window is None or j > p - window) for j in range(key_SGD.shape[0])]
            for p in range(start, start + query_LAD.shape[0])
        ]
        return _reference(query_LAD, key_SGD, value_SGD, visible, scale=scale, **options)

    return run
