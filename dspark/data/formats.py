"""How records become conversations: names and wording, without what it takes to read."""

from __future__ import annotations

from typing import Literal, get_args

SourceFormat = Literal[
    "messages", "gsm8k", "gsm8k_heldout", "mbpp", "tldr", "tldr_heldout", "python_stdlib"
]
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What the reference evaluator adds to a question of mathematics (FORMAT_FACTS.md D)."""
