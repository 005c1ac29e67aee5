"""transformers' `generate` with one of our drafters: the same tokens, fewer forwards.

```python
from dspark.hf import Speculation
speculation = Speculation(model, "path/to/drafter")
out = model.generate(**inputs, custom_generate=speculation, max_new_tokens=64)
```

The loop, its processors, its stopping and its verification are transformers' own assisted
decoding; ours is the candidate generator alone, which draws drafts by the same processors. One
request at a time, without padding; a `streamer` is not handed on by transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from dspark.attention.paged_cache import PAGE_SIZE, BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.errors import CompatibilityError, UsageError
from dspark.request import Stats
from dspark.targets.families import dissect
from dspark.targets.forward import TargetParts


class Speculation:
    """A decoding method for `model.generate(custom_generate=...)`.

    Attributes:
        stats: rounds and drafts of the last call.

    Args:
        model: a causal language model of transformers.
        drafter: made for it: a directory, a hub id, a GGUF file, or a loaded drafter.
        num_drafts: drafts of a round; None for all that the drafter makes.

    Raises:
        CheckpointError: the drafter cannot be read.
        CompatibilityError: it is not for this model, or transformers is another.
        UsageError: there are more drafts than the drafter makes.
    """

    def __init__(
        self, model: Any, drafter: str | Path | AnyDrafter, *, num_drafts: int | None = None
    ) -> None:
        if not callable(getattr(model, "_assisted_decoding", None)):
            raise CompatibilityError(
                f"{type(model).__name__} has no assisted decoding in this version of transformers; "
                "install transformers 5.17 to 5.23."
            )
        self._anatomy = dissect(model)
        loaded = load_drafter(drafter) if isinstance(drafter, (str, Path)) else drafter
        loaded.bind(_parts(self._anatomy), num_target_layers=len(self._anatomy.layers))
        self.drafter = loaded.eval()
        self.num_drafts = loaded.block_size if num_drafts is None else num_drafts
        if not 1 <= self.num_drafts <= loaded.block_size:
            raise UsageError(
                f"num_drafts is {num_drafts}, but the drafter makes 1 to {loaded.block_size}."
            )
        self.stats = Stats()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Decode, as transformers calls it.

        Raises:
            UsageError: more than one request, padding, or beams.
        """
        _refuse(input_ids, generation_config, model_kwargs.get("attention_mask"))
        with _captured(self._anatomy, self.drafter.taps) as features:
            candidates = _Candidates(self, features, logits_processor, generation_config)
            model._get_candidate_generator = lambda *_args, **_options: candidates
            try:
                found = model._assisted_decoding(
                    input_ids, logits_processor, stopping_criteria, generation_config,
                    **model_kwargs,
                )  # fmt: skip
            finally:
                del model._get_candidate_generator
        self.stats = candidates.stats
        return found


