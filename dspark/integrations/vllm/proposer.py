"""DSpark drafting in vLLM's V1 runner: our drafter behind its interface, and the CPU worker.

The drafter's context lies in a paged cache of ours with vLLM's own page numbers, so that a prefix
that vLLM finds in its cache brings its draft context with it, and a page that vLLM gives to
another request is overwritten with that request's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.cpu_worker import CPUWorker

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.checkpoints.from_target import TargetTables
from dspark.errors import CompatibilityError
from dspark.integrations.vllm import refuse_config, refuse_drafter
from dspark.targets.families import FAMILIES, Family


class DSparkProposer(EagleProposer):
    """A vLLM proposer that asks a `DSparkDrafter`."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self._runner = runner
        self._vocab = vllm_config.model_config.get_vocab_size()
        self._checked = False
        self._context: PagedCache | None = None
        refuse_config(vllm_config)

    def load_model(self, target_model: Any) -> None:  # noqa: ARG002
        """Load the drafter and bind it to the target's tables; name the layers to capture.

        Raises:
            CompatibilityError: vLLM cannot run this drafter.
        """
        spec, model = self.speculative_config, self.vllm_config.model_config
        drafter = load_drafter(spec.model, revision=spec.revision)
        refuse_drafter(drafter, self.num_speculative_tokens)
        tables = TargetTables.read(model.model, revision=model.revision).as_dtype(self.dtype)
        text = model.hf_text_config
        family = FAMILIES.get(text.model_type, Family())
        scale = float(text.hidden_size) ** 0.5 if family.scaled_embedding else 1.0
        cap = getattr(text, "final_logit_softcapping", None)
        parts = replace(tables, embedding_scale=scale, logit_softcap=cap)
        drafter.bind(parts, num_target_layers=tables.num_layers)
        drafter.draft_top_k = spec.dspark_draft_topk
        self.drafter = drafter
        # vLLM counts a captured layer as the input of the next one.
        taps = [layer + 1 for layer in drafter.taps]
        self.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids = taps
        # Context rows of a step must not be lost where one request is about to end by its length:
        # ours need no room behind the anchor.
        self._runner.effective_drafter_max_model_len = 2**62

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Allocate the draft context, one row for every row of the target's cache.

        Raises:
            CompatibilityError: no group of the target's layers keeps all tokens.
        """
        groups = enumerate(kv_cache_config.kv_cache_groups)
        full = [g for g, group in groups if isinstance(group.kv_cache_spec, FullAttentionSpec)]
        if not full:
            raise CompatibilityError(
                "The target has no layers of full attention in vLLM, whose pages the draft context "
                "would share; serve this target with dspark."
            )
        self.kv_cache_gid = full[0]
        size = kv_cache_config.kv_cache_groups[full[0]].kv_cache_spec.block_size
        self.block_size = kernel_block_sizes[full[0]] if kernel_block_sizes else size
        pages = kv_cache_config.num_blocks * (size // self.block_size)
        shapes = self.drafter.context_shapes
        self._context = PagedCache(shapes, pages, self.block_size, self.dtype, self.device)

    def initialize_cudagraph_keys(self, cudagraph_mode: Any) -> None:
        """Nothing is captured."""

    def dummy_run(self, *_args: Any, **_options: Any) -> None:
        """Nothing needs a warm-up."""

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,  # noqa: ARG002
        common_attn_metadata: Any,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,  # noqa: ARG002
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Append the step's context rows, then draft; int64 [requests, drafts].

        Args:
            num_speculative_tokens: drafts of each request.
            target_token_ids: tokens [T] that the target has just read, rejected drafts included.
            target_positions: their positions.
            target_hidden_states: their captured features [T, F].
            next_token_ids: each request's anchor.
            token_indices_to_sample: not read; the counts of rejected tokens say the same.
            common_attn_metadata: where each request's rows are, and its pages.
            sampling_metadata: temperatures.
            mm_embed_inputs: not read.
            num_rejected_tokens_gpu: rejected drafts at the end of each request's rows.
            slot_mappings: not read.
        """
        assert self._context is not None
        self._last_draft_probs = None
        rows = _rows(common_attn_metadata, num_rejected_tokens_gpu, target_positions)
        lengths = tuple(end for _, end, _ in rows)
        tables = self._tables(common_attn_metadata, lengths)
        tokens = target_token_ids.tolist()
        parts = [
            (table, first, tokens[begin : begin + end - first])
            for table, (first, end, begin) in zip(tables, rows, strict=True)
        ]
        batch = RaggedBatch.build(parts)
        kept = [i for first, end, begin in rows for i in range(begin, begin + end - first)]
        if not self._checked:
            _check_slots(batch, common_attn_metadata.slot_mapping[kept])
            self._checked = True
        self.drafter.observe(self._context, batch, target_hidden_states[kept], batch.input_ids_T)
        anchors_R = next_token_ids.long()
        if num_speculative_tokens == 0:
            return anchors_R.new_empty(len(rows), 0)
        drawing = _Drawing(self, sampling_metadata)
        self.drafter.propose(
            self._context,
            DraftBatch(
                tables,
                anchors_R,
                lengths,
                ((),) * len(rows),
                num_speculative_tokens,
                confidences=False,
            ),
            drawing,
        )
        if drawing.probs:
            self._last_draft_probs = torch.stack(drawing.probs, dim=1)
        return torch.stack(drawing.tokens, dim=1)

    def sample(self, logits_RV: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens [R] drawn by vLLM's own rule for drafts, and the law [R, V] that it drew from."""
        found: tuple[Tensor, Tensor | None] = self._sample_from_logits(logits_RV, sampling_metadata)
        return found

    def spread(self, logits_RC: Tensor, tokens: Tensor | None) -> Tensor:
        """Logits [R, V] of all tokens; minus infinity for those without a column."""
        if tokens is None:
            return logits_RC
        full_RV = logits_RC.new_full((len(logits_RC), self._vocab), float("-inf"))
        return full_RV.scatter_(1, tokens.expand_as(logits_RC), logits_RC)

    def _tables(self, metadata: Any, lengths: Sequence[int]) -> tuple[BlockTable, ...]:
        pages = metadata.block_table_tensor
        return tuple(
            BlockTable(pages[r, : -(-length // self.block_size)].tolist(), self.block_size)
            for r, length in enumerate(lengths)
        )


@dataclass
class _Drawing:
    """Implements `drafters.base.Draw` by vLLM's sampling of drafts."""

    proposer: DSparkProposer
    metadata: Any
    tokens: list[Tensor] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    def __call__(self, step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:  # noqa: ARG002
        logits_RV = self.proposer.spread(logits_RC, tokens)
        tokens_R, probs_RV = self.proposer.sample(logits_RV, self.metadata)
        self.tokens.append(tokens_R.long())
        if probs_RV is not None:
            self.probs.append(probs_RV)
        return self.tokens[-1]


def _rows(
    metadata: Any, rejected_R: Tensor | None, positions_T: Tensor
) -> list[tuple[int, int, int]]:
    """Per request its first position, the one after its last that stays, and its first row."""
    starts = metadata.query_start_loc.tolist()
    rejected = [0] * metadata.num_reqs if rejected_R is None else rejected_R.tolist()
    positions = positions_T.tolist()
    found = []
    for r, lost in enumerate(rejected[: metadata.num_reqs]):
        begin, first = starts[r], positions[starts[r]]
        found.append((first, first + starts[r + 1] - begin - lost, begin))
    return found


def _check_slots(batch: RaggedBatch, slots_T: Tensor) -> None:
    """Refuse pages that lie otherwise than this file reads them.

    Raises:
        CompatibilityError: naming the first row.
    """
    if not torch.equal(batch.rows_T, slots_T.to(batch.rows_T)):
        wrong = int((batch.rows_T != slots_T).nonzero()[0])
        raise CompatibilityError(
            f"vLLM keeps a token in row {int(slots_T[wrong])} where its block table says "
            f"{int(batch.rows_T[wrong])}; this vLLM's pages are not known to the DSpark plug-in."
        )


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
