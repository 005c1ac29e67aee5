"""Remakes these files: checkpoints that speculators 0.9 wrote, with its own forward's outputs.

`python make.py [FOLDER]` in an environment with speculators 0.9.0. Weights and inputs are random
with fixed seeds; `forward.safetensors` of each holds the inputs (features of every token, tokens,
anchors) and what the library's training forward makes of them (logits, confidence logits). That of
mtp runs each pass over the whole context anew; `chains` are what its layer gives as engines run it,
each draft a row behind the first pass's rows.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.dflash import core as dflash
from speculators.models.dflash.core import DFlashDraftModel
from speculators.models.dspark import core as dspark
from speculators.models.dspark.core import DSparkDraftModel
from speculators.models.eagle3 import core as eagle3
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.mtp.config import MTPSpeculatorConfig
from speculators.models.mtp.core import MTPDraftModel
from speculators.models.peagle import core as peagle
from speculators.models.peagle.core import PEagleDraftModel
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.masking_utils import create_causal_mask

VOCAB, WIDTH, LENGTH, BLOCK, LAYERS, TAPS, PASSES = 48, 32, 20, 4, 4, [1, 3], 3
KNOWN = [0, 2, 3, 5, 8, 13, 21, 22, 23, 30, 34, 40]
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
SLIDING = {
    "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5, "use_sliding_window": True,
}  # fmt: skip
# Name -> class of the model, class of its layers' configuration, changes of both.
CASES = {
    "dspark": (DSparkDraftModel, Qwen3Config, {}, {}),
    "dspark_gated": (
        DSparkDraftModel,
        Qwen3Config,
        {},
        {"markov_head_type": "gated", "sample_from_anchor": False, "known": KNOWN},
    ),
    "dspark_rnn": (
        DSparkDraftModel,
        Qwen3Config,
        SLIDING,
        {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    ),
    "dspark_llama": (DSparkDraftModel, LlamaConfig, {}, {"known": KNOWN}),
    "dflash": (
        DFlashDraftModel,
        Qwen3Config,
        SLIDING,
        {"sliding_window_non_causal": True, "known": KNOWN},
    ),
    "dflash_anchor": (DFlashDraftModel, LlamaConfig, {}, {"sample_from_anchor": True}),
    "eagle3": (Eagle3DraftModel, Qwen3Config, {}, {}),
    "eagle3_llama": (
        Eagle3DraftModel,
        LlamaConfig,
        {},
        {"known": KNOWN, "norm_before_residual": True},
    ),
    "peagle": (PEagleDraftModel, LlamaConfig, {}, {"known": KNOWN}),
    "eagle3_deep": (Eagle3DraftModel, Qwen3Config, {"num_hidden_layers": 3}, {}),
    "peagle_deep": (PEagleDraftModel, LlamaConfig, {"num_hidden_layers": 2}, {"known": KNOWN}),
    "mtp": (MTPDraftModel, Qwen3Config, {"num_hidden_layers": LAYERS}, {}),
}


def write_target(folder: Path) -> None:
    """The verifier: four layers, its embedding and head not tied."""
    torch.manual_seed(1)
    config = Qwen3Config(**(SHAPE | {"num_hidden_layers": LAYERS, "intermediate_size": 8}))
    config.tie_word_embeddings = False
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.normal_(0, 0.5)
    model.save_pretrained(folder)


def made(name: str):
    """A case's model with random weights."""
    kind, config_class, layer, own = CASES[name]
    own = dict(own)
    known = own.pop("known", None)
    maps = {}
    if known:
        tokens = torch.tensor(known)
        maps["d2t"] = tokens - torch.arange(len(known))
        maps["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, tokens, True)
    torch.manual_seed(2)
    layers = config_class(**(SHAPE | layer))
    model = (
        new_mtp(layers)
        if kind is MTPDraftModel
        else kind.from_training_args(
            layers,
            draft_vocab_size=len(known or range(VOCAB)),
            block_size=BLOCK,
            verifier_name_or_path="target",
            target_layer_ids=TAPS,
            mask_token_id=VOCAB - 1,
            markov_rank=6,
            ttt_steps=PASSES,
            num_depths=PASSES,
            draft_attn_impl="eager" if "eagle" in name else "sdpa",
            **({"norm_before_residual": False} | own),
            **maps,
        )
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            # P-EAGLE's embedding is its own, that of its mask token above all.
            if weight.requires_grad and ("embed_tokens" not in part or name.startswith("peagle")):
                mean, std = (1.0, 0.2) if "norm" in part else (0.0, 0.25)
                weight.normal_(mean, std, generator=generator)
    return model.eval()


def new_mtp(layers) -> MTPDraftModel:
    """Without the weights that the library looks for in a verifier, which this one has not."""
    how = SpeculatorsConfig(
        algorithm="mtp",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=PASSES)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained("target"),
    )
    layers._attn_implementation = "eager"
    model = MTPDraftModel(
        MTPSpeculatorConfig(transformer_layer_config=layers, speculators_config=how)
    )
    model.load_verifier_weights()
    return model


def caught_metrics(module, found):
    """In the place of a loss, whose kernels want a GPU: keep what it was given."""

    def ours(*args, **options):
        found.append(args or options)
        return torch.zeros(()), {}

    module.compute_metrics = ours


def caught_anchors(found):
    """Keep the anchors that are drawn."""
    theirs = dflash.select_anchors

    def ours(*args):
        found.append(theirs(*args))
        return found[-1]

    dflash.select_anchors = ours


@torch.no_grad()
def forward(name: str, model) -> dict[str, torch.Tensor]:
    """Inputs, and what the library's forward makes of them."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(1, LENGTH, len(TAPS) * WIDTH, generator=generator)
    states = torch.randn(1, LENGTH, WIDTH, generator=generator)
    tokens = torch.randint(0, VOCAB - 1, (1, LENGTH), generator=generator)
    given = {
        "loss_mask": torch.ones(1, LENGTH, dtype=torch.bool),
        "verifier_last_hidden_states": states,
        "document_ids": torch.zeros(1, LENGTH, dtype=torch.long),
    }
    saved = {"features": features[0], "tokens": tokens[0]}
    heads, anchors = [], []
    if name == "mtp":
        saved["features"] = states[0]
        logits, _, _ = model(tokens, states)
        chains = [chain(model, states[:, :length], tokens) for length in range(1, LENGTH - PASSES)]
        return saved | {"logits": torch.cat(logits), "chains": torch.stack(chains, dim=1)}
    if "eagle" in name:
        shifted = {key: value[:, :-1] for key, value in given.items()}
        if name.startswith("peagle"):
            return saved | at_once(model, features[:, :-1], tokens[:, 1:], shifted)
        caught_metrics(eagle3, heads)
        model(features[:, :-1], tokens[:, 1:], ttt_steps=PASSES, **shifted)
        return saved | {"logits": torch.stack([args[0][0] for args in heads])}
    module = dspark if isinstance(model, DSparkDraftModel) else dflash
    caught_metrics(module, heads)
    caught_anchors(anchors)
    torch.manual_seed(5)
    model(features, tokens, max_anchors=5, **given)
    args, (chosen, valid) = heads[0], anchors[0]
    assert valid.all()
    saved |= {"anchors": chosen, "logits": args[0][0].view(5, BLOCK, -1)}
    if module is dspark and args[2] is not None:
        saved["confidence_logits"] = args[2][0].view(5, BLOCK)
    return saved


def at_once(model, features, tokens, given):
    """Logits of P-EAGLE's rows by depth and place, and `there`: which of them it drew."""
    heads = []
    caught_metrics(peagle, heads)
    given["loss_mask"] = given["loss_mask"].index_fill(1, torch.tensor([0]), False)
    torch.manual_seed(5)
    every = {"down_sample_ratio": 1.0, "down_sample_ratio_min": 1.0}
    model(features, tokens, num_depths=PASSES, **every, **given)
    found = heads[0]
    rows = found["depth"], found["anchor_pos"]
    logits = torch.zeros(PASSES, LENGTH - 1, found["logits"].shape[-1])
    there = torch.zeros(PASSES, LENGTH - 1, dtype=torch.uint8)
    logits[rows], there[rows] = found["logits"][0], 1
    return {"logits": logits, "there": there}


def chain(model, states, tokens):
    """Logits of the drafts behind a context, each a further row of mtp's own layer."""
    config, length, logits = model.config.transformer_layer_config, states.shape[1], []
    for _ in range(PASSES):
        places = torch.arange(states.shape[1])[None]
        mask = create_causal_mask(
            config=config, inputs_embeds=states, attention_mask=None, past_key_values=None
        )
        given = model.mtp_layers[0](
            hidden_states=states,
            token_embeddings=model.embed_tokens(tokens[:, 1 : states.shape[1] + 1]),
            attention_mask=mask,
            position_ids=places,
            position_embeddings=model.rotary_emb(states, places),
        )
        assert given.shape[1] == length + len(logits)
        logits.append(model.lm_head(given[0, -1]))
        states = torch.cat((states, given[:, -1:]), dim=1)
    return torch.stack(logits)


def main(folder: str) -> None:
    """Write everything."""
    os.chdir(folder)
    write_target(Path("target"))
    for name in CASES:
        model = made(name)
        model.save_pretrained(name)
        Path(name, "config.py").unlink(missing_ok=True)  # the library's own code
        found = forward(name, model)
        save_file({k: v.contiguous() for k, v in found.items()}, f"{name}/forward.safetensors")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(Path(__file__).parent)]))
