"""A tiny pair and a few prompts for the measurements."""

import gzip
import json
import sys

import pytest
from transformers import GenerationConfig

from dspark.data.templates import END, MASK, TEXT_END, train_tokenizer
from dspark.drafters.checkpoints.checkpoint import save_attached
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark
from tests.helpers.targets import tiny_qwen3


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a few made-up prompts per domain."""
    folder = tmp_path_factory.mktemp("data")

    def talk(*turns):
        roles = ("user", "assistant") * len(turns)
        pairs = zip(roles, turns, strict=False)
        return {"messages": [{"role": role, "content": text} for role, text in pairs]}

    questions = [{"turns": [f"What is {i} plus {i}?"]} for i in range(4)]
    write_lines(folder / "eval" / "gsm8k.jsonl", questions)
    pages = [talk(f"What does tool{i} do?", "Much.") | {"command": f"tool{i}"} for i in range(60)]
    write_lines(folder / "corpus" / "tldr_pages_en.jsonl.gz", pages)
    dialogues = [talk("Hello.", "Hi!", f"A table for {i}.", "Done.", "Bye.") for i in range(4)]
    write_lines(folder / "corpus" / "sgd_dialogues_dev.jsonl.gz", [*dialogues, talk("a", "b")])
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A directory with a tiny random target, its tokenizer and an attached drafter."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = train_tokenizer(["What does it do? A table for two.\n"] * 4, 300)
    end, start = (tokenizer.convert_tokens_to_ids(token) for token in (END, TEXT_END))
    model = tiny_qwen3(
        seed=3,
        vocab_size=300,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=start,
        initializer_range=0.5,
    )
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=start)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    target = Target.from_model(model)
    shape = {"num_heads": 2, "num_kv_heads": 1, "rope_theta": 1e4}
    drafter = tiny_dspark(
        target,
        taps=(-1, 1),
        backbone=tiny_backbone(target.hidden_size, 2, **shape),
        block_size=3,
        mask_token_id=tokenizer.convert_tokens_to_ids(MASK),
    )
    save_attached(drafter, folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, pair, data):
    """Call a measurement's main with options; returns its JSON line."""

    def call(module, *options, source=pair, use_data=True):
        argv = [module.__name__, "--threads", "1", *options]
        argv += [] if source is None else ["--model", str(source)]
        monkeypatch.setattr(sys, "argv", [*argv, "--data", str(data)] if use_data else argv)
        module.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call
