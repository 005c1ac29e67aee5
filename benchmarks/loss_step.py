"""The loss step at published dims: memory, time and gradients beside the plain formulation.

Both sides take the same hidden states, teacher states and blocks of random anchors (Qwen3-4B's
width and vocabulary, rank 256, blocks of 7), and give the same loss and gradients. The plain side
holds whole [rows, V] tensors as the published training code does: teacher logits of
every slot, and both softmaxes twice in fp32, once for acceptance rates and once for the loss.

Extra memory is the peak above what stood before the step, less the gradients that are its result
from where on they exist: ours holds that of the sequential head's output matrix from the forward
pass on, all others come with the backward pass. On a CPU each side is measured in a process of its
own by the kernel's high-water mark.

Gradients are compared with the plain form's in fp64, at the full vocabulary but a smaller width and
few anchors. In fp32 the plain form itself is further from that than ours (`plain_fp32_error`), and
so are the two sides of the step from each other (`apart`).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import DTYPES, add_machine_options, emit, environment, rounded, say
from dspark.data.samples import Sample, SampleBatch
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.heads import at_least_fp32
from dspark.targets.forward import TargetParts
from dspark.training.losses.blocks import (
    AnchorBlocks,
    LossWeights,
    block_loss,
    position_weights,
    sample_anchors,
)

BLOCK, RANK = 7, 256
MEMORY_CEILING, TIME_CEILING, ERROR_CEILING = 1 / 8, 1.1, 1e-5
WEIGHTS = LossWeights()


@dataclass(frozen=True)
class Step:
    """One step's inputs.

    Attributes:
        drafter: heads, and a backbone that is not used.
        hidden_MKH: its states, with gradient.
        teacher_TH: the target's states.
        blocks: of the sampled anchors.
    """

    drafter: DSparkDrafter
    hidden_MKH: Tensor
    teacher_TH: Tensor
    blocks: AnchorBlocks

    def gradients(self) -> dict[str, Tensor]:
        """What a step leaves behind."""
        named = {n: p.grad for n, p in self.drafter.named_parameters() if p.grad is not None}
        assert self.hidden_MKH.grad is not None
        return {"hidden": self.hidden_MKH.grad, **named}

    def clear(self) -> None:
        """Forget them."""
        self.hidden_MKH.grad = None
        self.drafter.zero_grad(set_to_none=True)


def make_step(args: argparse.Namespace, anchors: int, dtype: torch.dtype) -> Step:
    """States whose laws are neither equal nor strangers: teacher's plus noise, seeded."""
    device = torch.device(args.device)
    source = torch.Generator().manual_seed(args.seed)
    head = torch.empty(args.vocab_size, args.hidden_size).normal_(0, 0.03, generator=source)
    head = head.to(device=device, dtype=dtype)
    parts = TargetParts(  # one table for embedding and head, as Qwen3-4B has it
        embedding_VH=head,
        embedding_scale=1.0,
        head_VH=head,
        head_bias_V=None,
        logit_softcap=None,
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        final_norm_H=None,
    )
    backbone = BackboneConfig(args.hidden_size, 8, 1, 2, 1, 8, 1)
    config = DSparkConfig(
        backbone, args.vocab_size, BLOCK, 0, (0,), 2, markov_rank=min(RANK, args.hidden_size)
    )
    drafter = DSparkDrafter.from_target(parts, config, generator=source).to(device, dtype)
    length = max(args.tokens_per_anchor * anchors, BLOCK + 2)
    ids = torch.randint(args.vocab_size, (length,), generator=source)
    batch = SampleBatch.of([Sample(tuple(ids.tolist()), (True,) * length)])
    blocks = AnchorBlocks.build(batch, sample_anchors(batch, anchors, [source]), BLOCK)
    teacher_TH = torch.randn(length, args.hidden_size, generator=source)
    rows_MK = (blocks.anchors_M.unsqueeze(1) + torch.arange(BLOCK)).clamp(max=length - 1)
    noise = torch.randn(*rows_MK.shape, args.hidden_size, generator=source)
    hidden_MKH = (0.8 * teacher_TH[rows_MK] + 0.6 * noise).to(device=device, dtype=dtype)
    teacher_TH = teacher_TH.to(device=device, dtype=dtype)
    return Step(drafter, hidden_MKH.requires_grad_(), teacher_TH, blocks.to(device))


def chunked(step: Step) -> Tensor:
    """Ours."""
    return block_loss(step.drafter, step.hidden_MKH, step.teacher_TH, step.blocks, WEIGHTS).loss


def plain(step: Step) -> Tensor:
    """Whole tensors, as the reference's loss holds them."""
    drafter, blocks, hidden_MKH = step.drafter, step.blocks, step.hidden_MKH
    head, borrowed = drafter.markov_head, drafter.borrowed
    assert head is not None
    feature_MKr = head.block(blocks.previous_MK, hidden_MKH)
    logits_MKV = F.linear(hidden_MKH, borrowed.head_VH) + head.bias(feature_MKr)
    with torch.no_grad():
        rows_MK = blocks.anchors_M.to(hidden_MKH.device).unsqueeze(1) + torch.arange(
            BLOCK, device=hidden_MKH.device
        )
        teacher_MKH = step.teacher_TH[rows_MK.clamp(max=len(step.teacher_TH) - 1)]
        target_MKV = F.linear(teacher_MKH, borrowed.head_VH)
    weight_MK = position_weights(
        blocks, WEIGHTS.decay, torch.promote_types(hidden_MKH.dtype, torch.float32)
    )
    total = weight_MK.sum() + 1e-6

    def distance() -> Tensor:
        law_MKV = at_least_fp32(logits_MKV).softmax(-1)
        return (law_MKV - at_least_fp32(target_MKV).softmax(-1)).abs().sum(-1)

    accept_MK = (1 - 0.5 * distance()).clamp(0, 1)
    ce_MK = F.cross_entropy(
        logits_MKV.flatten(0, 1), blocks.labels_MK.flatten(), reduction="none"
    ).view_as(weight_MK)
    confidence_MK = drafter.confidence_logits(hidden_MKH, blocks.previous_MK)
    assert confidence_MK is not None
    entropy_MK = F.binary_cross_entropy_with_logits(
        confidence_MK, accept_MK.detach(), reduction="none"
    )
    terms_MK = WEIGHTS.ce * ce_MK + WEIGHTS.tv * distance() + WEIGHTS.confidence * entropy_MK
    return (weight_MK * terms_MK).sum() / total


