"""Muon where bf16 is slow."""

import copy

import pytest
import torch

from dspark.training import optim


def trained(kind, monkeypatch=None, steps=4):
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 16), (16, 40), (16, 16))]
    gradients = torch.Generator().manual_seed(1)
    optimiser = kind(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(steps):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=gradients)
        optimiser.step()
    return matrices, optimiser


def test_muon_in_fp32_takes_torchs_steps(monkeypatch):
    monkeypatch.setattr(optim, "_has_fast_bf16", lambda _: False)
    mine, own = trained(optim.Muon)
    theirs, other = trained(torch.optim.Muon)
    started, _ = trained(torch.optim.Muon, steps=0)
    for a, b, start in zip(mine, theirs, started, strict=True):
        moved = (b - start).detach().norm()
        assert float((a - b).detach().norm()) < 0.02 * float(moved)  # bf16 has 8 bits
    state, other_state = own.state_dict(), other.state_dict()
    assert state["param_groups"] == other_state["param_groups"]
    for key, value in other_state["state"].items():
        assert state["state"][key].keys() == value.keys()
        torch.testing.assert_close(state["state"][key]["momentum_buffer"], value["momentum_buffer"])


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_updates_are_near_orthogonal(shape):
    torch.manual_seed(2)
    matrix = torch.randn(shape)
    made = optim._orthogonal(copy.deepcopy(matrix), (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
