import gzip
import json

import pytest

from dspark.data.conversations import as_prompt, read_conversations, read_prompts
from dspark.data.corpus import (
    is_heldout_command,
    read_source,
    stdlib_conversations,
    write_source,
)
from dspark.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_prompts_of_every_kind(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "Once"},
        {"turns": ["first", "second"]},
        {"messages": CHAT},
    )
    raw, turns, chat = read_prompts(path)
    assert raw.messages is None
    assert raw.text == "Once"
    assert turns.messages == ({"role": "user", "content": "first"},)
    assert chat.messages == ({"role": "user", "content": "Hi"},)


def test_gzip_and_plain_files_read_alike(tmp_path):
    plain = write(tmp_path / "a.jsonl", {"messages": CHAT})
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_conversations(plain)) == list(read_conversations(packed))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{not json}\n", "line 1 is not valid JSON"),
        ("[1, 2]\n", "line 1 is not a JSON object"),
        ('{"prompt": "a"}\n{"messages": []}\n', "line 2: 'messages' must be a non-empty list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "'robot'"),
        ('{"messages": [{"role": "user"}]}\n', "'content' string"),
        ('{"prompt": ""}\n', "non-empty 'prompt'"),
        ('{"turns": []}\n', "'turns' must be a non-empty list"),
        ("\n", "holds no prompt"),
    ],
)
def test_malformed_prompt_files_are_named(tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        read_prompts(path)


def test_truncated_gzip_is_an_error(tmp_path):
    whole = gzip.compress(b'{"prompt": "a"}\n' * 1000)
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read_prompts(path)


def test_missing_file():
    with pytest.raises(DataError, match="does not exist"):
        read_prompts("nowhere.jsonl")


def test_prompt_without_a_user_turn_is_refused():
    with pytest.raises(DataError, match="no user turn"):
        as_prompt({"messages": [{"role": "assistant", "content": "x"}]}, "here")


def test_gsm8k_comes_plain_and_boxed(tmp_path):
    record = {
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "1 + 1 = 2\n#### 2"},
        ]
    }
    path = write(tmp_path / "g.jsonl", record)
    plain, boxed = read_source("gsm8k", path)
    assert plain[1]["content"].endswith("#### 2")
    assert boxed[0]["content"].endswith("\\boxed{}.")
    assert boxed[1]["content"] == "1 + 1 = 2\nThe final answer is \\boxed{2}."


def test_tldr_splits_by_command_without_overlap(tmp_path):
    records = [{"command": f"c{i}", "messages": CHAT} for i in range(200)]
    path = write(tmp_path / "t.jsonl", *records)
    train, heldout = list(read_source("tldr", path)), list(read_source("tldr_heldout", path))
    assert len(train) + len(heldout) == 200
    assert len(heldout) == sum(is_heldout_command(f"c{i}") for i in range(200)) > 5


def test_source_without_a_path_is_refused():
    with pytest.raises(DataError, match="needs a path"):
        list(read_source("messages", None))


def test_stdlib_functions_become_requests(tmp_path):
    (tmp_path / "m.py").write_text(
        "class A:\n"
        "    def area(self, w, h):\n"
        '        """Return the area of a rectangle."""\n'
        "        return w * h\n"
        "def bare(x):\n    return x\n"
    )
    ((question, answer),) = stdlib_conversations(tmp_path)
    assert question["content"] == "Write a python function `area`: Return the area of a rectangle."
    assert answer["content"] == (
        "```python\ndef area(self, w, h):\n"
        '    """Return the area of a rectangle."""\n    return w * h\n```'
    )


def test_a_source_is_written_shuffled_by_seed(tmp_path):
    turns = [[{**CHAT[0], "content": str(i)}, CHAT[1]] for i in range(30)]
    path = write(tmp_path / "c.jsonl", *({"messages": t} for t in turns))
    outs = [tmp_path / f"{i}.jsonl.gz" for i in range(3)]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        assert write_source("messages", path, out, seed=seed) == 30
    first, again, other = (list(read_conversations(out)) for out in outs)
    assert first == again != other
    assert sorted(c[0]["content"] for c in first) == sorted(c[0]["content"] for c in other)
    few = tmp_path / "few.jsonl"
    assert write_source("messages", path, few, seed=0, limit=5) == 5
    assert list(read_conversations(few)) == first[:5]


def test_conversations_that_contain_a_text_are_left_out(tmp_path):
    asides = [[{**CHAT[0], "content": text}, CHAT[1]] for text in ("plain", "an alias of ls")]
    path = write(tmp_path / "c.jsonl", *({"messages": t} for t in asides))
    out = tmp_path / "o.jsonl"
    assert write_source("messages", path, out, seed=0, without=("absent", "alias of")) == 1
    assert [c[0]["content"] for c in read_conversations(out)] == ["plain"]


def test_an_empty_source_leaves_an_older_file_alone(tmp_path):
    out = tmp_path / "o.jsonl"
    out.write_text("precious")
    with pytest.raises(DataError, match="holds no conversation"):
        write_source("messages", write(tmp_path / "e.jsonl"), out, seed=0)
    assert out.read_text() == "precious"
