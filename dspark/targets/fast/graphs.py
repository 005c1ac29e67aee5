"""Decoding steps recorded as CUDA graphs, and replayed from then on.

A step of few rows launches hundreds of small kernels, and on most models launching them takes the
host longer than the GPU needs to run them. A graph launches all of them at once, but its shapes
and addresses are fixed. So the rows of a step are filled up to one of a few tiers, and what
kernels read of a batch is copied to where it lay at the recording (`Buffers`). A row of padding is
a request of its own, one token on a page that no request has, so no kernel needs to know of it.

Only what a kernel reads on the device is new at a replay. What Python has looked up in the batch
at the recording would stay as it was: such models are found out at load, by a second batch. A
step that is no decoding step, and a model that cannot be recorded, run eagerly.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from dspark.attention.backends import Rule
from dspark.attention.choice import Attend, AttentionBackend
from dspark.attention.padding import SHORT_ROWS
from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch, Segment
from dspark.attention.varlen import MEMO, VarlenLayout, pack_layout
from dspark.errors import CompatibilityError, UsageError, first_line
from dspark.targets.families import Anatomy
from dspark.targets.forward import RaggedCall, run_tapped
from dspark.targets.probe import CacheLayout, relative_distance

_logger = logging.getLogger(__name__)

GraphSwitch = Literal["auto"] | bool
Run = Callable[[], tuple[Tensor, Tensor | None]]
"""() -> hidden states [T, H], and features [T, F] if any are wanted"""

# Of a recorded step's hidden states to those of the same step run eagerly, relative.
_TOLERANCE = 0.2
_WARM_UPS = 2


TIERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The numbers of rows that steps are filled up to."""


def pad_to_tier(batch: RaggedBatch, scratch: BlockTable) -> RaggedBatch:
    """A batch with rows behind its own, so that it has as many as the smallest tier that fits.

    Args:
        batch: of 1 to `TIERS[-1]` rows.
        scratch: a page that no request has.

    Returns:
        The batch without its empty segments. Each row of padding is token 0 at position 0.
    """
    own = batch.offsets[-1]
    spare = next(tier for tier in TIERS if tier >= own) - own
    [row] = scratch.rows(0, 1)
    packed_3T = torch.stack((batch.input_ids_T, batch.positions_T, batch.rows_T))
    packed_3T = pad(packed_3T, (0, spare))
    packed_3T[2, own:] = row
    segments = [s for s in batch.segments if s.length] + [Segment(scratch, 0, 1)] * spare
    lengths = (segment.length for segment in segments)
    ids_T, positions_T, rows_T = packed_3T.unbind(0)
    return RaggedBatch(
        ids_T,
        positions_T,
        rows_T,
        tuple(segments),
        tuple(itertools.accumulate(lengths, initial=0)),
        (*batch.runs, *((row, own + i, 1) for i in range(spare))),
    )


