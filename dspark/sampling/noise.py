"""Randomness that is passed, never global: noise as a pure function of its key.

Every number here is a hash of (seed, counters...). Nothing is remembered between calls, so a draw
does not depend on what else is in the batch, on the order of calls or on the device.

The hash is splitmix64 (Steele, Lea & Flood 2014) read by random access, one level per counter:
level 0 turns the seed into a 64-bit state; each counter c then takes output c of the splitmix64
generator that starts at the state so far, and that output is the next state. Why this is enough:

- one level is exactly the published generator, which passes BigCrush; its finaliser changes every
  output bit with probability near 1/2 when one input bit changes, so neighbouring seeds, rounds,
  slots and tokens (all the structure that our keys have) give unrelated numbers;
- for fixed counters the map seed -> bits is a bijection, so no two seeds share a whole stream, and
  two keys of one seed meet only with the 2^-64 chance of a random 64-bit function;
- a draw needs fairness, not secrecy: who may choose seeds may choose outputs anyway.

Keys of the token and block verifiers are (seed, round, slot in the block, stream): the streams
make draft draws independent of verification, and the round makes every look at a position fresh.
Keyed by position alone, a block verifier would judge a position again with a number that its own
earlier decision has already conditioned, which biases the output. The coupled verifier alone is
keyed by (seed, position, token).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a uniform number is for: the last counter of its key."""

    DRAFT = 0
    """Draws the draft token of a slot."""
    VERIFY = 1
    """Decides whether the draft of a slot stays."""
    NEXT = 2
    """Draws the token after the kept prefix, and the first token of a request."""
    COUPLED = 3
    """Gumbel noise of the coupled verifier."""


def _signed(number: int) -> int:
    """Reduce an integer modulo 2^64 and read it as int64, the only 64-bit type torch computes."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_FEW_TOKENS = 4096  # up to here the noise of all tokens costs less than calls for each row
_SLACK = 1 + 1e-5  # more than rounding to fp32 can hide

FloatArray = npt.NDArray[np.float32]


def seed_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds of any size and sign as int64 [N], modulo 2^64."""
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)


def uniform(seed_N: Tensor, *counters: Tensor | int) -> Tensor:
    """Uniform numbers strictly between 0 and 1, a pure function of (seed, counters...).

    Only integer arithmetic and one exact conversion: bit-equal on every device.

    Args:
        seed_N: int64 seeds.
        counters: non-negative int64 tensors or numbers, in order of significance, broadcast
            together and with the seeds.

    Returns:
        float64 of the broadcast shape; multiples of 2^-52 plus 2^-53, so never 0 nor 1.
    """
    return _to_unit(_bits(seed_N, *counters))


def gumbel(seed_N: Tensor, position_N: Tensor, tokens_NC: Tensor) -> Tensor:
    """Standard Gumbel noise for the coupled verifier, keyed by (seed, position, token).

    Args:
        seed_N: int64 seeds of the rows' requests.
        position_N: int64 absolute positions of the tokens to be drawn.
        tokens_NC: tokens of each row, or [C] for all rows.

    Returns:
        float64 [N, C], -log(-log u). Two logarithms may differ between devices in the last bit,
        the uniforms under them do not.
    """
    row_N = _bits(seed_N, Stream.COUPLED, position_N)
    uniform_NC = _to_unit(_advance(row_N[:, None], tokens_NC))
    return uniform_NC.log_().neg_().log_().neg_()


def most_noisy(
    probs_NC: Tensor, seed_N: Tensor, position_N: Tensor, tokens_C: Tensor | None = None
) -> Tensor:
    """The column of argmax(log p + g) of each row [N], the lowest of equal ones.

    A token wins the race of -log(u) / p, and -log(u) is at least 1 - u; so without a logarithm all
    tokens are ruled out that cannot be as fast as one whose time is known, and noise and logarithms
    are computed for the few that are left.

    Args:
        probs_NC: probabilities, not all 0 in any row.
        seed_N: int64 seeds of the rows' requests.
        position_N: int64 absolute positions of the tokens to be drawn.
        tokens_C: the token of each column; None where column c is token c.
    """
    if tokens_C is None:
        tokens_C = torch.arange(probs_NC.shape[1], device=probs_NC.device)
    if probs_NC.device.type != "cpu" or probs_NC.shape[1] <= _FEW_TOKENS:
        noise_NC = gumbel(seed_N, position_N, tokens_C)
        return noise_NC.add_(probs_NC.to(torch.float64).log()).argmax(dim=1)
    steps_C, row_N = (tokens_C + 1) * _GOLDEN, _bits(seed_N, Stream.COUPLED, position_N)
    best = [_fastest(probs_C, row + steps_C) for probs_C, row in zip(probs_NC, row_N, strict=True)]
    return torch.tensor(best)


def _fastest(probs_C: Tensor, state_C: Tensor) -> int:
    bits_C = _mix_on_host(state_C)
    # In units of 2^-32, 1 - u lies above gap - 1 and not above gap.
    gap_C = torch.from_numpy(_gap(bits_C))
    first = int((gap_C / probs_C).argmin())
    time = float(_to_unit(bits_C[first]).log().neg() / probs_C[first].double())
    longest_C = (probs_C * (time * (1 << 32) * _SLACK)).add_(1)
    left_L = torch.nonzero(gap_C <= longest_C).squeeze(1)
    noise_L = _to_unit(bits_C[left_L]).log_().neg_().log_().neg_()
    return int(left_L[noise_L.add_(probs_C[left_L].to(torch.float64).log()).argmax()])


def _bits(seed_N: Tensor, *counters: Tensor | int) -> Tensor:
    state = _mix(seed_N + _GOLDEN)
    for counter in counters:
        state = _advance(state, counter)
    return state


def _advance(state: Tensor, counter: Tensor | int) -> Tensor:
    """Output number `counter` of the splitmix64 generator that starts at `state`."""
    if isinstance(counter, int):
        return _mix(state + _signed(_GOLDEN * (counter + 1)))
    return _mix(state + (counter + 1) * _GOLDEN)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)).mul_(_MIX_1)
    bits = bits.bitwise_xor_(_shift(bits, 27)).mul_(_MIX_2)
    return bits.bitwise_xor_(_shift(bits, 31))


def _mix_on_host(state_C: Tensor) -> Tensor:
    """`_mix` in place: unsigned numbers of numpy need no masks, and are several times as fast."""
    bits_C = state_C.numpy().view(np.uint64)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        bits_C ^= bits_C >> np.uint64(shift)
        if factor is not None:
            bits_C *= np.uint64(factor % (1 << 64))
    return state_C


def _gap(bits_C: Tensor) -> FloatArray:
    """2^32 less the upper 32 bits, in fp32, rounded last."""
    halves = bits_C.numpy().view(np.uint32)
    gap: FloatArray = (~halves[int(sys.byteorder == "little") :: 2]).astype(np.float32)
    gap += 1
    return gap


def _shift(bits: Tensor, count: int) -> Tensor:
    """Shift right without dragging the sign in."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _to_unit(bits: Tensor) -> Tensor:
    """The upper 52 bits as the middle of one of 2^52 equal cells of (0, 1), exact in float64."""
    return _shift(bits, 12).to(torch.float64).add_(0.5).mul_(math.ldexp(1.0, -52))
