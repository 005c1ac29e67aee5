"""A DeepSeek-V4 target with `mtp.*` among its own tensors, from its files to identical outputs."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dspark.attention.packed import BlockLayout
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.deepseek_v4 import DeepseekV4Drafter
from dspark.engine.engine import Engine
from dspark.engine.loading import load
from dspark.engine.speculation import verify
from dspark.request import Request, SamplingParams
from dspark.targets.families import Family
from dspark.targets.forward import tapped
from tests.helpers.deepseek_v4 import write_target

TOKENS = 12
PROMPTS = ((3, 9), tuple(range(7, 26)))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def model(directory):
    """As a user loads it: no drafter is named, the target's own is found."""
    return load(directory, dtype="float32")


@pytest.fixture(scope="module")
def taught(model):
    """The drafter, whose Markov head knows what follows what in the target's answers."""
    drafter, head = model.drafter, model.drafter.markov_head
    source = torch.Generator().manual_seed(7)
    codes = torch.randn(head.markov_w1.weight.shape, generator=source).sign()
    with torch.no_grad():
        head.markov_w1.weight.copy_(codes)
        head.markov_w2.weight.zero_()
        for output in decode(model.target, None):
            for before, after in pairwise(output.token_ids):
                head.markov_w2.weight[after] += codes[before]
    return drafter.eval()


class Spy:
    """Notes what a drafter draws for one request, round by round."""

    def __init__(self, drafter):
        self.drafter, self.rounds = drafter, []

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def propose(self, context, batch, draw):
        drawn = []

        def noting(step, logits, tokens=None):
            found = draw(step, logits, tokens)
            drawn.append(int(found[0]))
            return found

        proposal = self.drafter.propose(context, batch, noting)
        self.rounds.append((list(batch.tokens[0]), drawn))
        return proposal


def decode(target, drafter, temperature=0.0, **options):
    params = SamplingParams(TOKENS, ignore_eos=True, temperature=temperature, seed=5)
    engine = Engine(target, drafter, max_length=96, strict=True, **options)
    return engine.run([Request(prompt, params) for prompt in PROMPTS])


def answers(outputs):
    return [output.token_ids for output in outputs]


def test_the_targets_own_module_is_found(model):
    assert type(model.drafter) is DeepseekV4Drafter
    assert model.target.own_cache
    assert model.drafter.taps == (1, 3)


@pytest.mark.parametrize("options", [{"max_requests": 1}, {"max_requests": 2, "cache_tokens": 64}])
def test_greedy_outputs_are_plain_decodings(model, taught, options):
    """Contexts within the window and beyond it, alone and beside others that give way."""
    outputs = decode(model.target, taught, **options)
    assert answers(outputs) == answers(decode(model.target, None))
    stats = [output.stats for output in outputs]
    assert 0 < sum(s.accepted for s in stats) < sum(s.verified for s in stats)


def test_coupled_outputs_are_plain_decodings_at_temperature_1(model, taught):
    plain = decode(model.target, None, temperature=1.0)
    outputs = decode(model.target, taught, temperature=1.0, verifier="coupled")
    assert answers(outputs) == answers(plain)
    assert sum(output.stats.verified for output in outputs) > TOKENS


@torch.no_grad()
def from_the_whole_context(target, drafter, tokens):
    """The greedy drafts behind a context, by one training pass over all of it."""
    seen = target.forward(RaggedBatch.fresh([tokens[:-1]]), taps=drafter.taps).features_TF
    length = torch.tensor([len(seen)])
    hidden_1KH = drafter(
        seen,
        torch.arange(len(seen)),
        torch.tensor(tokens[-1:]),
        length + torch.arange(drafter.block_size)[None],
        BlockLayout(torch.tensor([0]), length, drafter.block_size),
    )
    drafts, previous = [], torch.tensor(tokens[-1:])
    for row_V in drafter.base_logits(drafter.head_states(hidden_1KH))[0]:
        feature, _ = drafter.markov_head.step(previous, hidden_1KH[:, 0], None)
        previous = (row_V + drafter.markov_head.bias(feature)).argmax(-1)
        drafts.append(int(previous))
    return drafts


def test_every_round_drafts_what_its_whole_context_drafts(model):
    """From the cache, after rejections, and with all slots where few drafts are wanted."""
    target, spied = model.target, Spy(model.drafter)
    params = SamplingParams(TOKENS, ignore_eos=True)
    Engine(target, spied, max_length=96, strict=True).run([Request(PROMPTS[1], params)])
    assert len(spied.rounds) > 2
    for tokens, drafts in spied.rounds:
        whole = from_the_whole_context(target, model.drafter, tokens)
        assert drafts == whole[: len(drafts)]


def test_control_drafts_that_are_not_judged_change_the_output(model, taught, monkeypatch):
    monkeypatch.setattr(verify, "accepted_by_identity", lambda _own, _drafts, lengths: lengths)
    assert answers(decode(model.target, taught)) != answers(decode(model.target, None))


def test_control_other_streams_give_other_drafts(model, monkeypatch):
    """What is read of a layer matters: stream 0 in place of the mean."""
    target, taps = model.target, model.drafter.taps
    batch = RaggedBatch.fresh([PROMPTS[1]])
    right = target.forward(batch, taps=taps).features_TF
    with tapped(replace(target._anatomy, family=Family()), taps) as taken:
        target._anatomy.decoder(input_ids=torch.tensor([PROMPTS[1]]))
    streams = torch.cat([taken[tap] for tap in taps], -1)
    torch.testing.assert_close(streams.mean(1), right)
    assert (streams[:, 0] - right).abs().max() > 0.1
