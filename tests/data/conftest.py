import pytest

from dspark.data.tokenizer import train_tokenizer

TEXTS = [
    "The cat sat on the mat, 12 times. ",
    "def f(x): return x + 1\n",
    "Grüße, naïve café! 你好 ",
]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 20, 400)