class _Candidates(CandidateGenerator):
    """Drafts of one request, behind the interface of transformers."""

    def __init__(
        self,
        speculation: Speculation,
        features: dict[int, Tensor],
        logits_processor: Any,
        generation_config: Any,
    ) -> None:
        drafter = speculation.drafter
        self.drafter, self.num_drafts = drafter, speculation.num_drafts
        self.features, self.processor = features, logits_processor
        self.sampled, self.longest = generation_config.do_sample, generation_config.max_length
        like = drafter.borrowed.embedding_VH
        pages = -(-(self.longest + drafter.rows_ahead + 1) // PAGE_SIZE)
        shapes = drafter.context_shapes
        self.context = PagedCache(shapes, pages, dtype=like.dtype, device=like.device)
        self.table = BlockTable(range(pages))
        self.cached = 0
        self.stats = Stats()

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """The tokens so far with drafts behind them, and what sampled ones were drawn from."""
        if not self.features:  # the prompt has not been read
            return input_ids, None
        tokens = input_ids[0].tolist()
        room = min(self.num_drafts, self.longest - len(tokens) - 1)
        self._observe(tokens)
        if room < 1:
            return input_ids, None
        drawing = _Drawing(self, input_ids)
        device = self.context.device
        batch = DraftBatch(
            (self.table,),
            torch.tensor(tokens[-1:], device=device),
            (len(tokens) - 1,),
            (tokens,),
            room,
            confidences=False,
        )
        self.drafter.propose(self.context, batch, drawing)
        self.stats.drafted += room
        self.stats.verified += room
        return drawing.ids, torch.stack(drawing.scores, dim=1) if self.sampled else None

    def update_candidate_strategy(
        self,
        input_ids: Tensor,  # noqa: ARG002
        scores: Tensor,  # noqa: ARG002
        num_matches: int,
    ) -> None:
        """Count a round."""
        if self.features and self.cached:
            self.stats.rounds += 1
            self.stats.accepted += int(num_matches)

    def _observe(self, tokens: list[int]) -> None:
        """Append the context rows of the tokens that the last forward has read and that stay."""
        count = len(tokens) - 1 - self.cached
        rows = [self.features[tap][0, :count] for tap in self.drafter.taps]
        part = (self.table, self.cached, tokens[self.cached : -1])
        batch = RaggedBatch.build([part], self.context.device)
        following = torch.tensor(tokens[self.cached + 1 :], device=self.context.device)
        self.drafter.observe(self.context, batch, torch.cat(rows, dim=-1), following)
        self.cached += count


class _Drawing:
    """Implements `drafters.base.Draw` by transformers' processors."""

    def __init__(self, candidates: _Candidates, input_ids: Tensor) -> None:
        self.candidates, self.ids = candidates, input_ids
        self.scores: list[Tensor] = []

    def __call__(self, step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:  # noqa: ARG002
        vocab = self.candidates.drafter.config.vocab_size
        logits_1V = logits_RC.float()
        if tokens is not None:
            full_1V = logits_1V.new_full((1, vocab), float("-inf"))
            logits_1V = full_1V.scatter_(1, tokens.expand_as(logits_RC), logits_1V)
        scores_1V = self.candidates.processor(self.ids, logits_1V)
        self.scores.append(scores_1V)
        if self.candidates.sampled:
            token_1 = torch.multinomial(scores_1V.softmax(-1), 1)[0]
        else:
            token_1 = scores_1V.argmax(-1)
        self.ids = torch.cat((self.ids, token_1[None].to(self.ids)), dim=1)
        return token_1


@contextmanager
def _captured(anatomy: Any, taps: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """What the last forward left at the captured layers, by layer, while the block runs."""
    found: dict[int, Tensor] = {}

    def keep(tap: int, output: Any) -> None:
        found[tap] = output[0] if isinstance(output, tuple) else output

    handles = []
    for tap in taps:
        if tap >= 0:
            layer = anatomy.layers[tap]
            hook = layer.register_forward_hook(lambda _m, _i, out, tap=tap: keep(tap, out))
        else:  # the embedding output is what the first layer reads

            def reads(_module: Any, args: Any, kwargs: Any) -> None:
                keep(-1, args[0] if args else kwargs["hidden_states"])

            hook = anatomy.layers[0].register_forward_pre_hook(reads, with_kwargs=True)
        handles.append(hook)
    try:
        yield found
    finally:
        for hook in handles:
            hook.remove()


def _parts(anatomy: Any) -> TargetParts:
    head = anatomy.head
    return TargetParts(
        embedding_VH=anatomy.embedding.weight.detach(),
        embedding_scale=anatomy.embedding_scale,
        head_VH=head.weight.detach(),
        head_bias_V=None if head.bias is None else head.bias.detach(),
        logit_softcap=anatomy.logit_softcap,
        vocab_size=head.weight.shape[0],
        hidden_size=anatomy.embedding.weight.shape[1],
        final_norm_H=anatomy.final_norm_H,
    )


def _refuse(input_ids: Tensor, generation_config: Any, mask: Tensor | None) -> None:
    if len(input_ids) != 1 or generation_config.num_beams not in (None, 1):
        raise UsageError(
            f"{len(input_ids)} sequences with num_beams {generation_config.num_beams} are given, "
            "but transformers speculates for one at a time; use dspark.load for batches."
        )
    if mask is not None and not bool(mask.all()):
        raise UsageError(
            "The prompt is padded, but positions are counted from its first token; leave the "
            "padding out."
        )
