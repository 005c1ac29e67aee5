"""A target that runs through its own cache, from the command line."""

from dspark.data.templates import train_tokenizer
from tests.helpers.state_models import STATE_MODELS, new_model


def test_it_is_said_and_speculation_changes_nothing(dspark, tmp_path):
    tokenizer = train_tokenizer(["how many apples are left", "a table for two"] * 4, 300)
    shape = {"vocab_size": 300, "max_position_embeddings": 160, "eos_token_id": 2}
    new_model("lfm2", **STATE_MODELS["lfm2"], **shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = dspark(
        "generate", tmp_path, "--draft", "ngram", "--prompt", "two two two two", "--compare",
        "--max-new-tokens", 24, "--dtype", "float32", "--threads", 1, "--schedule", "fixed",
        "--json",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "through its own cache" in " ".join(result.err.split())
    assert result.json["identical"] is True
    assert result.json["verified"] > 0
