"""The reference stack's own training runs, step by step, from their weights and batches."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dspark.data.samples import Sample, SampleBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.training.losses.blocks import DFLASH_WEIGHTS, AnchorBlocks, LossWeights, block_loss
from dspark.training.losses.eagle3 import ChainRows, ttt_loss, ttt_passes
from tests.helpers.targets import lent_parts

GOLDEN = Path(__file__).parents[1] / "golden" / "replay"
SHARED = Path(__file__).parents[2].parent / "shared"
TARGET = SHARED / "models" / "stories260K"

pytestmark = pytest.mark.skipif(not TARGET.is_dir(), reason="needs shared/models/stories260K")


class Replay:
    """Target, drafter and optimiser of one algorithm's run."""

    def __init__(self, algorithm: str, init: Path):
        from transformers import AutoModelForCausalLM

        self.algorithm = algorithm
        self.target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
        embedding = self.target.get_input_embeddings().weight.detach()
        head = self.target.get_output_embeddings().weight.detach()
        self.drafter = load_drafter(init)
        self.drafter.bind(lent_parts(embedding, head))
        self.drafter.train()
        self.optimizer = torch.optim.AdamW(
            self.drafter.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )

    @torch.no_grad()
    def features(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.target.model(input_ids, output_hidden_states=True).hidden_states
        return torch.cat([states[i + 1] for i in self.drafter.taps], dim=-1), states[-1]

    def loss(self, input_ids: Tensor, prompt_len: Tensor, anchors: Tensor) -> tuple[Tensor, dict]:
        """Loss of a step, and what its log names beside it."""
        features, teacher = (x.flatten(0, 1) for x in self.features(input_ids))
        length = input_ids.shape[1]
        batch = SampleBatch.of(
            [
                Sample(tuple(ids), tuple(i >= start for i in range(length)))
                for ids, start in zip(input_ids.tolist(), prompt_len.tolist(), strict=True)
            ]
        )
        if self.algorithm == "eagle3":
            chains = ChainRows.build(batch, self.drafter.config.ttt_length, "reference")
            hidden = ttt_passes(self.drafter, features, chains)
            report = ttt_loss(self.drafter, hidden, teacher, chains)
            return report.loss, {"tau_probabilistic": report.accepted_length.item()}
        rows = anchors + length * torch.arange(len(anchors)).unsqueeze(1)
        blocks = AnchorBlocks.build(batch, rows.flatten(), self.drafter.block_size)
        layout = blocks.layout(self.drafter.config.block_size)
        hidden = self.drafter(
            features, batch.positions_T, blocks.tokens_M, blocks.positions_MK, layout
        )
        weights = LossWeights() if self.algorithm == "dspark" else DFLASH_WEIGHTS
        report = block_loss(self.drafter, hidden, teacher, blocks, weights)
        named = {"tau_probabilistic": report.accepted_length.item(), "ce_loss": report.ce.item()}
        if self.algorithm == "dspark":
            named |= {"l1_loss": report.tv.item(), "confidence_loss": report.confidence.item()}
        return report.loss, named

    def step(self, input_ids: Tensor, prompt_len: Tensor, anchors: Tensor, lr: float) -> dict:
        loss, named = self.loss(input_ids, prompt_len, anchors)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return {"loss": loss.item(), "gnorm": norm.item(), **named}


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def deviation(seen: dict, logged: dict) -> float:
    """Largest relative difference between a step's numbers and the log's."""
    return max(abs(value - logged[name]) / abs(logged[name]) for name, value in seen.items())


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        ("dspark", 5),
        pytest.param("dspark", 20, marks=pytest.mark.slow),
        ("dflash", 5),
        pytest.param("dflash", 20, marks=pytest.mark.slow),
        ("eagle3", 4),
        pytest.param("eagle3", 20, marks=pytest.mark.slow),
    ],
)
def test_the_first_steps_follow_the_reference(algorithm, steps):
    log = read_log(GOLDEN / f"losses_{algorithm}_first20.jsonl")
    data = {k: v.long() for k, v in load_file(GOLDEN / "first20.safetensors").items()}
    replay = Replay(algorithm, GOLDEN / f"init_{algorithm}")
    for i, logged in enumerate(log[:steps]):
        seen = replay.step(
            data["input_ids"][i], data["prompt_len"][i], data["anchors"][i], logged["lr"]
        )
        if i == 0:
            # The log has five decimals, which is coarser than 1e-5 of the small terms.
            assert seen["loss"] == pytest.approx(logged["loss"], rel=1e-5)
            for name, value in seen.items():
                assert value == pytest.approx(logged[name], rel=1e-5, abs=6e-6), name
        assert deviation(seen, logged) < 1e-3, i


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_the_whole_run_follows_the_reference(algorithm):
    folder = SHARED / "golden" / "replay"
    log = read_log(folder / f"losses_{algorithm}.jsonl")
    with gzip.open(folder / "train.jsonl.gz", "rt") as lines:
        records = {record["id"]: record for record in map(json.loads, lines)}
    order = json.loads((folder / "batch_order.json").read_text())
    anchors = load_file(folder / "anchors.safetensors")["anchors"].long()
    replay = Replay(algorithm, folder / f"init_{algorithm}")
    losses = []
    for i, logged in enumerate(log):
        batch = [records[number] for number in order[i]]
        seen = replay.step(
            torch.tensor([record["input_ids"] for record in batch]),
            torch.tensor([record["prompt_len"] for record in batch]),
            anchors[i],
            logged["lr"],
        )
        losses.append(seen["loss"])
        if i % 50 == 0 or i == len(log) - 1:
            print(f"step {i}: {seen['loss']:.6f}, {deviation(seen, logged):.2e} off", flush=True)
    assert losses[-1] == pytest.approx(log[-1]["loss"], rel=0.01)
