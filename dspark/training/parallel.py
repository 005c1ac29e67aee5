"""Parallel training with torch.distributed: ranks, reductions and sharding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dspark.errors import RecipeError

_BUCKET_NUMBERS = 1 << 24  # of one message: 64 MiB in fp32
_PATIENCE = timedelta(hours=1)  # the first rank may read data that the others wait for


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        ranks: number of processes.
        sharded: whether master weights, gradients and optimiser state are sharded over the
            processes, besides the data.
    """

    rank: int = 0
    ranks: int = 1
    sharded: bool = False


def start_parallel(device: str) -> tuple[int, int]:
    """Join torchrun's process group, if it started this process.

    Returns:
        (rank, number of ranks); (0, 1) outside torchrun.
    """
    if "RANK" not in os.environ or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        on_cuda = device.startswith("cuda")
        if on_cuda:
            torch.cuda.set_device(device)
        # Objects and small sums travel on the CPU, by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=_PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def is_parallel() -> bool:
    """Whether several processes train together."""
    return dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """All-reduce tensors in fp32, in few messages."""
    if not is_parallel():
        return
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        sizes = [t.numel() for t in bucket]
        if i + 1 < len(tensors) and sum(sizes) < _BUCKET_NUMBERS:
            continue
        flat = torch.cat([t.detach().float().reshape(-1) for t in bucket])
        dist.all_reduce(flat)
        for own, summed in zip(bucket, torch.split(flat, sizes), strict=True):
            own.copy_(summed.view_as(own))
        bucket = []


def sum_numbers(numbers: Mapping[str, float]) -> dict[str, float]:
    """Sums over ranks, in fp64, of numbers that every rank has under the same names."""
    if not is_parallel():
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(numbers, values.tolist(), strict=True))


def gather(thing: Any) -> list[Any]:
    """The objects of all ranks, in order."""
    if not is_parallel():
        return [thing]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def pick_device(device: str) -> str:
    """Resolve `auto`: this process's CUDA device where there is one, else the CPU."""
    if device != "auto":
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def wants_sharding(parallel: str, device: str, ranks: int) -> bool:
    """Whether a run is sharded.

    Raises:
        RecipeError: fsdp is requested without torchrun.
    """
    if parallel == "fsdp" and not dist.is_initialized():
        raise RecipeError(
            "run.parallel is fsdp, but there is one process only; start it by "
            "torchrun --nproc-per-node N -m dspark train, or set run.parallel to auto."
        )
    return parallel == "fsdp" or (parallel == "auto" and ranks > 1 and device.startswith("cuda"))


def shard(step: nn.Module, dtype: torch.dtype) -> None:
    """Shard the parameters of a module whose forward is a whole part of a training step (FSDP2).

    The optimiser steps fp32 shards; the forward pass sees whole weights in `dtype`, and gradients
    are reduced in fp32. All parameters form one unit, because a drafter reads its layers' weights
    across modules.

    Args:
        step: the module; tensors that are not its parameters (the target's embedding and head) are
            not sharded.
        dtype: of the forward and backward pass.
    """
    for parameter in step.parameters():
        parameter.data = parameter.data.float()
    parameter = next(step.parameters())
    mesh = init_device_mesh(parameter.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(step, mesh=mesh, mp_policy=policy)


def reduce_after_this_part(step: nn.Module, last: bool) -> None:
    """Let a sharded module reduce gradients and free whole weights only in the last part."""
    if isinstance(step, FSDPModule):
        step.set_requires_gradient_sync(last)
        step.set_reshard_after_backward(last)


@contextmanager
def showing(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Temporarily replace a module's parameters, shards by whole weights.

    All ranks must enter, because shards are gathered.

    Args:
        module: the module.
        weights: by parameter name; they take the dtype of the replaced ones, or keep their own if
            those are shards.
    """
    named = dict(module.named_parameters())
    new = {id(named[name]): _plain(named[name], weight) for name, weight in weights.items()}
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for owner in module.modules():
        for name, old in list(owner._parameters.items()):
            if old is not None and id(old) in new:  # tied tables are replaced in both places
                kept.append((owner, name, old))
                owner._parameters[name] = new[id(old)]
    try:
        yield
    finally:
        for owner, name, old in kept:
            owner._parameters[name] = old


def _plain(old: nn.Parameter, weight: Tensor) -> nn.Parameter:
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.to(old.dtype)
    return nn.Parameter(whole, requires_grad=False)
