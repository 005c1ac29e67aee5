"""Data parallelism by torch.distributed: who am I, and the mean of gradients over ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def start_parallel(device: str) -> tuple[int, int]:
    """Join the process group that torchrun describes, if it started this process.

    Returns:
        (rank, number of ranks); (0, 1) outside torchrun.
    """
    if "RANK" not in os.environ or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size()


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, summed in fp32, in one message."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([t.detach().float().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def pick_device(device: str) -> str:
    """Resolve `auto`: this process's CUDA device where there is one, else the CPU."""
    if device != "auto":
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
