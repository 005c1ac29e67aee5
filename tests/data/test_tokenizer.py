import pytest


@pytest.mark.parametrize(
    "text", ["The cat 123 sat.", "naïve 你好\n\tx = 7", "  two  spaces ", "\x00"]
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4


def test_generation_prompt_opens_an_answer(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
