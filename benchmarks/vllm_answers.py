"""Answers of vLLM, and how many drafts it kept: runs in vLLM's own Python, alone.

`python vllm_answers.py JOB OUT`: JOB is a JSON file with `model`, `speculative` (its
speculative_config, or null), `dtype`, `max_model_len` and `asks`, a list of `prompts` (token ids),
`max_tokens`, `temperature`, `n` and `one_by_one`. OUT gets, for each ask, a list with one entry a
prompt: `token_ids` of its n answers and, where prompts go one by one, `rounds`, `drafted` and
`accepted`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
_COUNTERS = {
    "rounds": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}


def answer(llm: Any, ask: dict[str, Any]) -> list[dict[str, Any]]:
    """One ask's answers."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        temperature=ask["temperature"],
        max_tokens=ask["max_tokens"],
        n=ask.get("n", 1),
        seed=ask.get("seed"),
        ignore_eos=ask.get("ignore_eos", False),
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in ask["prompts"]]
    batches = [[p] for p in prompts] if ask.get("one_by_one") else [prompts]
    found: list[dict[str, Any]] = []
    for batch in batches:
        before = counted(llm)
        outputs = llm.generate(batch, params, use_tqdm=False)
        gained = {name: value - before[name] for name, value in counted(llm).items()}
        for output in outputs:
            ids = [list(one.token_ids) for one in output.outputs]
            found.append({"token_ids": ids} | (gained if ask.get("one_by_one") else {}))
    return found


def counted(llm: Any) -> dict[str, int]:
    """What vLLM has counted of speculation so far."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {ours: int(values.get(theirs, 0)) for ours, theirs in _COUNTERS.items()}


def main(job_path: str, out_path: str) -> None:
    """Answer a job."""
    from vllm import LLM

    job = json.loads(Path(job_path).read_text())
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=job["max_model_len"],
        max_num_seqs=job.get("max_num_seqs", 16),
        disable_log_stats=False,
        speculative_config=job["speculative"],
        seed=0,
    )
    Path(out_path).write_text(json.dumps([answer(llm, ask) for ask in job["asks"]]))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(*sys.argv[1:])