SIDES: dict[str, Callable[[Step], Tensor]] = {"plain": plain, "chunked": chunked}


def extra_bytes(args: argparse.Namespace, side: str) -> int:
    """Peak of one step above its inputs and those of its gradients that exist by then."""
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype or "float32"]
    small = argparse.Namespace(**{**vars(args), "vocab_size": 512, "hidden_size": 64})
    SIDES[side](make_step(small, 4, dtype)).backward()  # type: ignore[no-untyped-call]
    step = make_step(args, args.anchors, dtype)
    gc.collect()
    before = _mark(args.device)
    loss = SIDES[side](step)
    forward = _peak(args.device) - before
    loss.backward()  # type: ignore[no-untyped-call]
    whole = _peak(args.device) - before
    found = step.gradients()
    early = found["markov_head.markov_w2.weight"].nbytes if side == "chunked" else 0
    return max(forward - early, whole - sum(grad.nbytes for grad in found.values()))


def _mark(device: str) -> int:
    """Bytes in use now, from where on the peak counts."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}; measure memory on Linux or with CUDA.")


def _report_extra(args: argparse.Namespace, side: str, queue: Any) -> None:
    queue.put(extra_bytes(args, side))


def measured_extra(args: argparse.Namespace, side: str) -> int:
    """`extra_bytes` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report_extra, args=(args, side, queue))
    process.start()
    found = int(queue.get())
    process.join()
    return found


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both sides taken in turn, and how far their gradients are apart."""
    step = make_step(args, args.anchors, DTYPES[args.dtype or "float32"])
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    found: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, float] = {}
    cuda = args.device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time  # others may share the cores
    for repeat in range(args.repeats + 1):
        for side, loss_of in SIDES.items():
            step.clear()
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            loss = loss_of(step)
            loss.backward()  # type: ignore[no-untyped-call]
            if cuda:
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                seconds[side].append(clock() - start)
            else:
                losses[side], found[side] = float(loss.detach()), step.gradients()
            say(f"{side} {clock() - start:.2f} s")
    pairs = zip(seconds["chunked"], seconds["plain"], strict=True)
    slots, teachers = step.blocks.rows.slots_N.numel(), len(step.blocks.rows.counts)
    return {
        "supervised_slots": slots,
        "teacher_rows": teachers,
        "loss": losses,
        "seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "time_ratio": statistics.median(mine / theirs for mine, theirs in pairs),
        "apart": worst(found["chunked"], found["plain"]),
    }


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor's gradient."""
    return max(
        float((grad.double() - exact[n].double()).norm() / exact[n].double().norm())
        for n, grad in found.items()
    )


def errors(args: argparse.Namespace) -> dict[str, float]:
    """How far both sides' fp32 gradients are from the plain form's in fp64."""
    small = argparse.Namespace(**{**vars(args), "hidden_size": min(args.hidden_size, 128)})
    exact = make_step(small, 4, torch.float64)
    plain(exact).backward()  # type: ignore[no-untyped-call]
    found = {}
    for side, loss_of in SIDES.items():
        step = make_step(small, 4, torch.float32)
        loss_of(step).backward()  # type: ignore[no-untyped-call]
        found[side] = worst(step.gradients(), exact.gradients())
    return {"gradient_error": found["chunked"], "plain_fp32_error": found["plain"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_machine_options(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--anchors", type=int, default=32, help="512 is the published number")
    parser.add_argument("--tokens-per-anchor", type=int, default=8, help="8: 512 in 4,096 tokens")
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory = {}
    for side in SIDES:
        memory[side] = measured_extra(args, side)
        say(f"{side}: {memory[side] / 2**20:.0f} MiB above inputs and gradients")
    results = timed(args) | errors(args)
    ratio = memory["chunked"] / memory["plain"]
    results |= {
        "extra_bytes": memory,
        "memory_ratio": ratio,
        "ceilings": {"memory": MEMORY_CEILING, "time": TIME_CEILING, "gradient": ERROR_CEILING},
        "ok": ratio <= MEMORY_CEILING
        and results["time_ratio"] <= TIME_CEILING
        and results["gradient_error"] <= ERROR_CEILING,
    }
    shape = {
        "anchors": args.anchors,
        "block": BLOCK,
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "rank": RANK,
    }
    say(f"memory {ratio:.4f}, time {results['time_ratio']:.3f} of the plain form's")
    machine = environment(DTYPES[args.dtype or "float32"])
    if args.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    emit("loss_step", machine, rounded({"shape": shape, **results}))


if __name__ == "__main__":
    main()
