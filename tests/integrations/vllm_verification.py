"""Runs in vLLM's Python: its own verification manager with ours in the place of its class."""

import contextlib
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

from dspark.errors import CompatibilityError, UsageError
from dspark.integrations.vllm import verification
from dspark.scheduling.calibration import Rounds, TemperatureScaling
from dspark.scheduling.calibration_file import Calibration, calibrate


class Nothing:
    """A CUDA stream or event that does nothing."""

    def __init__(self, *_args, **_options):
        self.device = torch.device("cpu")

    def __getattr__(self, _name):
        return lambda *_args, **_options: None


def manager_of(choice, costs):
    """vLLM's manager of 4 requests and 3 drafts, made by its constructor."""
    states = types.SimpleNamespace(
        num_speculative_steps=3,
        max_num_reqs=4,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        req_id_to_index={"a": 0, "b": 1},
        num_computed_tokens_np=np.zeros(4, dtype=np.int32),
        prefill_len=types.SimpleNamespace(np=np.zeros(4, dtype=np.int32)),
    )
    manager = verification.AdaptiveVerificationManager(
        states, torch.zeros(5, dtype=torch.int32), num_bonus_tokens=1, max_total_logits=64
    )
    manager.__class__ = verification.CalibratedVerification
    manager.choice = choice
    manager.cost_tables = costs
    return manager


def asked(manager, confidences):
    """The step's tokens after two records of the same confidences: budgets read the older one."""
    batch = types.SimpleNamespace(num_reqs=2, idx_mapping=torch.tensor([0, 1]))
    for _ in range(2):
        manager.record_confidences(torch.tensor(confidences), batch)
        for slot in manager._stale_confidences:  # the copy that a stream would make
            slot.np[:] = slot.gpu.numpy()
    tokens = manager.get_num_tokens({"a": 4, "b": 4}, {"a": [1, 2, 3], "b": [1, 2, 3]})
    return tokens, manager._stale_confidences[manager._stale_idx].np[:2].copy()


def check_choices(folder):
    """What a configuration says is taken or refused."""

    def config(**own):
        spec = types.SimpleNamespace(
            model=str(folder), num_speculative_tokens=3, rejection_sample_method="standard"
        )
        return types.SimpleNamespace(speculative_config=spec, additional_config={"dspark": own})

    def refused(error, words, **own):
        said = ""
        try:
            verification.Choice.of(config(**own))
        except error as found:
            said = str(found)
        assert words in said, said

    assert verification.Choice.of(config()) == verification.Choice(None)
    rounds = Rounds.of(np.zeros((120, 3)), np.arange(120) % 4, np.full(120, 3))
    entry = calibrate(rounds, "token", "sampled")
    Calibration((entry,)).save(folder / "calibration.json")
    found = verification.Choice.of(config(schedule="lagged", margin=0.05))
    assert found == verification.Choice(entry.scaling, "lagged", 0.05), found
    assert verification.Choice.of(config(requests="greedy")).scaling is None
    path = str(folder / "calibration.json")
    refused(CompatibilityError, "greedy requests", requests="greedy", calibration=path)
    refused(UsageError, "dspark.budget", budget=3)
    refused(UsageError, "'prefix'", schedule="prefix")


def main():
    """Print what holds; an assertion fails where it does not."""
    with tempfile.TemporaryDirectory() as folder:
        check_choices(Path(folder))
    print("chosen")
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.cuda.current_stream = Nothing
    package = "vllm.v1.worker.gpu.spec_decode.adaptive_verification"
    module = __import__(package, fromlist=["stream"])
    module.stream = lambda *_args: contextlib.nullcontext()
    raw = [[0.9, 0.6, 0.5], [0.3, 0.2, 0.1]]
    scaling = TemperatureScaling((2.0, 0.5, 1.0), (0.0, -1.0, 0.5))
    flat = (np.zeros(5), np.full(65, 10.0))
    choice = verification.Choice(scaling)
    _, seen = asked(manager_of(choice, flat), raw)
    want = scaling.apply(np.log(np.array(raw)) - np.log1p(-np.array(raw)))
    assert np.abs(seen - want).max() < 1e-5, (seen, want)
    assert np.abs(seen - np.array(raw)).max() > 0.1  # the control: it changed something
    print("calibrated")
    dear = (np.ones(5), 1.0 + 0.2 * np.arange(65))
    theirs, _ = asked(manager_of(verification.Choice(None), dear), raw)
    ours, _ = asked(manager_of(verification.Choice(None, "lagged"), dear), raw)
    assert theirs == ours, (theirs, ours)
    assert 2 < ours < 8, ours
    print("same")
    # With a margin the full block stays unless a smaller one promises clearly more.
    full, _ = asked(manager_of(verification.Choice(None, "lagged", 10.0), dear), raw)
    assert full == 8 > ours, full
    print("margin")


if __name__ == "__main__":
    main()
