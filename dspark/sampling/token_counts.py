"""Which tokens a row has seen: the state that penalties read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCounts:
    """Token statistics of N rows.

    Attributes:
        prompt_NV: bool, whether the token occurs in the prompt.
        output_NV: int32, how often the token occurs in the output so far.
    """

    prompt_NV: Tensor
    output_NV: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> TokenCounts:
        """Count the tokens of each row's prompt and output."""
        prompt_NV = torch.zeros(len(prompts), vocab_size, dtype=torch.int32)
        output_NV = torch.zeros(len(outputs), vocab_size, dtype=torch.int32)
        for counts_NV, rows in ((prompt_NV, prompts), (output_NV, outputs)):
            for counts_V, tokens in zip(counts_NV, rows, strict=True):
                tokens_T = torch.tensor(tokens, dtype=torch.int64)
                counts_V.index_add_(0, tokens_T, torch.ones_like(tokens_T, dtype=torch.int32))
        return cls((prompt_NV > 0).to(device), output_NV.to(device))

    def commit(self, rows_T: Tensor, tokens_T: Tensor) -> None:
        """Count new output tokens in place: token t belongs to row rows_T[t]."""
        ones_T = torch.ones_like(tokens_T, dtype=torch.int32)
        self.output_NV.index_put_((rows_T, tokens_T), ones_T, accumulate=True)

    def rows(self, index_M: Tensor) -> TokenCounts:
        """The state of the rows named, in that order; copies."""
        return TokenCounts(self.prompt_NV[index_M], self.output_NV[index_M])

    def after_drafts(self, requests_N: Tensor, steps_N: Tensor, drafts_RK: Tensor) -> TokenCounts:
        """The state of draft rows, each with its own prefix (self holds one row per request).

        Args:
            requests_N: the request that row n belongs to.
            steps_N: how many of that request's drafts lie before row n, 0..K.
            drafts_RK: draft tokens; ids that no row counts must still be valid.

        Returns:
            New counts of N rows; self stays as it is.
        """
        before_NK = torch.arange(drafts_RK.shape[1], device=drafts_RK.device) < steps_N[:, None]
        output_NV = self.output_NV[requests_N].scatter_add_(
            1, drafts_RK[requests_N], before_NK.to(torch.int32)
        )
        return TokenCounts(self.prompt_NV[requests_N], output_NV)
