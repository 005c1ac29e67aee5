"""Makes the measurements importable, which lie beside the package, and gives them a tiny pair."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from dspark.data.tokenizer import END, MASK, TEXT_END, train_tokenizer
from dspark.drafters.checkpoint import save_attached
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.targets.target import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


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
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        eos_token_id=end,
        bos_token_id=None,
        pad_token_id=start,
        initializer_range=0.5,
    )
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=start)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    drafter_config = DSparkConfig(
        BackboneConfig(16, 24, 1, 2, 1, 8, num_taps=2, rope_theta=1e4),
        vocab_size=300,
        block_size=3,
        mask_token_id=tokenizer.convert_tokens_to_ids(MASK),
        target_layer_ids=(-1, 1),
        num_target_layers=2,
        markov_rank=4,
    )
    parts = Target.from_model(model).parts()
    random = torch.Generator().manual_seed(1)
    save_attached(DSparkDrafter.from_target(parts, drafter_config, generator=random), folder)
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
