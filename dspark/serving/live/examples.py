"""Prompts that the live page offers, and that its background requests ask.

Their wording is that of the bundled model's training data: it knows no other.
"""

from __future__ import annotations

from collections.abc import Mapping

from dspark.data.formats import BOXED

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "maths": (
        "Anna bakes 24 muffins every morning. She sells half of them at the market for $3 each "
        "and gives the rest to her neighbors. How much money does she make in a week?" + BOXED,
        "Tom has 3 boxes with 12 pencils each. He gives 8 pencils to his sister. How many pencils "
        "does he have left?" + BOXED,
        "A train travels 60 miles per hour for 3 hours, then 40 miles per hour for 2 hours. How "
        "many miles does it travel in total?" + BOXED,
        "Maria saves $15 every week. How many weeks does she need to buy a bike that costs $180?"
        + BOXED,
    ),
    "code": (
        "What does the command `tar` do? Show me common usages.",
        "What does the command `grep` do? Show me common usages.",
        "What does the command `git commit` do? Show me common usages.",
        "What does the command `ssh` do? Show me common usages.",
    ),
    "chat": (
        "Hi, I want to book a table for two at an Italian restaurant in San Jose.",
        "I need a hotel in Seattle for three nights, please.",
        "Can you find me a bus from Los Angeles to San Francisco for tomorrow morning?",
        "I would like to listen to some music. Can you find a song for me?",
    ),
}
"""By domain."""
