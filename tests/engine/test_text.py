"""From tokens to text, piece by piece."""

from __future__ import annotations

import time

import pytest
import torch

from dspark.engine.requests.detokenizer import TextStream

TEXTS = (
    "the cat sat on the mat",
    "  two  spaces\n\tand tabs ",
    "naïve café, 日本語 🙂🙃 ∑",
    "<|im_end|>the<|im_end|>cat",
)


class ByteTokens:
    """Token i is `table[i]`, whatever bytes these are."""

    def __init__(self, *table: bytes) -> None:
        self.table = table

    def decode(self, ids, **options) -> str:
        return b"".join(self.table[i] for i in ids).decode("utf-8", errors="replace")


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, ids, stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces, stream


@pytest.fixture(params=["bytes", "stories260K"])
def any_tokenizer(request, tokenizer, shared):
    if request.param == "bytes":
        return tokenizer
    directory = shared / "models" / "stories260K"
    if not directory.is_dir():
        pytest.skip("needs ../shared/models/stories260K")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_never_hold_half_a_character(any_tokenizer, text):
    ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, stream = pieces_of(any_tokenizer, ids)
    assert stream.text == whole(any_tokenizer, ids)
    assert all("\ufffd" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1


def test_pieces_of_random_tokens_add_up(any_tokenizer):
    """Also where the bytes are no valid text."""
    generator = torch.Generator().manual_seed(0)
    valid = 0
    for i in range(60):
        ids = torch.randint(0, len(any_tokenizer), (1 + i,), generator=generator).tolist()
        stream = TextStream(any_tokenizer)
        for token in ids:
            stream.hold(token)
        assert stream.finish() == stream.text == pieces_of(any_tokenizer, ids)[1].text
        if "\ufffd" not in stream.text:
            valid += 1
            assert stream.text == whole(any_tokenizer, ids)
    assert 0 < valid < 60


def test_a_character_waits_for_its_last_byte():
    tokenizer = ByteTokens(b"a", b"\xf0\x9f", b"\x99\x82", b"b")
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in (0, 1, 2, 3)] == ["a", "", "🙂", "b"]
    stream = TextStream(tokenizer)
    assert [stream.push(0), stream.push(1), stream.finish()] == ["a", "", "\ufffd"]


def test_holding_decodes_all_at_the_end(tokenizer):
    ids = tokenizer(TEXTS[2])["input_ids"]
    stream = TextStream(tokenizer)
    for token in ids:
        stream.hold(token)
    assert stream.text == ""
    assert stream.finish() == stream.text == TEXTS[2]
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("sat on",), "the cat "),
        (("cat", "the mat"), "the "),
        (("at",), "the c"),
        (("t sat",), "the ca"),
        (("mat!", "dog"), "the cat sat on the mat"),
        (("the",), ""),
    ],
)
def test_stop_strings_cut_the_text_and_are_never_shown(stop, text):
    letters = ByteTokens(*(bytes([c]) for c in range(256)))
    pieces, stream = pieces_of(letters, b"the cat sat on the mat", stop)
    assert stream.text == text
    assert stream.stopped == (text != "the cat sat on the mat")
    assert all(text.startswith("".join(pieces[:i])) for i in range(len(pieces)))


def test_only_what_may_become_a_stop_string_is_held_back():
    letters = ByteTokens(*(bytes([c]) for c in range(256)))
    stream = TextStream(letters, ("abc",))
    assert [stream.push(c) for c in b"xababcy"[:6]] == ["x", "", "", "ab", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    stream = TextStream(letters, ("abc",))
    assert [stream.push(c) for c in b"xab"] == ["x", "", ""]
    assert stream.finish() == "ab"


def test_the_first_of_two_stop_strings_counts():
    stream = TextStream(ByteTokens(b"one two three"), ("three", "two"))
    assert stream.push(0) == "one "
    assert stream.stopped


def test_a_stop_string_before_half_a_character_is_seen_at_the_end():
    tokenizer = ByteTokens(b"so", b" stop\xf0\x9f")
    stream = TextStream(tokenizer, ("stop",))
    assert [stream.push(0), stream.push(1)] == ["so", ""]
    assert stream.finish() == " "
    assert stream.stopped
    assert stream.text == "so "


def slow_settle(letters: str, stops: tuple[str, ...]) -> tuple[list[str], bool]:
    """What is given out after each letter, by looking at the whole text every time."""
    given, pieces = 0, []
    for i in range(1, len(letters) + 1):
        text = letters[:i]
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return [*pieces, text[given : min(found)]], True
        held = max((k for s in stops for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
        pieces.append(text[given : i - held])
        given = max(given, i - held)
    return [*pieces, letters[given:]], False


def test_stop_strings_are_found_as_by_looking_at_everything():
    letters = ByteTokens(*(bytes([c]) for c in range(256)))
    generator = torch.Generator().manual_seed(1)

    def word(longest: int) -> str:
        size = int(torch.randint(1, longest + 1, (), generator=generator))
        return "".join("ab"[i] for i in torch.randint(0, 2, (size,), generator=generator))

    ends = set()
    for _ in range(400):
        text, stops = word(40), tuple(word(9) for _ in range(3))
        pieces, stopped = slow_settle(text, stops)
        stream = TextStream(letters, stops)
        got = []
        for c in text.encode():
            got.append(stream.push(c))
            if stream.stopped:
                break
        else:
            got.append(stream.finish())
        assert (got, stream.stopped) == (pieces, stopped)
        ends.add(stopped)
    assert ends == {True, False}


def test_several_letters_at_once_and_two_ends_in_them():
    stream = TextStream(ByteTokens(b"so a", b"bcd and on"), ("abcd", "bc"))
    assert stream.push(0) == "so "
    assert stream.push(1) == ""
    assert (stream.text, stream.stopped) == ("so ", True)


def test_a_stop_string_of_ten_thousand_letters_costs_as_much_per_letter_as_a_short_one():
    """Letters that nearly match it over and over: whatever is quadratic would take minutes."""
    letters = ByteTokens(*(bytes([c]) for c in range(256)))
    stops = ("a" * 10_000 + "b", *("a" * (700 + i) + "c" for i in range(60)))
    stream = TextStream(letters, stops)
    started = time.perf_counter()
    for _ in range(12_000):
        assert not stream.stopped
        stream.push(ord("a"))
    assert len(stream.text) == 2_000
    stream.push(ord("b"))
    assert stream.stopped
    assert stream.text == "a" * 2_000
    assert time.perf_counter() - started < 10
