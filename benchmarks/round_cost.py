"""What a round costs beside the target's forward: drafting, distributions, draws, verification.

A target and a random DSpark drafter of two layers (rank 128, seven drafts; its logits are scaled to
the spread of a trained one, so that top-p keeps some tens of tokens) go on with 1, 8 and 32 pieces
of a text at several settings: with the whole vocabulary, with 8,192 draft tokens, and with the
likeliest candidates of each slot alone. `--draft` names a trained drafter instead: then texts make
sense, and rows are as sharp as when serving. Milliseconds are medians over rounds; `share` is what
is left of a round without the target's forward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import dspark
from benchmarks.common import DTYPES, add_machine_options, emit, environment, say
from dspark.attention.paged_cache import PagedCache
from dspark.drafters.base import DraftBatch, Draw, Proposal
from dspark.drafters.config import BackboneConfig, DSparkConfig, evenly_spaced_taps
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine import round as round_module
from dspark.engine.engine import Engine
from dspark.engine.speculation import speculator
from dspark.engine.speculation.draft import Drawing
from dspark.request import Request, SamplingParams, Verifier
from dspark.targets.target import Target

DRAFTS, SPREAD, PROMPT_TOKENS = 7, 4.75, 16
TEXT = (
    "The harbour froze in the first week of January, and for eleven days no boat left the town. "
    "People walked across the ice to the island, where the baker had opened his shop again, and "
    "came back with bread under their coats. On the twelfth day the wind turned to the south."
)
SETTINGS: dict[str, tuple[Verifier, dict[str, float]]] = {
    "T0": ("block", {"temperature": 0.0}),
    "T1-top-p": ("block", {"temperature": 1.0, "top_p": 0.95}),
    "T1": ("block", {"temperature": 1.0}),
    "token-top-p": ("token", {"temperature": 1.0, "top_p": 0.95}),
    "coupled-top-p": ("coupled", {"temperature": 1.0, "top_p": 0.95}),
    "coupled": ("coupled", {"temperature": 1.0}),
}


class Spread(DSparkDrafter):
    """A drafter whose logits have the spread of a trained one's."""

    factor: float | None = None

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        def scaled(step: int, logits_RC: Tensor, *tokens: Tensor | None) -> Tensor:
            if self.factor is None:
                self.factor = SPREAD / float(logits_RC[0].std())
                with torch.no_grad():
                    self.norm.weight.mul_(self.factor)
                    assert self.markov_head is not None
                    self.markov_head.markov_w2.weight.mul_(self.factor)
                self._drop_plan()
            return draw(step, logits_RC, *tokens)

        return super().propose(context, batch, scaled)


def random_drafter(target: Target, known: int | None) -> DSparkDrafter:
    """Two layers as wide as the target's."""
    width, taps = target.hidden_size, evenly_spaced_taps(target.num_layers, 3)
    heads = max(1, width // 64)
    backbone = BackboneConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=next((heads // n for n in (3, 2) if heads % n == 0), heads),
        head_dim=64,
        num_taps=len(taps),
    )
    config = DSparkConfig(
        backbone,
        vocab_size=target.vocab_size,
        block_size=DRAFTS,
        mask_token_id=0,
        target_layer_ids=taps,
        num_target_layers=target.num_layers,
        markov_rank=128,
        draft_vocab_size=known,
    )
    tokens = None if known is None else torch.arange(known)
    generator = torch.Generator().manual_seed(0)
    return Spread.from_target(
        target.parts(), config, generator=generator, draft_tokens=tokens
    ).eval()


@dataclass
class Clock:
    """Milliseconds by part, added up over the round in hand."""

    spent: dict[str, float] = field(default_factory=dict)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                took = (time.perf_counter() - started) * 1e3
                self.spent[name] = self.spent.get(name, 0.0) + took

        return timed


@contextmanager
def timed() -> Iterator[Clock]:
    """Time the parts of every round."""
    clock = Clock()
    with (
        patch.object(Target, "forward", clock.around("forward", Target.forward)),
        patch.object(Drawing, "__call__", clock.around("draws", Drawing.__call__)),
        patch.object(speculator, "propose", clock.around("draft", speculator.propose)),
        patch.object(round_module, "verify", clock.around("verify", round_module.verify)),
    ):
        yield clock


def measure(
    target: Target, drafter: DSparkDrafter, setting: str, requests: int, rounds: int
) -> dict[str, float]:
    """Median milliseconds of the parts of a round."""
    verifier, params = SETTINGS[setting]
    engine = Engine(target, drafter, max_requests=requests, max_length=256, verifier=verifier)
    tokens = target.tokenizer.encode(TEXT)
    for number in range(requests):
        prompt = tokens[number : number + PROMPT_TOKENS]
        engine.add(Request(tuple(prompt), SamplingParams(200, seed=number, **params)))
    found: list[dict[str, float]] = []
    with timed() as clock:
        while len(found) < rounds + 2:
            clock.spent.clear()
            started = time.perf_counter()
            engine.step()
            whole = (time.perf_counter() - started) * 1e3
            if "draft" in clock.spent:
                found.append({"round": whole, **clock.spent})
    median = {
        name: statistics.median(row[name] for row in found[2:])
        for name in ("round", "forward", "draft", "draws", "verify")
    }
    median["draft"] -= median["draws"]
    median["share"] = statistics.median(1 - row["forward"] / row["round"] for row in found[2:])
    return median


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_machine_options(parser)
    parser.add_argument("--model", required=True, help="target: a directory or a name")
    parser.add_argument("--draft", help="a trained drafter in place of random ones")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--draft-vocab", type=int, nargs="+", default=[0, 8192], help="0: all")
    parser.add_argument(
        "--draft-top-k", type=int, nargs="+", default=[0, 64], help="candidates of a slot; 0: all"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype or "float32"]
    if args.draft:
        loaded = dspark.load(args.model, args.draft, device="cpu", dtype=args.dtype or "auto")
        target, given = loaded.target, loaded.drafter
        assert isinstance(given, DSparkDrafter)
        args.draft_vocab = [given.config.draft_vocab_size or 0]
    else:
        target, given = Target.load(args.model, device="cpu", dtype=dtype), None
    rows = []
    parts = "round  forward  draft  draws  verify  share"
    say(f"{'setting':14} {'known':>6} {'top':>4} {'R':>3}  {parts}")
    for known in args.draft_vocab:
        drafter = given or random_drafter(target, known or None)
        measure(target, drafter, "T0", 1, 1)  # scales a random drafter by its whole logits
        ways = product(args.requests, args.draft_top_k, args.settings)
        for requests, top_k, setting in ways:
            drafter.draft_top_k = top_k or None
            found = measure(target, drafter, setting, requests, args.rounds)
            named = {"setting": setting, "known": known, "top_k": top_k, "requests": requests}
            rows.append(named | found)
            say(
                f"{setting:14} {known or target.vocab_size:6} {top_k or '-':>4} {requests:3} "
                f"{found['round']:6.1f} {found['forward']:8.1f} {found['draft']:6.1f} "
                f"{found['draws']:6.1f} {found['verify']:7.1f} {found['share']:6.2f}"
            )
        drafter.draft_top_k = None
    emit("round_cost", environment(dtype), {"rows": rows})


if __name__ == "__main__":
    main()
