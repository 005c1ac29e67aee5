from __future__ import annotations

import math

import pytest
import torch

from dspark.sampling import noise
from dspark.sampling.noise import Stream, gumbel, seed_tensor, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def slow_mix(bits):
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def slow_uniform(seed, *counters):
    state = slow_mix((seed + GOLDEN) & MASK)
    for counter in counters:
        state = slow_mix((state + GOLDEN * (counter + 1)) & MASK)
    return ((state >> 12) + 0.5) / 2**52


def test_one_level_is_the_published_splitmix64():
    """First outputs of the reference implementation for seed 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = seed_tensor([1234567])
    got = [int(noise._advance(state, n)) & MASK for n in range(5)]
    assert got == published
    assert [int(b) & MASK for b in noise._advance(state, torch.arange(5))] == published


def test_uniform_equals_plain_python_integers():
    seeds = [0, 1, -1, 2**63, 2**64 + 5, -(2**70), 12345678901234567890]
    got = uniform(seed_tensor(seeds), 3, torch.tensor([0, 1, 2, 3, 2**40, 5, 6]), Stream.NEXT)
    counters = [0, 1, 2, 3, 2**40, 5, 6]
    want = [slow_uniform(s, 3, c, Stream.NEXT) for s, c in zip(seeds, counters, strict=True)]
    assert got.dtype == torch.float64
    assert got.tolist() == want


def test_numbers_and_tensors_are_the_same_counter_and_broadcast():
    seeds = seed_tensor(range(4))
    grid = uniform(seeds[:, None], 7, torch.arange(3), Stream.VERIFY)
    assert grid.shape == (4, 3)
    for slot in range(3):
        assert torch.equal(grid[:, slot], uniform(seeds, 7, slot, Stream.VERIFY))


def test_extreme_bits_stay_inside_the_open_interval():
    ends = noise._to_unit(torch.tensor([0, -1]))
    assert ends.tolist() == [2.0**-53, 1 - 2.0**-53]
    assert torch.isfinite(-torch.log(-torch.log(ends))).all()


def test_gumbel_depends_on_its_key_alone():
    """Not on the batch, the order of rows or the vocabulary's width."""
    seeds, positions = seed_tensor([5, 6, 5]), torch.tensor([0, 9, 1])
    together = gumbel(seeds, positions, torch.arange(50))
    for n in (2, 0, 1):
        alone = gumbel(seeds[n : n + 1], positions[n : n + 1], torch.arange(20))
        assert torch.equal(alone[0], together[n, :20])
    want = -math.log(-math.log(slow_uniform(6, Stream.COUPLED, 9, 17)))
    assert float(together[1, 17]) == pytest.approx(want, abs=1e-12)


def keyed_series():
    """Series of 2^16 uniforms, each running over one part of the key that an engine varies."""
    run = torch.arange(1 << 16)
    one = seed_tensor([42])
    return {
        "seeds": uniform(run, 0, 0, Stream.DRAFT),
        "rounds": uniform(one, run, 0, Stream.DRAFT),
        "slots": uniform(one, 0, run, Stream.DRAFT),
        "streams": uniform(one, 0, 0, run),
        "seed and round together": uniform(run, run, 0, Stream.DRAFT),
        "round and slot": uniform(one, run // 8, run % 8, Stream.VERIFY),
        "tokens": torch.exp(-torch.exp(-gumbel(one, torch.tensor([3]), torch.arange(1 << 16))[0])),
        "strided seeds": uniform(run << 40, 0, 0, Stream.DRAFT),
    }


@pytest.mark.parametrize("name", list(keyed_series()))
def test_uniformity(name):
    values = keyed_series()[name]
    cells = 256
    expected = len(values) / cells
    low_bits = (values * 2.0**44) % 1.0  # the tail of the mantissa must be uniform too
    for series in (values, low_bits):
        counts = torch.histc(series, cells, 0, 1)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert 165 < chi2 < 365  # 255 degrees of freedom: about 4 to 5 standard deviations


@pytest.mark.parametrize("name", list(keyed_series()))
def test_no_serial_dependence(name):
    """Neighbours in a series: correlation, and all cells of the unit square."""
    values = keyed_series()[name]
    for lag in (1, 2, 8):
        one, other = values[:-lag], values[lag:]
        correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
        assert abs(correlation) < 4.5 / math.sqrt(len(one))
        cells = (one * 16).long() * 16 + (other * 16).long()
        expected = len(one) / 256
        counts = torch.bincount(cells, minlength=256)
        assert 165 < float(((counts - expected) ** 2 / expected).sum()) < 365


def test_no_dependence_between_parts_of_the_key():
    """Streams, slots, rounds and adjacent seeds, pair by pair over the same other counters."""
    run = torch.arange(1 << 15)
    seeds = seed_tensor([7])
    series = [uniform(seeds, run, slot, stream) for slot in range(3) for stream in Stream]
    series += [uniform(seeds + step, run, 0, Stream.DRAFT) for step in (1, 2, 3)]
    series += [uniform(seeds, run + 1, 0, Stream.DRAFT), uniform(seeds, 0, run, Stream.DRAFT)]
    table = torch.corrcoef(torch.stack(series)).fill_diagonal_(0)
    assert float(table.abs().max()) < 5 / math.sqrt(len(run))


def test_gumbel_max_follows_the_law():
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    trials = 100_000
    for seeds, positions in (
        (torch.arange(trials), torch.zeros(trials, dtype=torch.int64)),
        (torch.zeros(trials, dtype=torch.int64), torch.arange(trials)),
    ):
        tokens = (law.log() + gumbel(seeds, positions, torch.arange(4))).argmax(1)
        counts = torch.bincount(tokens, minlength=4)
        chi2 = float(((counts - law * trials) ** 2 / (law * trials)).sum())
        assert chi2 < 17  # 3 degrees of freedom: p = 7e-4
