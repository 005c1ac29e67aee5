"""What the bundled drafter really offers: recorded rounds, replayed as the traffic of any load."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from benchmarks.common import load_pair
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.engine.speculation.round_record import RoundRecord
from dspark.request import SamplingParams
from dspark.scheduling.calibration import Rounds, TemperatureScaling, fit
from dspark.scheduling.survival import survival
from dspark.simulation.traffic import FloatArray, Record


@dataclass
class Streams:
    """Rounds in which a full block was verified, request by request.

    Attributes:
        num_drafts: K.
        logits: per request and round, K confidence logits.
        accepted: per request and round, drafts that stayed.
    """

    num_drafts: int
    logits: dict[int, list[FloatArray]] = field(default_factory=lambda: defaultdict(list))
    accepted: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, record: RoundRecord) -> None:
        """Take note of a round."""
        if record.confidence_logits_RK is None:
            return
        for row, request in enumerate(record.request_ids):
            if record.lengths[row] == self.num_drafts:
                self.logits[request].append(record.confidence_logits_RK[row])
                self.accepted[request].append(record.accepted[row])

    def rounds(self) -> Rounds:
        """All of them, to fit temperatures on."""
        logits_NK = np.array([row for rows in self.logits.values() for row in rows])
        accepted_N = np.array([n for rows in self.accepted.values() for n in rows])
        return Rounds.of(logits_NK, accepted_N, np.full(len(accepted_N), self.num_drafts))

    def record(self, scaling: TemperatureScaling, requests: int, rounds: int, seed: int) -> Record:
        """Replay: each of R slots runs through requests in an order of its own, over and over."""
        generator = np.random.default_rng((seed, requests))
        names = sorted(self.accepted)
        shape = (rounds, requests)
        logits_TRK = np.empty((*shape, self.num_drafts))
        accepted_TR = np.empty(shape, dtype=np.int64)
        generation_TR = np.empty(shape, dtype=np.int64)
        for slot in range(requests):
            at = generation = 0
            while at < rounds:
                name = names[generator.integers(len(names))]
                part = slice(at, min(at + len(self.accepted[name]), rounds))
                count = part.stop - part.start
                logits_TRK[part, slot] = self.logits[name][:count]
                accepted_TR[part, slot] = self.accepted[name][:count]
                generation_TR[part, slot] = generation
                at, generation = part.stop, generation + 1
        confidence_NK = scaling.apply(logits_TRK.reshape(-1, self.num_drafts))
        survival_TRK = survival(confidence_NK).reshape(logits_TRK.shape)
        return Record(survival_TRK, survival_TRK, accepted_TR, generation_TR)


def bundled_streams(args: argparse.Namespace) -> dict[str, tuple[Streams, TemperatureScaling]]:
    """Rounds of the bundled pair on held-out prompts of all domains, greedy and at T = 1.

    Half of the prompts are for the temperatures, the other half is replayed.
    """
    model = load_pair("bundled", "float32")
    assert model.drafter is not None
    found = {}
    for name, temperature in (("bundled, T = 0", 0.0), ("bundled, T = 1", 1.0)):
        params = SamplingParams(128, temperature=temperature, seed=args.seed)
        requests = [
            request
            for domain in DOMAINS
            for request in domain_requests(model, args.data, domain, args.prompts, params)
        ]
        halves = [Streams(model.drafter.block_size) for _ in range(2)]
        for number, streams in enumerate(halves):
            half = requests[number::2]
            engine = model.engine(half, batch_size=32, schedule="fixed", watch=streams)
            engine.run(half)
        found[name] = (halves[1], fit(halves[0].rounds(), "block"))
    return found
