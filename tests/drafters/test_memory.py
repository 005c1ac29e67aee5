"""Embedding and head equal to the target's are held once, whatever is done to a drafter.

Width, heads and captured layers are those of the published 4B drafter; one layer, a thin MLP and a
tenth of the vocabulary keep the test small.
"""

import gc
import json

import pytest
import torch
from safetensors.torch import save_file

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.drafters.checkpoints.published import dspark_to_json
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter

VOCAB, WIDTH = 16384, 2560
TABLE_BYTES = VOCAB * WIDTH * 2

CONFIG = DSparkConfig(
    backbone=BackboneConfig(
        hidden_size=WIDTH,
        intermediate_size=1024,
        num_layers=1,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_taps=5,
    ),
    vocab_size=VOCAB,
    block_size=7,
    mask_token_id=VOCAB - 1,
    target_layer_ids=(1, 9, 17, 25, 33),
    num_target_layers=36,
)


def big_storages():
    """Addresses of all memory that is as large as a table and held by some tensor."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = [x.untyped_storage() for x in tensors if x.device.type == "cpu"]
    return {s.data_ptr() for s in storages if s.nbytes() >= TABLE_BYTES}


def filled(*shape):
    """A table whose rows differ, quicker to make than a random one."""
    rows = torch.linspace(-0.05, 0.05, shape[0]).to(torch.bfloat16)
    return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


@pytest.fixture
def checkpoint(tmp_path):
    """A published checkpoint with its own copies of the target's tied table, and that table."""
    with torch.device("meta"):
        empty = DSparkDrafter(CONFIG).state_dict()
    state = {name: filled(*tensor.shape) for name, tensor in empty.items()}
    table = filled(VOCAB, WIDTH)
    state |= {"embed_tokens.weight": table, "lm_head.weight": table.clone()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dspark_to_json(CONFIG, "bfloat16")))
    return tmp_path, table


def draft(drafter, parts):
    cache, table = PagedCache(drafter.context_shapes, 1, dtype=torch.bfloat16), BlockTable((0,))
    features = torch.zeros(3, 5 * WIDTH, dtype=torch.bfloat16)
    rows = RaggedBatch.build([(table, 0, [0, 1, 2])])
    drafter.observe(cache, rows, features, rows.input_ids_T)
    batch = DraftBatch((table,), torch.tensor([4]), (3,), ([1, 2, 3, 4],), 2)
    return drafter.propose(cache, batch, lambda _, logits, __=None: logits.argmax(-1))


def test_a_tied_table_is_held_once(checkpoint, make_parts):
    directory, table = checkpoint
    assert big_storages() == {table.data_ptr()}
    parts = make_parts(2, 2, embedding_VH=table, head_VH=table, vocab_size=VOCAB, hidden_size=WIDTH)
    drafter = load_drafter(directory)
    assert len(big_storages()) == 3  # the file's own two, until they are seen to be equal
    drafter.bind(parts)
    assert big_storages() == {table.data_ptr()}
    draft(drafter, parts)
    assert big_storages() == {table.data_ptr()}
    drafter.to(torch.float16)
    drafter.eval()
    draft(drafter, parts)
    assert drafter.borrowed.embedding_VH is drafter.borrowed.head_VH is table
    drafter.bind(parts)
    save_attached(drafter, directory, dtype=None)
    assert big_storages() == {table.data_ptr()}
    assert (directory / "dspark" / "model.safetensors").stat().st_size < 2 * TABLE_BYTES


def test_control_a_table_that_differs_is_seen(checkpoint, make_parts):
    directory, table = checkpoint
    other = table.clone()
    other[3] += 1
    parts = make_parts(2, 2, embedding_VH=table, head_VH=other, vocab_size=VOCAB, hidden_size=WIDTH)
    drafter = load_drafter(directory)
    drafter.bind(parts)
    assert len(big_storages()) == 3
