"""vLLM's CPU worker with a DSpark proposer."""

from __future__ import annotations

import torch
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
