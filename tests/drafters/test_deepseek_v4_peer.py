"""Hyper-connections of the stages by vLLM's own functions (DSPARK_VLLM names its Python)."""

import json
import os
import subprocess

import pytest
import torch

from tests.helpers.deepseek_v4 import tiny_config, tiny_drafter, tiny_layers

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif("DSPARK_VLLM" not in os.environ, reason="DSPARK_VLLM names no Python"),
]
WIDTH, VOCAB = 32, 37
# The file of the functions by itself: vLLM as a whole need not load.
SCRIPT = """
import importlib.util, json, sys, torch
root = importlib.util.find_spec("vllm").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("mhc", root + "/model_executor/kernels/mhc/torch.py")
mhc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mhc)
told = torch.load(sys.argv[1])
streams, carried, gaps = told["streams"], None, []
for step in told["steps"]:
    def pre(mix):
        return mhc.mhc_pre_delayed_torch(
            streams, step["fn"], step["scale"], step["base"], told["rms_eps"], told["hc_eps"],
            told["hc_eps"], 2.0, told["iterations"], pre_mix=mix)
    post, comb, read, own = pre(carried)
    if not told["carried"]:
        read = pre(own)[2]
    gaps.append(float((read - step["read"]).abs().max()))
    streams, carried = mhc.mhc_post_torch(step["out"], streams, post, comb), own
if told["carried"]:
    collapsed = (carried.unsqueeze(-1) * streams).sum(1)
    gaps.append(float((collapsed - told["collapsed"]).abs().max()))
print(json.dumps(gaps))
"""


@pytest.mark.parametrize("carried", [False, True])
def test_every_sublayer_reads_what_vllms_functions_give_it(
    tmp_path, make_parts, one_block, carried
):
    layers = tiny_layers(WIDTH, carried_mix=carried)
    drafter = tiny_drafter(make_parts(VOCAB, WIDTH), tiny_config(VOCAB, layers))
    steps = []

    def note(connection, before, sublayer):
        state = {name: getattr(connection, name).detach() for name in ("fn", "scale", "base")}
        before.register_forward_pre_hook(
            lambda _module, args: steps.append(state | {"read": args[0][0]})
        )
        sublayer.register_forward_hook(
            lambda _module, _args, out: steps[-1].update(
                out=(out[0] if isinstance(out, tuple) else out)[0]
            )
        )

    for layer in drafter.layers:
        note(layer.attn_hc, layer.input_layernorm, layer.self_attn)
        note(layer.ffn_hc, layer.post_attention_layernorm, layer.mlp)
    features = torch.randn(9, 2 * WIDTH, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        hidden = drafter(
            features, torch.arange(9), torch.tensor([4]), 9 + torch.arange(5)[None],
            one_block(9, 5),
        )  # fmt: skip
    tokens = torch.tensor([4] + [drafter.config.mask_token_id] * 4)
    streams = drafter.borrowed.embedding_VH[tokens].unsqueeze(1).repeat(1, layers.hc_mult, 1)
    told = {
        "streams": streams, "steps": steps, "carried": carried, "collapsed": hidden[0],
        "rms_eps": layers.rms_norm_eps, "hc_eps": layers.hc_eps,
        "iterations": layers.hc_sinkhorn_iters,
    }  # fmt: skip
    torch.save(told, tmp_path / "told.pt")
    command = [os.environ["DSPARK_VLLM"], "-c", SCRIPT, str(tmp_path / "told.pt")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    gaps = json.loads(said.splitlines()[-1])
    assert len(gaps) == 2 * layers.num_layers + carried
    assert max(gaps) < 1e-5, gaps
