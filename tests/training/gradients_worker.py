"""One of several processes that take the gradients of the same steps: run by test_gradients.py.

Arguments: a folder with recipes to read, and to write to.
"""

import sys
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dspark.training.drafters.new_drafter import load_frozen_target
from dspark.training.drafters.objectives import DrafterObjective, Eagle3Objective
from dspark.training.language_model import LanguageModelObjective
from dspark.training.loop import Training
from dspark.training.objective import DataOrder
from dspark.training.parallel import World, start_parallel, sum_over_ranks
from dspark.training.recipe import load_recipe

STEPS = (0, 3)
ORDER = DataOrder(1.0, 1.0, lambda *_: "")
BLOCK = "num_layers: 1, block_size: 4, target_layer_ids: [0, 2], mask_token_id: 39"
DSPARK = f"{BLOCK}, markov_rank: 8"
CHAIN = "ttt_length: 3, target_layer_ids: [0, 2]"
RECIPES = {  # algorithm, drafter, loss
    "vanilla": ("dspark", DSPARK, ""),
    "gated": ("dspark", f"{DSPARK}, markov_head_type: gated", ""),
    "rnn": ("dspark", f"{DSPARK}, markov_head_type: rnn", "kl: 0.5"),
    "vanilla, other losses": ("dspark", DSPARK, "lk: 0.4, lk_hybrid: 0.5, detach_confidence: true"),
    "rnn of few tokens, 1 + n": (
        "dspark",
        f"{DSPARK}, markov_head_type: rnn, draft_vocab_size: 24, sample_from_anchor: false, "
        "confidence_head_with_markov: false",
        "",
    ),
    "without confidence": ("dspark", f"{DSPARK}, confidence_head: false", ""),
    "dflash": ("dflash", BLOCK, ""),
    "dflash of few tokens": ("dflash", f"{BLOCK}, draft_vocab_size: 24", "kl: 0.5"),
    "eagle3": ("eagle3", CHAIN, ""),
    "eagle3 of few tokens": ("eagle3", f"{CHAIN}, draft_vocab_size: 24", "tv: 0.5"),
    "mtp": ("mtp", "", ""),
    "mtp of a projection, other losses": ("mtp", "input_projection: true", "soft_ce: 0, lk: 1"),
}


@cache
def frozen_target(folder, dtype):
    return load_frozen_target(load_recipe(str(folder / "drafter.yaml")), "cpu", dtype)


def objective_of(folder, name, dtype, accumulate):
    run = [f"run.dtype={dtype}", f"run.accumulate={accumulate}"]
    if name == "language model":
        return LanguageModelObjective(load_recipe(str(folder / "target.yaml"), run), "cpu")
    algorithm, drafter, loss = RECIPES[name]
    given = [f"algorithm={algorithm}", f"drafter={{{drafter}}}", f"loss={{{loss}}}"]
    given += [] if algorithm in ("eagle3", "mtp") else ["samples.num_anchors=6"]
    recipe = load_recipe(str(folder / "drafter.yaml"), [*given, *run])
    target = frozen_target(folder, dtype)
    kind = Eagle3Objective if algorithm in ("eagle3", "mtp") else DrafterObjective
    return kind(recipe, target)


def gradients(folder, name, world, *, dtype="float32", accumulate=1):
    """Mean gradient of each step over all ranks' parts, by parameter, and the mean losses."""
    objective = objective_of(folder, name, dtype, accumulate)
    recipe = objective.recipe
    training = Training(objective, recipe.run, recipe.optimiser, ORDER, world)
    optimiser, found = training.optimiser, {}
    for step in STEPS:
        means, _ = training.gradients(step)
        if not world.sharded:
            sum_over_ranks(optimiser.gradients())
        for parameter, master in zip(optimiser.names, optimiser.masters, strict=True):
            assert master.grad is not None, parameter
            sharded = isinstance(master.grad, DTensor)
            assert sharded is world.sharded
            whole = master.grad.full_tensor() if sharded else master.grad / world.ranks
            found[f"{step} {parameter}"] = whole.float().clone()
        loss = torch.tensor([means["loss"]])
        sum_over_ranks([loss])
        found[f"{step} loss"] = loss / world.ranks
        optimiser.clear()
    return found


def scenarios():
    """Name, sharded, dtype and parts on each rank of all that two processes do."""
    for name in [*RECIPES, "language model"]:
        for accumulate in (1, 2):
            yield name, True, "float32", accumulate
        yield name, False, "float32", 1
        yield name, True, "bfloat16", 1


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank, ranks = start_parallel("cpu")
    found = {}
    for name, sharded, dtype, accumulate in scenarios():
        world = World(rank, ranks, sharded)
        key = (name, sharded, dtype, accumulate)
        found[key] = gradients(folder, name, world, dtype=dtype, accumulate=accumulate)
    torch.save(found, folder / f"gradients_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
