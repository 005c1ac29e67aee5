"""Faults that can be seen without decoding."""

import pytest
import torch

from dspark.data.templates import END
from dspark.engine.model import Model
from dspark.evaluation.check.inspection import inspect

PROMPTS = [(5, 6, 7)]


@pytest.fixture
def pair(tiny, target):
    """What inspection finds of a drafter with these changes: its (severity, what)."""

    def found(drafter=None, prompts=PROMPTS, **changes):
        model = Model(target, drafter or tiny.make_drafter(target, **changes))
        return [(f.severity, f.what) for f in inspect(model, prompts)]

    return found


def test_a_sound_pair_gives_no_finding(pair):
    assert pair() == []


def test_another_number_of_layers(pair):
    ((severity, what),) = pair(num_target_layers=7)
    assert severity == "warning"
    assert "7 layers, but this one has 5" in what


def test_eagle3_is_held_to_what_every_drafter_is(tiny, pair, target):
    assert pair(tiny.make_eagle3(target)) == []
    assert pair(tiny.make_eagle3(target, taps=(4,), ttt_length=1)) == []
    ((severity, what),) = pair(tiny.make_eagle3(target, num_target_layers=7))
    assert severity == "warning"
    assert "7 layers, but this one has 5" in what
    drafter = tiny.make_eagle3(target)
    drafter.own_embedding_VH = target.parts().embedding_VH + 1
    drafter.bind(target.parts())
    ((_, what),) = pair(drafter)
    assert "its own embed_tokens" in what


def test_a_reduced_vocabulary_is_no_head_of_another_target(tiny, pair, target):
    assert pair(tiny.make_drafter(target, known=range(0, target.vocab_size, 2))) == []


def test_a_number_of_layers_that_the_checkpoint_did_not_tell(pair):
    assert pair(num_target_layers=3, target_layer_ids=(0, 2)) == []
    assert len(pair(num_target_layers=4, target_layer_ids=(0, 2))) == 1


def test_a_block_of_one(pair):
    ((severity, what),) = pair(block_size=1)
    assert severity == "warning"
    assert "block_size is 1" in what


def test_a_mask_token_of_ordinary_text(pair, tokenizer):
    (letter,) = tokenizer("c")["input_ids"]
    ((severity, what),) = pair(mask_token_id=letter)
    assert severity == "warning"
    assert f"{letter} ('c') is a token of ordinary text" in what


def test_a_mask_token_that_the_template_writes(pair, tokenizer):
    end = tokenizer.convert_tokens_to_ids(END)
    assert pair(mask_token_id=end) == []
    ((severity, what),) = pair(mask_token_id=end, prompts=[(5, end)])
    assert severity == "warning"
    assert "occurs in rendered prompts" in what


def test_missing_heads(pair):
    findings = pair(markov_rank=0, confidence_head=False)
    assert [severity for severity, _ in findings] == ["note", "note"]
    assert "no sequential head" in findings[0][1]
    assert "no confidence head" in findings[1][1]


def test_a_head_of_its_own(tiny, pair, target):
    drafter = tiny.make_drafter(target)
    drafter.own_head_VH = target.parts().head_VH + 1
    drafter.bind(target.parts())
    ((severity, what),) = pair(drafter)
    assert severity == "warning"
    assert "its own lm_head" in what


def test_half_precision_of_the_other_kind(tiny, tokenizer):
    target = tiny.make_target(tokenizer)
    drafter = tiny.make_drafter(target).bfloat16()
    target.dtype = torch.float16
    (finding,) = inspect(Model(target, drafter), PROMPTS)
    assert finding.severity == "warning"
    assert "weights are bfloat16, but it runs in float16" in finding.what
    assert inspect(Model(target, drafter.half()), PROMPTS) == []


def test_a_quantised_target(tiny, tokenizer):
    target = tiny.make_target(tokenizer)
    target.config.quantization_config = {"quant_method": "fp8"}
    (finding,) = inspect(Model(target, tiny.make_drafter(target)), PROMPTS)
    assert finding.severity == "warning"
    assert "quantised" in finding.what


def test_vocabularies_of_other_sizes(tiny, tokenizer):
    def only(vocab):
        target = tiny.make_target(tokenizer, vocab=vocab)
        (finding,) = inspect(Model(target, tiny.make_drafter(target)), PROMPTS)
        return finding

    padded, short = only(len(tokenizer) + 8), only(len(tokenizer) - 8)
    assert padded.severity == "note"
    assert f"{len(tokenizer) + 8} rows for {len(tokenizer)} tokens" in padded.what
    assert short.severity == "error"


def test_a_mask_among_the_padded_rows_is_what_it_should_be(tiny, tokenizer):
    target = tiny.make_target(tokenizer, vocab=len(tokenizer) + 8)
    drafter = tiny.make_drafter(target, mask_token_id=len(tokenizer) + 1)
    assert [f.severity for f in inspect(Model(target, drafter), PROMPTS)] == ["note"]


def test_no_chat_template(tiny):
    tokenizer = tiny.new_tokenizer()
    tokenizer.chat_template = None
    target = tiny.make_target(tokenizer)
    (finding,) = inspect(Model(target, tiny.make_drafter(target)), PROMPTS)
    assert finding.severity == "warning"
    assert "no chat template" in finding.what
