"""Validation of engine sizes and of requests, before anything runs."""

from __future__ import annotations

from dspark.drafters.base import Drafter
from dspark.engine.kv.memory import Memory
from dspark.errors import RequestError, UsageError
from dspark.request import VERIFIERS, Request
from dspark.targets.target import Target


def check_sizes(
    verifier: str,
    max_queue: int | None,
    max_length: int | None,
    memory_share: float | None = None,
    **sizes: int | None,
) -> None:
    """Refuse an engine's options that cannot be used.

    Args:
        verifier: token, block or coupled.
        max_queue: None, or 0 at least.
        max_length: None, or 2 tokens at least.
        memory_share: None, or above 0 and at most 1.
        **sizes: any others by name: None, or 1 at least.

    Raises:
        UsageError: one cannot.
    """
    if verifier not in VERIFIERS:
        raise UsageError(
            f"The verifier is {verifier!r}, but must be one of {', '.join(VERIFIERS)}."
        )
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UsageError(f"{name} is {size}, but must be at least 1.")
    if max_queue is not None and max_queue < 0:
        raise UsageError(f"max_queue is {max_queue}, but must be None or at least 0.")
    if max_length is not None and max_length < 2:
        raise UsageError(
            f"max_length is {max_length}, but must be at least 2: one token of prompt, one of "
            "output."
        )
    if memory_share is not None and not 0 < memory_share <= 1:
        raise UsageError(f"memory_share is {memory_share}, but must be above 0 and at most 1.")


def checked_num_drafts(drafter: Drafter | None, block_size: int | None) -> int:
    """Drafts per round: 0 without a drafter, its own block size where none is given.

    Raises:
        UsageError: the drafter cannot draft so many.
    """
    if drafter is None:
        return 0
    own = drafter.block_size
    if block_size is None:
        return own
    if not 1 <= block_size <= own:
        raise UsageError(
            f"The block size is {block_size}, but must be between 1 and {own}, the block size "
            "that the drafter was trained with."
        )
    return block_size


def check_request(request: Request, target: Target, memory: Memory, max_length: int) -> None:
    """Refuse a request that this target and cache cannot decode.

    Args:
        request: what is to be decoded.
        target: by whom.
        memory: where.
        max_length: tokens of prompt and output together.

    Raises:
        RequestError: as `Engine.add`.
    """
    ids, params = request.prompt_ids, request.params
    if len(ids) >= max_length:
        raise RequestError(
            f"The prompt has {len(ids)} tokens, but the context holds {max_length} "
            "and one token at least is to be generated; shorten the prompt."
        )
    longest = min(len(ids) + params.max_new_tokens, max_length)
    if not memory.fits(longest):
        raise RequestError(
            f"Prompt and output may reach {longest} tokens, but the cache holds "
            f"{memory.tokens} rows; shorten the prompt, ask for fewer new tokens, or "
            "give the engine a larger cache."
        )
    for what, tokens in (("prompt", ids), ("logit bias", params.logit_bias)):
        wrong = [token for token in tokens if not 0 <= token < target.vocab_size]
        if wrong:
            raise RequestError(
                f"The {what} names token {wrong[0]}, but token ids of this model run from 0 "
                f"to {target.vocab_size - 1}."
            )
    if sum(value == float("-inf") for value in params.logit_bias.values()) == target.vocab_size:
        raise RequestError("The logit bias bans every token; allow at least one.")
    if params.stop and target.tokenizer is None:
        raise RequestError("Stop strings need a tokenizer, and this model has none.")