class Buffers:
    """Memory on the device that holds one batch after another, of any tier: what a graph reads.

    Its batches have their layout on the device only (`static`): whatever asks for their segments
    finds none.

    Args:
        cache: whose pages the batches speak of; its last one is no request's.
        max_context: of the target, in tokens.
    """

    def __init__(self, cache: PagedCache, max_context: int) -> None:
        self._scratch = BlockTable((cache.pages - 1,), cache.page_size)
        width = max(1, min(cache.pages - 1, -(-max_context // cache.page_size)))
        most, device = TIERS[-1], cache.device
        self.most_keys = width * cache.page_size
        # Not of inference mode, outside of which such tensors could not be written to.
        with torch.inference_mode(False):
            self._packed_3T = torch.zeros(3, most, dtype=torch.int64, device=device)
            self._starts_R1 = torch.zeros(most + 1, dtype=torch.int32, device=device)
            self._used_R = torch.zeros(most, dtype=torch.int32, device=device)
            self._pages_RP = torch.zeros(most, width, dtype=torch.int32, device=device)

    def holds(self, batch: RaggedBatch) -> bool:
        """Whether a batch is a decoding step that fits."""
        short = all(segment.length <= SHORT_ROWS for segment in batch.segments)
        return 1 <= batch.offsets[-1] <= TIERS[-1] and short and batch.longest <= self.most_keys

    def fill(self, batch: RaggedBatch) -> tuple[int, int]:
        """Take over a batch that fits.

        Returns:
            The tier, and the largest number of rows that a segment may have there.
        """
        batch = pad_to_tier(batch, self._scratch)
        tier = batch.offsets[-1]
        for own, given in zip(
            self._packed_3T, (batch.input_ids_T, batch.positions_T, batch.rows_T), strict=True
        ):
            own[:tier].copy_(given)
        packed = pack_layout(batch, requests=tier)
        width = packed.shape[1] - 2
        self._starts_R1[: tier + 1].copy_(packed[:, 0])
        self._used_R[:tier].copy_(packed[:-1, 1])
        # Pages behind these are an earlier batch's; no length reaches there.
        self._pages_RP[:tier, :width].copy_(packed[:-1, 2:])
        longest = max(segment.length for segment in batch.segments)
        return tier, 1 if longest == 1 else SHORT_ROWS

    def static(self, tier: int, most_rows: int) -> RaggedBatch:
        """The batch that lies here, as tensors that the next one will lie in too."""
        layout = VarlenLayout(
            self._starts_R1[: tier + 1],
            self._used_R[:tier],
            self._pages_RP[:tier],
            most_rows,
            self.most_keys,
        )
        ids_T, positions_T, rows_T = self._packed_3T[:, :tier].unbind(0)
        return RaggedBatch(ids_T, positions_T, rows_T, (), (tier,), (), {MEMO: layout})


@dataclass(frozen=True)
class Recording:
    """A step that has been recorded.

    Attributes:
        replay: computes it again, from what its buffers hold by then.
        hidden_TH: where its hidden states lie.
        features_TF: where its features lie, None if none were wanted.
    """

    replay: Callable[[], None]
    hidden_TH: Tensor
    features_TF: Tensor | None


Recorder = Callable[[Run], Recording]


class CudaRecorder:
    """Records steps as CUDA graphs, all of which share one pool of memory.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Recording:
        """Record a step, after it has run twice so that libraries and kernels are set up."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden_TH, features_TF = run()
        return Recording(graph.replay, hidden_TH, features_TF)


@dataclass(frozen=True)
class _Home:
    """What belongs to one cache, whose addresses its recordings hold."""

    buffers: Buffers
    recordings: dict[tuple[int, int, tuple[int, ...]], Recording] = field(default_factory=dict)


class Replayer:
    """`run_tapped` for a target whose decoding steps are recorded.

    Steps differ by tier, by whether any request has more than one row, and by taps; each kind is
    recorded when it first comes.

    Args:
        record: records a step.
        max_context: of the target, in tokens.

    Attributes:
        works: whether steps are recorded; False once a recording has failed.
        failure: why it has failed, as part of a sentence; empty while it has not.
    """

    def __init__(self, record: Recorder, max_context: int) -> None:
        self.works = True
        self.failure = ""
        self._record = record
        self._max_context = max_context
        self._homes: WeakKeyDictionary[PagedCache, _Home] = WeakKeyDictionary()

    def adopt(self, cache: PagedCache) -> None:
        """Take in a cache whose last page no request will have; steps over others run eagerly."""
        self._homes[cache] = _Home(Buffers(cache, self._max_context))

    def __call__(
        self, anatomy: Anatomy, call: RaggedCall, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Normed hidden states [T, H] of a ragged batch, and its features [T, F] if wanted."""
        home = self._homes.get(call.cache) if self.works and call.cache is not None else None
        if home is None or not home.buffers.holds(call.batch):
            return run_tapped(anatomy, call, taps)
        tier, most_rows = home.buffers.fill(call.batch)
        name = tier, most_rows, tuple(taps)
        if name not in home.recordings:
            static = home.buffers.static(tier, most_rows)
            attend = _on_device(call.attend)
            recorded = replace(call, batch=static, attend=attend, recorded=True)
            try:
                recording = self._record(partial(run_tapped, anatomy, recorded, taps))
            except Exception as error:  # whatever a recording raises, the step can run eagerly
                self.works, self.failure = False, first_line(error)
                self._homes.clear()
                _logger.warning(
                    "%s runs without CUDA graphs: a step cannot be recorded (%s).",
                    anatomy.architecture,
                    self.failure,
                )
                return run_tapped(anatomy, call, taps)
            home.recordings[name] = recording
        recording = home.recordings[name]
        recording.replay()
        own, features_TF = call.batch.offsets[-1], recording.features_TF
        # The next replay overwrites what this one leaves.
        return (
            recording.hidden_TH[:own].clone(),
            None if features_TF is None else features_TF[:own].clone(),
        )


def choose_graphs(
    setting: GraphSwitch,
    anatomy: Anatomy,
    layout: CacheLayout,
    attention: AttentionBackend,
    max_context: int,
    *,
    batch_invariant: bool = False,
) -> Replayer | None:
    """What replays the decoding steps of a target, tried out on two; None to run all eagerly.

    Args:
        setting: True or False; `auto` records where that is possible.
        anatomy: the parts of the target.
        layout: what it caches.
        attention: how it attends; it must be `varlen`, which reads the layout on the device.
        max_context: of the target, in tokens.
        batch_invariant: whether the target runs in tiles, which are not recorded.

    Raises:
        UsageError: the setting is unknown, or True where steps cannot be recorded.
    """
    if not isinstance(setting, bool) and setting != "auto":
        raise UsageError(f"cuda_graphs is {setting!r}, but must be 'auto', True or False.")
    if setting is False:
        return None
    device = anatomy.embedding.weight.device
    reason = _reason_against(device, attention, batch_invariant=batch_invariant)
    if reason is None:
        replayer = Replayer(CudaRecorder(device), max_context)
        reason = _trial(replayer, anatomy, layout, attention)
        if reason is None:
            return replayer
        if setting == "auto" and replayer.works:  # else it has said so itself
            _logger.warning("%s runs without CUDA graphs: %s.", anatomy.architecture, reason)
    if setting == "auto":
        return None
    raise UsageError(
        f"CUDA graphs cannot be used for {anatomy.architecture} on {device}: {reason}; leave them "
        "to 'auto' or switch them off."
    )


def _reason_against(
    device: torch.device, attention: AttentionBackend, *, batch_invariant: bool
) -> str | None:
    if device.type != "cuda":
        return "they need a CUDA device"
    if batch_invariant:
        return "batch-invariant mode runs in tiles of its own"
    if attention.name != "varlen":
        return f"they need the attention 'varlen', and it is {attention.name!r}"
    return None


@torch.inference_mode()
def _trial(
    replayer: Replayer, anatomy: Anatomy, layout: CacheLayout, attention: AttentionBackend
) -> str | None:
    """What is wrong with a step that is recorded on one batch and replayed on another."""
    weight, vocab_size = anatomy.embedding.weight, anatomy.embedding.num_embeddings
    cache = PagedCache(layout.shapes, 5, dtype=weight.dtype, device=weight.device)
    replayer.adopt(cache)
    first, second = BlockTable((3, 1)), BlockTable((0, 2))
    ids = [(11 + 17 * i) % vocab_size for i in range(10)]
    # Both of the same tier; the second goes on, the other way round and in other proportions.
    steps = [
        [(first, 0, ids[:3]), (second, 0, ids[3:5])],
        [(second, 2, ids[5:6]), (first, 3, ids[6:10])],
    ]
    for step in steps:
        batch = RaggedBatch.build(step, weight.device)
        call = RaggedCall(
            batch, cache, layout.cache_layers, layout.writers, attend=attention.attend
        )
        got_TH, _ = replayer(anatomy, call)
        if not replayer.works:
            return f"a step cannot be recorded ({replayer.failure})"
        expected_TH, _ = run_tapped(anatomy, call, ())
        distance = relative_distance(got_TH, expected_TH)
        if distance > _TOLERANCE:
            return f"a replayed step differs from the same step run eagerly by {distance:.2g}"
    return None


def _on_device(attend: Attend) -> Attend:
    """Attention that refuses what only a layout on the host can tell."""

    def checked(
        query_1ATD: Tensor, cache: PagedCache, layer: int, batch: RaggedBatch, rule: Rule
    ) -> Tensor:
        if rule.explicit:
            raise CompatibilityError("its attention has sinks or soft-capped scores")
        return attend(query_1ATD, cache, layer, batch, rule)

    return checked
