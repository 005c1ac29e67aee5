"""Two processes on a CPU (gloo) against one: the same losses, weights and checkpoints."""

import json
import shutil

import pytest
import torch

from dspark.errors import RecipeError
from dspark.training.checkpoints import saved_steps
from dspark.training.parallel import World, wants_sharding


@pytest.fixture(scope="module")
def worker(load_script):
    return load_script("parallel_worker.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, worker):
    """The same scenarios in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, others in {
        "1": {},
        "2": {"accumulate": 2},
        "muon": {},
        "bfloat16": {"dtype": "bfloat16", "accumulate": 2},
        "average": {},
    }.items():
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        worker.train(
            worker.Uneven(dtype),
            worker.settings(folder, name, **others),
            World(),
            ema=0.9 if name == "average" else None,
            name="muon" if name == "muon" else "adamw",
        )
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, worker, run_two):
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(KeyboardInterrupt):
        worker.train(worker.Uneven(act=worker.cut), worker.settings(folder, "of one"), World())
    run_two(worker.__file__, folder)
    return folder


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(folder):
    state = torch.load(folder / "weights.pt", weights_only=True)
    return {name: tensor.float() for name, tensor in state.items()}


def assert_same_run(one, other, *, rel=1e-5):
    assert len(losses(one)) == 12
    assert losses(other) == pytest.approx(losses(one), rel=rel)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=rel, atol=rel)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_take_the_steps_of_one(alone, together, parallel, accumulate):
    """Supervised tokens lie unevenly: means of the parts' own means would differ."""
    assert_same_run(alone / "1", together / f"{parallel} {accumulate}")
    assert_same_run(alone / "1", alone / "2")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_takes_the_same_steps(alone, together, parallel):
    # Muon orthogonalises in bfloat16, where the order of a shard's sums shows.
    rel = {"ddp": 1e-4, "fsdp": 2e-2}[parallel]
    assert_same_run(alone / "muon", together / f"{parallel} muon", rel=rel)


def test_in_bfloat16_masters_and_sums_are_fp32(alone, together):
    one, ddp, fsdp = (alone / "bfloat16", *(together / f"{p} bfloat16" for p in ("ddp", "fsdp")))
    assert losses(ddp)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    # Both sum the ranks' gradients in fp32 and step fp32 masters: only the order of sums differs.
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=2e-2)
    assert losses(one) == pytest.approx(losses(ddp), rel=2e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(fsdp).values())


@pytest.mark.parametrize("name", ["ddp cut", "fsdp cut", "ddp then fsdp", "of one"])
def test_a_cut_run_goes_on_with_other_ranks(alone, together, name):
    assert_same_run(alone / "1", together / name)


@pytest.mark.parametrize("name", ["ddp cut", "fsdp cut"])
def test_with_the_same_ranks_it_goes_on_exactly(together, name):
    whole = together / name.replace("cut", "1")
    assert losses(together / name) == losses(whole)
    mine, theirs = weights(whole), weights(together / name)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["fsdp 1", "fsdp cut", "ddp 1"])
def test_one_process_goes_on_where_two_have_been(together, tmp_path, alone, name, number, worker):
    """From their last checkpoint but one."""
    shutil.copytree(together / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    run = worker.settings(tmp_path, "run", accumulate=number)
    worker.train(worker.Uneven(), run, World(), resume=True)
    assert_same_run(alone / "1", tmp_path / "run")


def test_sharded_averages_are_measured_and_exported_whole(alone, together):
    assert_same_run(alone / "average", together / "fsdp average")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_nan_of_one_rank_stops_all_and_is_named(together, parallel):
    for rank in range(2):
        error = json.loads((together / f"errors_{rank}.json").read_text())[f"{parallel} nan"]
        where = "in rank 1, part 3 (part 3 of 4): nan"
        assert f"Step 5 gave a loss that is not finite, {where}" in error
        assert "rank 0" not in error
    assert saved_steps(together / f"{parallel} nan") == [4]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(together, parallel):
    for rank, by in enumerate(("a signal to another rank", "SIGTERM")):
        error = json.loads((together / f"errors_{rank}.json").read_text())[f"{parallel} stopped"]
        assert f"Stopped by {by} after step 7 of 12" in error
    assert saved_steps(together / f"{parallel} stopped") == [4, 7]


def test_sharding_is_for_several_processes():
    with pytest.raises(RecipeError, match=r"run.parallel is fsdp, but there is one process only"):
        wants_sharding("fsdp", "cpu", 1)
    assert wants_sharding("auto", "cuda:0", 2)
    assert not wants_sharding("auto", "cpu", 2)
    assert not wants_sharding("auto", "cuda:0", 1)
    assert not wants_sharding("ddp", "cuda:0", 2)
