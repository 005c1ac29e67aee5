"""Does vLLM, by the plug-in, keep as many drafts as our engine, and answer as it does plainly?

The same greedy prompts, one by one, go through our engine and through vLLM, with the same drafter
and target in the same dtype, and through vLLM without a drafter. Compared, prompt by prompt:
tokens gained per round of all prompts, with the 95 % interval of the difference when prompts are
drawn again, and the tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dspark
from benchmarks.common import DTYPES, add_machine_options, emit, environment, model_path
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.request import Output, Request, SamplingParams

BOOTSTRAPS = 4000
LIMIT_S = 900.0


def ask_vllm(
    python: str | Path,
    model: str | Path,
    asks: Sequence[Mapping[str, Any]],
    *,
    speculative: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_model_len: int = 1024,
    max_num_seqs: int = 16,
) -> list[list[dict[str, Any]]]:
    """What `vllm_answers` says in vLLM's Python, with this package's plug-in installed there.

    Raises:
        ValueError: vLLM failed; with the end of what it said.
    """
    job = {
        "model": str(model), "speculative": speculative, "dtype": dtype, "asks": list(asks),
        "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("job.json", "out.json")]
        paths[0].write_text(json.dumps(job))
        script = Path(__file__).with_name("vllm_answers.py")
        done = subprocess.run(
            [str(python), str(script), *map(str, paths)],
            check=False,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        if not paths[1].is_file():
            raise ValueError(f"vLLM failed: {done.stderr[-2000:]}")
        found: list[list[dict[str, Any]]] = json.loads(paths[1].read_text())
        return found


def lengths(ours: Sequence[Output], theirs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Tokens gained per round of all prompts, ours and vLLM's.

    The first token of an answer comes with the prompt. vLLM's own count of kept drafts goes on
    behind an end token and the limit, so that answers are counted instead.
    """
    one = sum(len(o.token_ids) - 1 for o in ours) / max(sum(o.stats.rounds for o in ours), 1)
    gained = sum(len(t["token_ids"][0]) - 1 for t in theirs)
    return one, gained / max(sum(t["rounds"] for t in theirs), 1)


def compare(
    ours: Sequence[Output],
    theirs: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    seed: int = 0,
) -> dict[str, Any]:
    """Both accepted lengths, the interval of their difference, and how many answers are equal."""
    generator, draws = random.Random(seed), []
    for _ in range(BOOTSTRAPS):
        some = generator.choices(range(len(ours)), k=len(ours))
        one, other = lengths([ours[i] for i in some], [theirs[i] for i in some])
        draws.append(other - one)
    draws.sort()
    low, high = draws[int(0.025 * BOOTSTRAPS)], draws[int(0.975 * BOOTSTRAPS)]
    one, other = lengths(ours, theirs)
    pairs = list(zip(theirs, plain, strict=True))
    return {
        "prompts": len(ours),
        "ours": one,
        "vllm": other,
        "difference": other - one,
        "ci95": [low, high],
        "equal": low <= 0 <= high,
        "same_rounds": sum(
            t["rounds"] == o.stats.rounds for t, o in zip(theirs, ours, strict=True)
        ),
        "same_as_plain": sum(t["token_ids"] == p["token_ids"] for t, p in pairs),
        "same_as_ours": sum(
            t["token_ids"][0] == list(o.token_ids) for t, o in zip(theirs, ours, strict=True)
        ),
    }


def measure(
    python: str | Path, target: Path, draft: Path, requests: Sequence[Request], dtype: str
) -> dict[str, Any]:
    """Answer every prompt in all three ways and compare.

    Raises:
        ValueError: vLLM failed.
    """
    model = dspark.load(target, draft, dtype=dtype, offline=True)
    assert model.drafter is not None
    ours = [model.engine([r], schedule="fixed").run([r])[0] for r in requests]
    ask = {
        "prompts": [list(r.prompt_ids) for r in requests],
        "max_tokens": requests[0].params.max_new_tokens,
        "temperature": 0.0,
        "one_by_one": True,
    }
    drafts = {"method": "dspark", "model": str(draft)}
    drafts |= {"num_speculative_tokens": model.drafter.block_size}
    found = []
    for speculative in (drafts, None):
        context = min(model.target.max_context, 1024)
        [answers] = ask_vllm(
            python, target, [ask], speculative=speculative, dtype=dtype, max_model_len=context
        )
        found.append(answers)
    return compare(ours, *found)


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_machine_options(parser)
    add = parser.add_argument
    add("--vllm", required=True, metavar="PYTHON", help="vLLM's Python, this package installed")
    add("--model", default="bundled", help="target directory")
    add("--draft", type=Path, help="drafter's directory; default: the one attached to the target")
    add("--data", type=Path, default=Path("../shared/data"), help="folder of prompts")
    add("--prompts", type=int, default=17, help="per domain")
    add("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Path(model_path(args.model))
    draft = args.draft or target / "dspark"
    model = dspark.load(target, "none", offline=True)
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=0.0, seed=args.seed)
    sets = [domain_requests(model, args.data, d, args.prompts, params) for d in DOMAINS]
    requests = [request for row in zip(*sets, strict=True) for request in row]
    said = measure(args.vllm, target, draft, requests, args.dtype or "float32")
    told = {"model": args.model, "drafter": str(draft)}
    emit("peer_vllm", environment(DTYPES[args.dtype or "float32"]), told | said)


if __name__ == "__main__":
    main()
