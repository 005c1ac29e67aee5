import pytest

from dspark.data.regenerate import Wanted, repeats_gram
from dspark.request import Output, Stats


def answer(text="a b", ids=(1, 2), reason="stop"):
    return Output("", text, tuple(ids), reason, Stats())


def test_a_repeated_gram_is_seen():
    assert repeats_gram([*range(8), *range(8)], 8)
    assert repeats_gram("a" * 9, 8)
    assert not repeats_gram([*range(8), *range(7)], 8)
    assert not repeats_gram("ab", 8)
    assert not repeats_gram("aa", 0)


@pytest.mark.parametrize(
    ("wanted", "output", "kept"),
    [
        (Wanted(), answer(reason="length"), True),
        (Wanted(finished=True), answer(reason="length"), False),
        (Wanted(finished=True), answer(), True),
        (Wanted(word_gram=2), answer("a b a b", range(4)), False),
        (Wanted(word_gram=2), answer("a b", (1, 2, 1, 2)), True),
        (Wanted(token_gram=2), answer("a b", (1, 2, 1, 2)), False),
        (Wanted(token_gram=2), answer("a b a b", range(4)), True),
        (Wanted(token_gram=3, word_gram=3), answer("a b a b", (1, 2, 1, 2)), True),
        (Wanted(without=("c", "b")), answer("a b"), False),
        (Wanted(without=("c",)), answer("a b"), True),
    ],
)
def test_wanted_answers(wanted, output, kept):
    assert wanted.keeps(output) is kept
