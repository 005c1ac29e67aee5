import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dspark.data.templates import TEXT_END, train_tokenizer
from dspark.training.language_model import (
    LEARN,
    READ,
    UNLEARN,
    TokenStream,
    corpus_documents,
    learned_documents,
    repeated_tokens,
    repeating_documents,
    stream_loss,
)
from dspark.training.recipe import CorpusSettings, Source


def talk(answer, *more):
    turns = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": answer}]
    return tuple(turns) + tuple(turn for text in more for turn in talk(text))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["tell me", "round and round and round we go", "a straight answer"], 300)


def by_definition(ids, own, gram):
    """A token is repeated if some window over it equals an earlier window of its own answer."""
    answer = np.cumsum(~np.asarray(own))  # constant within a row of own tokens
    starts = [i for i in range(len(ids) - gram + 1) if all(own[i : i + gram])]
    found = np.zeros(len(ids), dtype=bool)
    for i in starts:
        for j in starts:
            if j < i and answer[i] == answer[j] and ids[i : i + gram] == ids[j : j + gram]:
                found[i : i + gram] = True
    return found


@pytest.mark.parametrize("gram", [1, 2, 3, 5])
def test_repeated_tokens_are_found(gram):
    random = np.random.default_rng(gram)
    some = 0
    for _ in range(50):
        ids = random.integers(0, 4, 40).tolist()
        own = (random.random(40) < 0.9).tolist()
        expected = by_definition(ids, own, gram)
        assert repeated_tokens(ids, own, gram).tolist() == expected.tolist()
        some += expected.sum()
    assert some > 20


def test_only_answers_that_repeat_themselves_are_unlearned(tokenizer):
    loop, straight = talk("round and round and round and"), talk("we go")
    (document,) = repeating_documents(tokenizer, [loop, straight], gram=2)
    (whole,) = learned_documents(tokenizer, [loop])
    assert document["id"].tolist() == whole["id"].tolist()
    assert set(document["part"]) == {READ, UNLEARN}
    repeats = document["id"][document["part"] == UNLEARN].tolist()
    assert tokenizer.decode(repeats).strip() in "round and round and round and"
    assert document["part"][-1] == READ


def test_the_same_answer_twice_is_no_loop(tokenizer):
    assert not repeating_documents(tokenizer, [talk("we go straight", "we go straight")], gram=4)


def test_sources_play_their_parts_as_often_as_they_say(tokenizer, tmp_path):
    for name, answer in (("human", "we go"), ("own", "round and round and round and")):
        line = json.dumps({"messages": talk(answer)})
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    sources = (
        Source(path="human.jsonl", repeat=3),
        Source(path="own.jsonl", repeat=2, unlearn_repeats=2),
    )
    documents = corpus_documents(CorpusSettings(root=str(tmp_path), sources=sources), tokenizer)
    assert [set(document["part"]) for document in documents] == [{LEARN}] * 3 + [
        {READ, UNLEARN}
    ] * 2
    end = tokenizer.convert_tokens_to_ids(TEXT_END)
    assert all(document["id"][-1] == end for document in documents)


def test_rows_hold_every_token_of_an_epoch_once_with_its_part(tokenizer):
    documents = learned_documents(tokenizer, [talk("we go"), talk("a straight answer")] * 4)
    documents[0]["part"] = READ
    stream = TokenStream(documents, row_tokens=8, seed=0)
    ids, parts = stream.rows(0, stream.rows_per_epoch)
    total = sum(len(document) for document in documents)
    assert 0 <= total - ids.numel() < 8
    assert int((parts == READ).sum()) in range(len(documents[0]) - 8, len(documents[0]) + 1)
    again_ids, again_parts = stream.rows(1, 1)
    assert torch.equal(again_ids[0], ids[1])
    assert torch.equal(again_parts[0], parts[1])


def test_loss_learns_unlearns_and_leaves_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    parts = torch.tensor([LEARN, UNLEARN, READ, LEARN, UNLEARN, READ], dtype=torch.int8)
    p = logits.softmax(-1)[range(6), labels]
    expected = (-p[[0, 3]].log().sum() - 2 * (1 - p[[1, 4]]).log().sum()) / 6
    found = stream_loss(logits, labels, parts, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient[[2, 5]].abs().max() == 0
    assert gradient[0, 0] < 0 < gradient[1, 1]


def test_all_learned_is_cross_entropy():
    logits, labels = torch.randn(7, 5), torch.arange(7) % 5
    found = stream_loss(logits, labels, torch.full((7,), LEARN, dtype=torch.int8), 1.0)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))


def test_a_certain_token_can_be_unlearned():
    logits = torch.tensor([[60.0, 0.0]], requires_grad=True)
    parts = torch.tensor([UNLEARN], dtype=torch.int8)
    loss = stream_loss(logits, torch.tensor([0]), parts, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
