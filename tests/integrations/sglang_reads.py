"""Runs in SGLang's Python: what its own parsers make of files and arguments, as JSON.

`python sglang_reads.py JOBS`: a JSON list of objects with `arguments` (a list), `directory` and
`vocab`.
"""

import argparse
import json
import sys

from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
from sglang.srt.speculative.dspark_components import dspark_config
from sglang.srt.speculative.dspark_components.dspark_sts import load_sts_calibration_from_path
from sglang.srt.utils.hf_transformers_utils import get_config


def parsed_arguments(arguments):
    """What the server's own command line says of speculation."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    found = vars(parser.parse_args(arguments))
    return {k: v for k, v in found.items() if k.startswith("speculative_") and v is not None}


def read_blocks(config, arguments, vocab):
    """A DSPARK or DFLASH drafter."""
    base = parse_dflash_draft_config(draft_hf_config=config)
    said = {"block_size": base.block_size, "mask": base.mask_token_id}
    said["taps"] = base.resolve_target_layer_ids(target_num_layers=base.num_target_layers)
    if arguments["speculative_algorithm"] == "DFLASH":
        return said
    drafts = arguments["speculative_dspark_block_size"]
    runtime = dspark_config.resolve_runtime_config(
        draft_hf_config=config,
        speculative_num_draft_tokens=drafts + 1,
        target_vocab_size=vocab,
    )
    head = dspark_config.parse_dspark_draft_config(draft_hf_config=config)
    return said | {
        "drafts": runtime.gamma,
        "head": head.markov_head_type,
        "rank": head.markov_rank,
        "from_anchor": dspark_config.get_dspark_sample_from_anchor(config),
    }


def read(job):
    """What is read of a job."""
    arguments = parsed_arguments(["--model-path", "target", *job["arguments"]])
    config = get_config(job["directory"], trust_remote_code=False)
    said = {"arguments": arguments, "architecture": config.architectures[0]}
    if arguments["speculative_algorithm"] == "EAGLE3":
        said["taps"] = config.eagle_config["eagle_aux_hidden_state_layer_ids"]
        said["vocab"] = config.draft_vocab_size
    else:
        said |= read_blocks(config, arguments, job["vocab"])
    if "speculative_dspark_confidence_sts_path" in arguments:
        path = arguments["speculative_dspark_confidence_sts_path"]
        said["temperatures"] = load_sts_calibration_from_path(path).temperatures
    return said


if __name__ == "__main__":
    found = [read(job) for job in json.loads(sys.argv[1])]
    print("\n" + json.dumps(found))
