import pytest
import torch

from dspark.drafters.heads import MARKOV_KINDS, ConfidenceHead, build_markov_head
from dspark.errors import CompatibilityError

VOCAB, RANK, WIDTH = 11, 3, 5


def build(kind):
    torch.manual_seed(0)
    return build_markov_head(kind, VOCAB, RANK, WIDTH).double()


def blocks(rows=4, slots=6):
    torch.manual_seed(1)
    hidden = torch.randn(rows, slots, WIDTH, dtype=torch.float64)
    return torch.randint(VOCAB, (rows, slots)), hidden


def walk(head, previous, hidden):
    state, features = head.initial_state(hidden), []
    for k in range(previous.shape[1]):
        feature, state = head.step(previous[:, k], hidden[:, k], state)
        features.append(feature)
    return torch.stack(features, dim=1)


@pytest.mark.parametrize("kind", MARKOV_KINDS)
def test_step_form_equals_block_form(kind):
    head, (previous, hidden) = build(kind), blocks()
    torch.testing.assert_close(walk(head, previous, hidden), head.block(previous, hidden))


def test_vanilla_and_gated_follow_their_formulas():
    previous, hidden = blocks()
    vanilla, gated = build("vanilla"), build("gated")
    expected = vanilla.markov_w1.weight[previous] @ vanilla.markov_w2.weight.T
    torch.testing.assert_close(vanilla.bias(vanilla.block(previous, hidden)), expected)
    embedded = gated.markov_w1.weight[previous]
    gate = torch.sigmoid(gated.gate_proj(torch.cat((hidden, embedded), -1)))
    torch.testing.assert_close(gated.block(previous, hidden), gate * embedded)


def test_rnn_follows_its_formula_and_its_state_matters():
    head, (previous, hidden) = build("rnn"), blocks()
    state = torch.zeros(len(previous), RANK, dtype=torch.float64)
    for k in range(previous.shape[1]):
        z = torch.cat((state, head.markov_w1.weight[previous[:, k]], hidden[:, k]), -1)
        g, c, o = (z @ head.joint_proj.weight.T + head.joint_proj.bias).split(RANK, -1)
        torch.testing.assert_close(head.block(previous, hidden)[:, k], torch.tanh(o))
        state = g.sigmoid() * state + (1 - g.sigmoid()) * c.tanh()
    fresh, _ = head.step(previous[:, -1], hidden[:, -1], None)
    assert (fresh - head.block(previous, hidden)[:, -1]).abs().max() > 1e-3


def test_unknown_head_is_named():
    with pytest.raises(CompatibilityError, match=r"'lstm'.*vanilla, gated, rnn"):
        build_markov_head("lstm", VOCAB, RANK, WIDTH)


def test_confidence_reads_markov_only_if_told_and_is_fp32():
    previous, hidden = blocks()
    embedded = torch.randn(*previous.shape, RANK)
    plain, markov = ConfidenceHead(WIDTH, 0), ConfidenceHead(WIDTH, RANK).bfloat16()
    expected = hidden.float() @ plain.proj.weight[0] + plain.proj.bias
    torch.testing.assert_close(plain(hidden.float(), None), expected)
    assert markov.proj.weight.shape == (1, WIDTH + RANK)
    logits = markov(hidden.bfloat16(), embedded.bfloat16())
    assert logits.dtype == torch.float32
    assert logits.shape == previous.shape
