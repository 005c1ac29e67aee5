"""A small tokenizer, and the chat templates of real families, as minimal equivalents."""

import copy
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from dspark.data.tokenizer import train_tokenizer

TEXTS = [
    "The cat sat on the mat, 12 times. ",
    "def f(x): return x + 1\n\n",
    "Grüße, naïve café! 你好 ",
    "assistant\n\nuser\n\nmodel\n",
]
# How Qwen's and Llama 3's tokenizers part a text: line ends stay together, whatever follows.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|User|>",
    "<|Assistant|>",
    "<|end|>",
)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 20, 400)


@pytest.fixture(scope="session")
def family(tokenizer):
    """A tokenizer with a family's chat template and marks, by the template's name."""
    known = {}

    def of(name):
        if name not in known:
            found = copy.deepcopy(tokenizer)
            found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            found.add_tokens(list(MARKS), special_tokens=False)
            template = Path(__file__).parent / "templates" / f"{name}.jinja"
            found.chat_template = template.read_text(encoding="utf-8").rstrip("\n")
            known[name] = found
        return known[name]

    return of
