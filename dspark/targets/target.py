"""Any causal language model of transformers, seen as one forward over a ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dspark.attention.choice import AttentionName
from dspark.attention.paged_cache import PAGE_SIZE, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import UsageError
from dspark.targets.build import Modes, Prepared, max_context, prepare
from dspark.targets.families import eos_token_ids
from dspark.targets.fast.graphs import GraphSwitch
from dspark.targets.fast.packing import PLAIN, QuantizeName, WeightsName
from dspark.targets.forward import RaggedCall, TargetOutput, TargetParts, apply_head, run_tapped
from dspark.targets.invariant import apply_head_in_tiles, run_in_tiles, with_cache
from dspark.targets.loading import (
    Source,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_source,
)
from dspark.targets.own_cache import StateCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Target:
    """A frozen causal language model that runs ragged batches over a paged cache.

    Build one with `load` or `from_model`.

    Attributes:
        name: where it came from.
        hidden_size: width H.
        num_layers: number of decoder layers.
        vocab_size: number of logits V.
        max_context: longest sequence that the model was made for, in tokens.
        dtype: of weights and cache.
        device: where it runs.
        eos_token_ids: tokens that end an answer.
        attention_backend: what attends over the cache: plain, flex or varlen.
        batch_invariant: whether a token's result is the same, to the last bit, whatever else is
            in its batch and however its prompt was cut. It holds while the number of CPU threads
            stays what it was at load.
        compiled: whether its decoder layers run through torch.compile.
        weights: how its weights are laid out and its layers run: plain, or the kind of its
            packed products (`targets.fast.products`), with `flat` where a flat decoder runs.
        weights_kind: the kind alone.
        own_cache: whether requests run through the model's own cache, one after the other, because
            it keeps more than keys and values (`targets.own_cache`); nothing of them is shared.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        name: str,
        eos_token_ids: frozenset[int],
        tokenizer: Any = None,
        source: Source | None = None,
    ) -> None:
        """Use `load` or `from_model`, which check the model."""
        anatomy = prepared.anatomy
        self.name = name
        self.hidden_size: int = anatomy.embedding.embedding_dim
        self.num_layers = len(anatomy.layers)
        self.vocab_size: int = anatomy.head.out_features
        self.max_context = max_context(anatomy)
        self.dtype = anatomy.embedding.weight.dtype
        self.device = anatomy.embedding.weight.device
        self.eos_token_ids = eos_token_ids
        self.attention_backend = prepared.attention.name
        self._attend = prepared.attention.attend
        self.batch_invariant = prepared.batch_invariant
        self.compiled = prepared.compiled
        self._fast = prepared.fast
        self.weights = self._fast.name
        self.weights_kind = self._fast.packer.kind
        self._replayer = prepared.replayer
        self._runner = self._fast.decoder or run_tapped
        self._anatomy = anatomy
        self._layout = prepared.layout
        self._tokenizer = tokenizer
        self._source = source
        self._own = prepared.own
        self.own_cache = prepared.own is not None

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
        attention: AttentionName = "auto",
        batch_invariant: bool = False,
        cuda_graphs: GraphSwitch = "auto",
        compile: bool = False,
        weights: WeightsName = "auto",
        quantize: QuantizeName | None = None,
    ) -> Target:
        """Load a checkpoint.

        Args:
            source: directory, `.gguf` file or directory that holds one, name on the Hugging Face
                hub, or name of a model that ships (`smollm2`, `bundled`).
            device: auto, cpu, cuda, cuda:N or mps; auto takes an accelerator where there is one.
            dtype: auto, float32, bfloat16 or float16; auto keeps the checkpoint's dtype on
                accelerators, and takes float32 on CPUs but for bfloat16 checkpoints that are
                measured to run faster as they are (`targets.fast.packing`).
            revision: branch, tag or commit on the hub.
            offline: use only what has been downloaded before.
            trust_remote_code: run model code that comes with the checkpoint.
            attention: auto, plain, flex or varlen (`attention.choice.choose_attention`).
            batch_invariant: make results independent of what else is in a batch.
            cuda_graphs: record decoding steps as CUDA graphs; auto does so where it is possible
                (`targets.fast.graphs.choose_graphs`).
            compile: run the decoder layers through `torch.compile` (`targets.fast.install`).
            weights: auto, plain or packed: lay weights out once for the kernels of a CPU, and run
                known architectures as a flat list of operators; auto does so where it is measured
                to be faster (`targets.fast`).
            quantize: int8: weights, and activations on their way, as 8-bit integers, on a CPU.
                Lossless decoding is then lossless with respect to the quantised model.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete or damaged.
            CompatibilityError: the architecture is not supported, or not in this mode.
            NumericsError: the model computes NaN or infinite numbers.
            UsageError: device, dtype, attention or CUDA graphs cannot be used.
        """
        place = resolve_device(device)
        wanted = resolve_dtype(dtype, place)
        found = resolve_source(
            source,
            revision=revision,
            offline=offline,
            trust_remote_code=trust_remote_code,
            # A file of few bits is read at 16, which 16-bit kernels keep, whatever computes it.
            dtype=None if dtype == "auto" or isinstance(wanted, str) else wanted,
        )
        packs = not (batch_invariant or compile or weights == "plain" or quantize)
        may_be_short = dtype == "auto" and place.type == "cpu" and packs
        model = load_model(found, wanted, place, may_be_short=may_be_short)
        modes = Modes(attention, batch_invariant, cuda_graphs, compile, weights, quantize)
        return cls._build(model, modes, name=str(source), source=found)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        *,
        name: str = "model",
        tokenizer: Any = None,
        attention: AttentionName = "auto",
        batch_invariant: bool = False,
        cuda_graphs: GraphSwitch = "auto",
        compile: bool = False,
        weights: WeightsName = "plain",
        quantize: QuantizeName | None = None,
    ) -> Target:
        """Take over a model that is already in memory.

        The model is frozen, put into evaluation mode and given ragged attention: from here on it
        runs through the target only. Packing its weights, as in `load`, takes them from it.

        Raises:
            CompatibilityError: the architecture is not supported, or not in this mode.
            NumericsError: the model computes NaN or infinite numbers.
            UsageError: the attention or CUDA graphs cannot be used.
        """
        if quantize is not None and weights == "plain":
            weights = "auto"
        modes = Modes(attention, batch_invariant, cuda_graphs, compile, weights, quantize)
        return cls._build(model, modes, name=name, tokenizer=tokenizer)

    @classmethod
    def _build(
        cls,
        model: Any,
        modes: Modes,
        *,
        name: str,
        tokenizer: Any = None,
        source: Source | None = None,
    ) -> Target:
        prepared = prepare(model, modes, name)
        ends = eos_token_ids(model, prepared.anatomy)
        return cls(prepared, name=name, eos_token_ids=ends, tokenizer=tokenizer, source=source)

    @property
    def cuda_graphs(self) -> bool:
        """Whether decoding steps are recorded as CUDA graphs; not any more once that has failed."""
        return self._replayer is not None and self._replayer.works

    @property
    def config(self) -> Any:
        """The text model's transformers configuration."""
        return self._anatomy.config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for; None if there is none.

        Raises:
            CheckpointError: its files cannot be read.
        """
        if self._tokenizer is None and self._source is not None:
            self._tokenizer = load_tokenizer(self._source)
        return self._tokenizer

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self._anatomy.layers

    @property
    def norm_offset(self) -> float:
        """What its norms add to their weights before they multiply by them."""
        return self._anatomy.family.norm_offset

    @property
    def cache_shapes(self) -> tuple[CacheShape, ...]:
        """What its layers cache."""
        return self._layout.shapes

    def new_cache(self, pages: int, page_size: int = PAGE_SIZE) -> PagedCache:
        """Allocate keys and values for `pages` pages of `page_size` tokens.

        With CUDA graphs there is one page more, the last, which no request may have.
        """
        if self._own is not None:
            return StateCache(pages, page_size, self.dtype, self.device)
        replayer = self._replayer if self.cuda_graphs else None
        pages += replayer is not None
        cache = PagedCache(self.cache_shapes, pages, page_size, self.dtype, self.device)
        if replayer is not None:
            replayer.adopt(cache)
        return cache

    def forward(
        self,
        batch: RaggedBatch,
        cache: PagedCache | None = None,
        *,
        taps: Sequence[int] = (),
        logit_rows: Tensor | Literal["all"] | None = None,
    ) -> TargetOutput:
        """Run all tokens of a batch once.

        Args:
            batch: tokens, positions and block tables; on the target's device.
            cache: receives the keys and values of the batch; rows see what their own pages hold.
                Without one, tokens see only the tokens of their own segment (training).
            taps: what to capture: -1 is the input of the first layer (scaled embeddings), i the
                output of decoder layer i before any further norm.
            logit_rows: row indices [N] whose logits are wanted, "all", or None.

        Returns:
            Hidden states, logits and features. They carry no gradient; outside of inference
            mode they may enter computations that do.

        Raises:
            UsageError: a tap names no layer.
        """
        self._check_taps(taps)
        if cache is None and self.batch_invariant:
            batch, cache = with_cache(batch, self.cache_shapes, self._anatomy.embedding.weight)
        with torch.no_grad():
            layout = self._layout
            call = RaggedCall(
                batch, cache, layout.cache_layers, layout.writers, attend=self._attend
            )
            # Graphs are recorded with one line a request.
            replayer = self._replayer if batch.trees is None else None
            run = run_in_tiles if self.batch_invariant else replayer or self._runner
            if self._own is not None:
                hidden_TH, features_TF = self._own.run(batch, cache, taps)
            else:
                hidden_TH, features_TF = run(self._anatomy, call, taps)
            logits_NV = None
            if logit_rows is not None:
                rows_NH = hidden_TH if isinstance(logit_rows, str) else hidden_TH[logit_rows]
                logits_NV = self.logits(rows_NH)
        return TargetOutput(hidden_TH, logits_NV, features_TF)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of normed hidden states [N, H], soft cap included."""
        if self.batch_invariant:
            return apply_head_in_tiles(self._anatomy, hidden_NH)
        return apply_head(self._anatomy, hidden_NH, self._fast.head)

    def parts(self) -> TargetParts:
        """What a drafter borrows."""
        anatomy = self._anatomy
        return TargetParts(
            embedding_VH=anatomy.embedding.weight,
            embedding_scale=anatomy.embedding_scale,
            head_VH=anatomy.head.weight,
            head_bias_V=anatomy.head.bias,
            logit_softcap=anatomy.logit_softcap,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            final_norm_H=anatomy.final_norm_H,
            head=self._fast.head,
            pack=None if self._fast.packer is PLAIN else self._fast.packer.pack,
        )

    def _check_taps(self, taps: Sequence[int]) -> None:
        for tap in taps:
            if not -1 <= tap < self.num_layers:
                raise UsageError(
                    f"taps names layer {tap}, but must name layers from -1 (embeddings) to "
                    f"{self.num_layers - 1}."
                )
