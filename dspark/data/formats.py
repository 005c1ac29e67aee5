"""How a corpus file's records become conversations: the names, without what it takes to read."""

from __future__ import annotations

from typing import Literal, get_args

SourceFormat = Literal[
    "messages", "gsm8k", "gsm8k_heldout", "mbpp", "tldr", "tldr_heldout", "python_stdlib"
]
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
