"""A tiny chat model on disk, and a machine whose speed is known."""

import pytest
import torch

from dspark.data.templates import train_tokenizer
from dspark.fitting.measure import Speeds
from tests.helpers.targets import tiny_qwen3

WORDS = ["how many apples are left", "a table for two", "what is the time", "name a river"]


@pytest.fixture(scope="session")
def model_files(tmp_path_factory):
    """A random model of 4 layers with a chat template; copied where it is written to."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(WORDS * 4, 300)
    model = tiny_qwen3(
        seed=0,
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=2,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def speeds():
    """Of a machine that generates 4,000 tokens a second and trains 2,000 anchors."""
    return Speeds(
        batch_size=16,
        batch_tokens_per_s=4000.0,
        single_tokens_per_s=800.0,
        step_s=0.002,
        row_s=0.0005,
        anchor_s=0.0005,
        memory_bytes=1 << 20,
        checkpoint_bytes=1 << 20,
        parameters=1000,
        feature_bytes=1000,
    )


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
