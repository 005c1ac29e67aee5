"""Held-out prompts of the bundled pair's three domains, none of which it was trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dspark.data.conversations import Message, read_prompts
from dspark.data.corpus import read_source
from dspark.engine.model import Model
from dspark.errors import DataError
from dspark.request import Request, SamplingParams

DOMAINS = ("gsm8k", "code", "chat")
USER_TURNS = 2
"""A chat prompt is a dialogue up to its second user turn, the first answer included."""


def domain_requests(
    model: Model, data: Path, domain: str, count: int, params: SamplingParams
) -> list[Request]:
    """A fixed choice of a domain's prompts; prompt i draws with seed `params.seed` + i.

    Args:
        model: whose chat template, tokenizer and context count.
        data: the folder with `eval/` and `corpus/`.
        domain: gsm8k (test questions), code (held-out tldr pages) or chat (SGD dev dialogues).
        count: how many prompts.
        params: how to continue them; its seed also names the choice.

    Raises:
        DataError: a file is missing, or holds too few prompts that fit the context.
    """
    requests: list[Request] = []
    for messages in domain_prompts(data, domain, params.seed):
        ids = model.encode(messages)
        if len(ids) + params.max_new_tokens <= model.target.max_context:
            seed = params.seed + len(requests)
            requests.append(Request(ids, replace(params, seed=seed)))
        if len(requests) == count:
            return requests
    raise DataError(
        f"{data} holds {len(requests)} prompts of {domain} that fit, but {count} are wanted; ask "
        "for fewer prompts or tokens."
    )


def domain_prompts(data: Path, domain: str, seed: int) -> list[Sequence[Message]]:
    """All prompts of a domain, in an order that the seed names.

    Raises:
        DataError: a file is missing.
    """
    prompts = _prompts(data, domain)
    # A string seeds the same choice on every Python and platform.
    random.Random(f"{domain} {seed}").shuffle(prompts)
    return prompts


def _prompts(data: Path, domain: str) -> list[Sequence[Message]]:
    if domain == "gsm8k":
        found = read_prompts(data / "eval" / "gsm8k.jsonl")
        return [prompt.messages for prompt in found if prompt.messages]
    if domain == "code":
        pages = read_source("tldr_heldout", data / "corpus" / "tldr_pages_en.jsonl.gz")
        return [page[:1] for page in pages]
    dialogues = read_source("messages", data / "corpus" / "sgd_dialogues_dev.jsonl.gz")
    cut = [_up_to_user_turn(dialogue) for dialogue in dialogues]
    return [messages for messages in cut if messages]


def _up_to_user_turn(dialogue: Sequence[Message]) -> Sequence[Message]:
    """The messages up to user turn USER_TURNS; none where the dialogue is shorter."""
    turns = [i for i, message in enumerate(dialogue) if message["role"] == "user"]
    return dialogue[: turns[USER_TURNS - 1] + 1] if len(turns) >= USER_TURNS else ()
