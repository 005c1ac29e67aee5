"""vLLM's CPU worker with a DSpark proposer."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.cpu_worker import CPUWorker

from dspark.integrations.vllm.proposer import DSparkProposer


class DSparkWorker(CPUWorker):
    """vLLM's CPU worker, whose V1 runner drafts by a `DSparkProposer`."""

    def init_device(self) -> None:
        """Make the runner, and put the proposer in the place of vLLM's own."""
        config = self.vllm_config.speculative_config.draft_model_config.hf_config
        if getattr(config, "mask_token_id", None) is None:
            config.mask_token_id = 0  # vLLM's proposer asks for one; ours may have learned it
        super().init_device()
        runner = self.model_runner
        runner.drafter = DSparkProposer(self.vllm_config, torch.device("cpu"), runner)
        runner.use_aux_hidden_state_outputs = True
        # vLLM 0.32 hands its CPU kernel an int64 copy of a float tensor to write to, and goes on
        # with uninitialised temperatures: sampled answers would not follow the target's law.
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: Tensor,
    cu_num_tokens: Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """What vLLM's function of this name promises: each request's value [R], once per token [T].

    Args:
        x: one value per request.
        cu_num_tokens: tokens of the requests up to each, that one included.
        num_tokens: T.
        replace_from: a value that is replaced.
        replace_to: by this one.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, replace_to, x)
    return values.repeat_interleave(counts.long(), output_size=num_tokens)
