import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import CheckpointError, UsageError
from dspark.targets.layerless import load_without_layers
from dspark.targets.target import Target

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "tied qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "scaled gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=16, final_logit_softcapping=30.0)
    ),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_lends_what_the_whole_target_lends(folder, dtype):
    whole = Target.load(folder, device="cpu", dtype=dtype, weights="plain")
    bare = load_without_layers(folder, device="cpu", dtype=dtype)
    for name, want in vars(whole.parts()).items():
        got = getattr(bare.parts(), name)
        if isinstance(want, torch.Tensor):
            assert torch.equal(got, want)
            assert (got.dtype, got.requires_grad) == (want.dtype, False)
        else:
            assert got == want
    for name in ("hidden_size", "num_layers", "vocab_size", "max_context", "dtype", "device"):
        assert getattr(bare, name) == getattr(whole, name)
    tied = whole.parts().head_VH.data_ptr() == whole.parts().embedding_VH.data_ptr()
    assert (bare.parts().head_VH.data_ptr() == bare.parts().embedding_VH.data_ptr()) is tied


def test_it_has_no_layers_to_run(folder):
    bare = load_without_layers(folder, device="cpu")
    with pytest.raises(UsageError, match="loaded without its layers"):
        bare.forward(RaggedBatch.fresh([[1, 2, 3]]))


def test_names_below_a_wrapper_are_found(folder):
    want = load_without_layers(folder, device="cpu").parts()
    [path] = folder.glob("*.safetensors")
    state = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    got = load_without_layers(folder, device="cpu").parts()
    assert torch.equal(got.embedding_VH, want.embedding_VH)
    assert torch.equal(got.final_norm_H, want.final_norm_H)


def test_missing_and_damaged_weights_are_refused(folder):
    [path] = folder.glob("*.safetensors")
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "embed" not in k and "lm_head" not in k}, path)
    with pytest.raises(CheckpointError, match="no weights of the target's embedding"):
        load_without_layers(folder, device="cpu")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_without_layers(folder, device="cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors"):
        load_without_layers(folder, device="cpu")


def test_the_config_rules_the_dtype_where_none_is_asked_for(folder):
    assert json.loads((folder / "config.json").read_text())
    assert load_without_layers(folder, device="cpu").dtype == torch.float32
