"""Does llama.cpp keep as many drafts as our engine, and answer as it does without a drafter?

The same greedy prompts go through our engine and through `llama-speculative-simple`, with the same
drafter (a GGUF file that `dspark convert --to gguf` wrote) and the same target (one of its GGUF
files), and once more through that program with a drafter that never drafts. Compared, prompt by
prompt: tokens gained per round of all prompts, with the 95 % interval of the difference when
prompts are drawn again, and the texts. Near-ties may fall otherwise in another arithmetic (the
engine decodes in float32, llama.cpp rounds activations to the type of the weights), after which
answers of both go apart, and their accepted lengths with them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dspark
from benchmarks.common import DTYPES, add_machine_options, emit, environment, say
from benchmarks.llama_cpp import DETAILED, SpeculativeRun, run_speculative
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.checkpoints.gguf_writer import spec_flags
from dspark.engine.model import Model
from dspark.request import Output, Request, SamplingParams

BOOTSTRAPS = 4000
# Prompt lookup that needs a million hits drafts nothing: plain decoding by the same program.
PLAIN = ("--spec-type", "ngram-simple", "--spec-ngram-simple-min-hits", "1000000")


@dataclass(frozen=True)
class Pair:
    """One prompt: our answer with the drafter, and llama.cpp's with it and without.

    All begin with our first token; `text` is ours behind it. `their_tokens` and `their_rounds` are
    what llama.cpp gained up to an end token and the limit, and in how many rounds.
    """

    ours: Output
    text: str
    their_tokens: int
    their_rounds: int
    theirs: SpeculativeRun
    plain: SpeculativeRun


def measure(
    model: Model,
    requests: Sequence[Request],
    *,
    folder: Path,
    target: Path,
    draft: Path,
    threads: int,
) -> list[Pair]:
    """Answer every prompt in all three ways.

    Raises:
        ValueError: a program of llama.cpp failed.
    """
    drafter = load_drafter(draft)
    kind = spec_flags(drafter).split()
    pairs = []
    for i, request in enumerate(requests):
        (ours,) = model.engine([request], schedule="fixed").run([request])
        # The program drafts from its prompt's last token on; our engine draws one token first.
        begun = (*request.prompt_ids, ours.token_ids[0])
        prompt = model.target.tokenizer.decode(begun)
        tokens = request.params.max_new_tokens - 1
        # Near its own limit the program drafts otherwise, so that this lies behind ours.
        most = tokens + drafter.block_size + 2
        common = (*DETAILED, "-t", str(threads), "-c", str(len(begun) + most + 64))
        theirs, plain = (
            run_speculative(folder, target, file, prompt, most, (*own, *common))
            for file, own in ((draft, (*kind, "-td", str(threads))), (None, PLAIN))
        )
        first = model.target.tokenizer.decode(begun[-1:])
        text, got = ours.text.removeprefix(first), gained(theirs, plain, tokens)
        pairs.append(Pair(ours, text, *got, theirs, plain))
        say(f"{i + 1} of {len(requests)}: {_lengths(pairs)}")
    return pairs


def gained(theirs: SpeculativeRun, plain: SpeculativeRun, limit: int) -> tuple[int, int]:
    """Tokens up to an end token and the limit, and the rounds that they took.

    Behind an end token the program's count goes on to the end of the round; plain decoding's does
    not.
    """
    alike = same_text(theirs.text, plain.text)
    end, total = min(limit, plain.tokens if alike else theirs.tokens), 0
    for rounds, gain in enumerate(theirs.gains, start=1):
        total += gain
        if total >= end:
            return end, rounds
    return total, len(theirs.gains)


def _lengths(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Accepted lengths of all prompts together, ours and llama.cpp's."""
    ours = sum(p.ours.stats.tokens for p in pairs) / max(sum(p.ours.stats.rounds for p in pairs), 1)
    rounds = sum(p.their_rounds for p in pairs)
    return ours, sum(p.their_tokens for p in pairs) / max(rounds, 1)


def compare(pairs: Sequence[Pair], requests: Sequence[Request], seed: int = 0) -> dict[str, Any]:
    """Both accepted lengths, the interval of their difference, and how many texts are equal."""
    generator = random.Random(seed)
    draws = []
    for _ in range(BOOTSTRAPS):
        ours, theirs = _lengths(generator.choices(pairs, k=len(pairs)))
        draws.append(theirs - ours)
    draws.sort()
    ours, theirs = _lengths(pairs)
    low, high = draws[int(0.025 * BOOTSTRAPS)], draws[int(0.975 * BOOTSTRAPS)]
    return {
        "prompts": len(pairs),
        "ours": ours,
        "llama_cpp": theirs,
        "difference": theirs - ours,
        "ci95": [low, high],
        "equal": low <= 0 <= high,
        "same_prompt_tokens": sum(
            p.theirs.prompt_tokens == len(r.prompt_ids) + 1
            for p, r in zip(pairs, requests, strict=True)
        ),
        "same_rounds": sum(p.ours.stats.rounds == p.their_rounds for p in pairs),
        "same_text_as_plain": sum(same_text(p.theirs.text, p.plain.text) for p in pairs),
        "same_text_as_ours": sum(same_text(p.text, p.theirs.text) for p in pairs),
    }


def same_text(one: str, other: str) -> bool:
    """Whether two answers are equal, up to the limit of tokens, which a last round may pass."""
    one, other = one.strip(), other.strip()
    return one.startswith(other) or other.startswith(one)


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_machine_options(parser)
    add = parser.add_argument
    add("--model", default="bundled", help="target directory")
    add("--draft", help="drafter for our engine; default: the GGUF file itself")
    add("--llama-cpp", type=Path, required=True, metavar="BIN_DIR")
    add("--gguf", type=Path, required=True, metavar="FILE", help="the target")
    add("--gguf-draft", type=Path, required=True, metavar="FILE", help="the drafter")
    add("--data", type=Path, default=Path("../shared/data"), help="folder of prompts")
    add("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    add("--prompts", type=int, default=12, help="per domain")
    add("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draft = args.draft or args.gguf_draft
    model = dspark.load(args.model, draft, dtype=args.dtype or "auto", offline=True)
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=0.0, seed=args.seed)
    sets = [domain_requests(model, args.data, d, args.prompts, params) for d in args.domains]
    requests = [request for row in zip(*sets, strict=True) for request in row]
    pairs = measure(
        model,
        requests,
        folder=args.llama_cpp,
        target=args.gguf,
        draft=args.gguf_draft,
        threads=args.threads,
    )
    said = {"model": args.model, "drafter": str(args.gguf_draft), "target": str(args.gguf)}
    emit(
        "peer_drafters",
        environment(DTYPES[args.dtype or "float32"]),
        said | compare(pairs, requests),
    )


if __name__ == "__main__":
    main()
