"""What goes wrong stays with its request: models of NaN, drafters that raise, broken tokenizers."""

from __future__ import annotations

import logging
import math
from itertools import product

import pytest
import torch

from dspark.drafters.base import Proposal
from dspark.engine.engine import Engine
from dspark.engine.model import Model, stream_pieces
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import NumericsError, RequestError
from dspark.request import VERIFIERS, Request, SamplingParams

POISON = 63  # a token whose embedding is no number


@pytest.fixture(scope="module")
def poisoned(tiny):
    model = tiny.make_model(dtype=torch.float64)
    target = type(tiny.make_target()).from_model(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = math.nan
    return target


def sound(tiny):
    return tiny.make_target(dtype=torch.float64)


# The target.


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_request_of_nan_ends_and_no_other_notices(tiny, poisoned, verifier, temperature):
    prompts = [[p % POISON for p in prompt] for prompt in tiny.make_prompts(7, 64, seed=3)]
    bias = {"logit_bias": {POISON: -math.inf}}
    requests = tiny.make_requests(
        prompts, max_new_tokens=14, temperature=temperature, top_p=0.95, seed=5, **bias
    )
    bad = Request((3, POISON, 4), requests[0].params)
    options = {"verifier": verifier, "max_requests": 4, "max_length": 60}
    for make in (lambda _: None, tiny.make_drafter, tiny.make_eagle3):
        # In slots that held numbers that are none before, too.
        engine = Engine(poisoned, make(poisoned), **options)
        mixed = [bad, *requests[:3], bad, *requests[3:], bad]
        outputs = tiny.collect(engine, mixed)
        alone = [
            tiny.decode(sound(tiny), make(sound(tiny)), [r], verifier=verifier)[0] for r in requests
        ]
        for i in (9, 4, 0):
            broken = outputs.pop(i)
            assert (broken.finish_reason, broken.token_ids) == ("error", ())
            assert broken.error.startswith("The target failed: its logits have NaN")
        assert tiny.token_ids(outputs) == tiny.token_ids(alone)
        assert not engine.has_work


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_an_output_that_comes_to_a_row_of_nan_ends_there(tiny, poisoned, verifier):
    """The poisoned token is drawn: what follows it is no number. As plain decoding would end."""
    params = SamplingParams(20, logit_bias={POISON: 3.0})
    requests = [Request((i, i + 1), params.with_seed(i)) for i in range(12)]
    plain = tiny.collect(Engine(poisoned, None, max_length=60), requests)
    assert {output.finish_reason for output in plain} == {"error", "length"}
    for drafter in (tiny.TargetDrafter(sound(tiny)), tiny.MarkovDrafter(64)):
        engine = Engine(poisoned, drafter, max_length=60, verifier=verifier, max_requests=5)
        outputs = tiny.collect(engine, requests)
        for mine, theirs in zip(outputs, plain, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert (mine.finish_reason, mine.error) == (theirs.finish_reason, theirs.error)
            assert (mine.finish_reason == "error") == (
                POISON in mine.token_ids[:-1]
                or (mine.token_ids[-1] == POISON and len(mine.token_ids) < 20)
            )


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_that_poison_the_target_leave_no_trace(tiny, poisoned, verifier, temperature):
    """Keys of NaN are hidden once the draft is rejected, but enter a product with weight 0."""

    class Poisoner(tiny.MarkovDrafter):
        def propose(self, context, batch, draw):
            logits_RV = torch.zeros(len(batch.tokens), 64, dtype=torch.float64)
            logits_RV[:, POISON] = 90.0
            for step in range(batch.num_drafts):
                logits_RV[:, POISON] *= -1 if step == 1 else 1
                draw(step, logits_RV)
            return Proposal()

    requests = [
        Request(
            (i,) * (1 + 2 * i),
            SamplingParams(16, temperature=temperature, seed=i, logit_bias={POISON: -40.0}),
        )
        for i in range(8)
    ]
    engine = Engine(poisoned, Poisoner(64), max_length=60, verifier=verifier)
    for _ in range(2):  # the second time in slots that have held such keys
        outputs = tiny.collect(engine, requests)
        assert {output.finish_reason for output in outputs} == {"length"}
        assert min(output.stats.drafted for output in outputs) > 0
        if temperature == 0 or verifier == "coupled":
            plain = tiny.decode(sound(tiny), None, requests, verifier=verifier)
            assert tiny.token_ids(outputs) == tiny.token_ids(plain)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_that_computes_nan_for_all(tiny, temperature):
    model = tiny.make_model()
    target = type(tiny.make_target()).from_model(model)
    engine = Engine(target, tiny.make_drafter(target), max_length=20)
    params = SamplingParams(9, temperature=temperature)
    for i in range(3):
        engine.add(Request((1, 2 + i), params))
    engine.step()
    model.model.norm.weight[5] = math.nan
    assert all(event.output is None for event in engine.step())  # it may have been the drafts
    outputs = [event.output for event in engine.step()]
    assert [output.finish_reason for output in outputs] == ["error"] * 3
    assert [len(output.token_ids) for output in outputs] == [1] * 3
    assert not engine.has_work
    with pytest.raises(NumericsError, match="target failed"):
        engine.run([Request((1, 2), params)])


def test_what_users_call_raises_the_sentence(tiny, tokenizer):
    model = tiny.make_model(vocab=len(tokenizer), seed=3)
    target = type(tiny.make_target()).from_model(model, tokenizer=tokenizer)
    model.model.norm.weight[5] = math.nan
    for call in (
        lambda: Model(target).generate("the cat"),
        lambda: list(Model(target).stream("the cat")),
        lambda: list(stream_pieces(Engine(target, max_length=20), Request((1, 2)))),
    ):
        with pytest.raises(NumericsError, match="target failed: its logits have NaN"):
            call()


# The drafter.


class Moody:
    """A drafter that raises in the rounds named, counted over all requests."""

    def __init__(self, drafter, *, propose=(), observe=()):
        self.drafter, self.when = drafter, {"propose": propose, "observe": observe}
        self.count = {"propose": 0, "observe": 0}
        self.block_size, self.taps = drafter.block_size, drafter.taps
        self.context_shapes = drafter.context_shapes
        self.reads_next_token, self.rows_ahead = drafter.reads_next_token, drafter.rows_ahead

    def _turn(self, name):
        self.count[name] += 1
        if self.count[name] - 1 in self.when[name]:
            raise RuntimeError(f"a bad day to {name}")

    def propose(self, context, batch, draw):
        self._turn("propose")
        return self.drafter.propose(context, batch, draw)

    def observe(self, *args):
        self._turn("observe")
        self.drafter.observe(*args)


def faults(caplog):
    return [r for r in caplog.records if r.name == "dspark.engine.speculation.drafter_faults"]


@pytest.mark.faulty
@pytest.mark.parametrize("when", [{"propose": (2,)}, {"observe": (1,)}, {"observe": (0,)}], ids=str)
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_drafter_that_raises_in_a_round(tiny, verifier, when, caplog):
    target = sound(tiny)
    requests = tiny.make_requests(tiny.make_prompts(6, 64, seed=2), max_new_tokens=16)
    plain = tiny.decode(target, None, requests)
    drafter = Moody(tiny.make_drafter(target), **when)
    engine = Engine(target, drafter, max_requests=4, max_length=60, verifier=verifier)
    ids = [engine.add(request) for request in requests[:3]]
    outputs, steps, late = {}, 0, None
    while engine.has_work:
        steps += 1
        if faults(caplog) and late is None:
            late = [engine.add(request) for request in requests[3:]]
            drafted = [r.stats.drafted for r in engine.roster.running]
            stopped = list(engine.roster.running)
        outputs |= {e.request_id: e.output for e in engine.step() if e.output is not None}
    assert [outputs[i].token_ids for i in (*ids, *late)] == tiny.token_ids(plain)
    # Those that ran draft no more, those that came later do.
    assert [r.stats.drafted for r in stopped] == drafted
    assert min(outputs[i].stats.drafted for i in late) > 5
    [record] = faults(caplog)
    assert (record.levelno, record.getMessage()) == (
        logging.ERROR,
        "The drafter failed; decoding goes on plainly.",
    )
    assert "a bad day" in str(record.exc_info[1])
    engine.run(requests)
    assert len(faults(caplog)) == 1
    strict = Engine(target, Moody(tiny.make_drafter(target), **when), max_length=60, strict=True)
    with pytest.raises(RuntimeError, match="a bad day"):
        strict.run(requests)
    assert len(faults(caplog)) == 1


@pytest.mark.faulty
def test_rows_of_a_request_that_lost_its_drafter_are_not_observed(tiny):
    target = sound(tiny)
    drafter = Moody(tiny.make_drafter(target), propose=(1,))
    engine = Engine(target, drafter, max_requests=4, max_length=60)
    engine.add(Request((1, 2, 3), SamplingParams(12)))
    while engine.has_work:
        engine.step()
    assert drafter.count["observe"] <= 2
    assert engine._speculator.context._count == 0


@pytest.mark.faulty
def test_three_faults_in_a_row_switch_the_drafter_off(tiny, caplog):
    target = sound(tiny)
    requests = tiny.make_requests(tiny.make_prompts(9, 64, seed=2), max_new_tokens=12)
    plain = tiny.token_ids(tiny.decode(target, None, requests))
    # The second fault is followed by good rounds: then three in a row.
    drafter = Moody(tiny.make_drafter(target), propose=(0, 1, 4, 5, 6, 20))
    engine = Engine(target, drafter, max_requests=1, max_length=60)
    drafted = []
    for request, expected in zip(requests, plain, strict=True):
        [output] = engine.run([request])
        assert output.token_ids == expected
        drafted.append(output.stats.drafted > 0)
    assert drafted[:3] == [False, False, True]
    assert not any(drafted[-3:])
    assert engine._speculator.shield.off
    calls = drafter.count["propose"]
    engine.run(requests)
    assert drafter.count["propose"] == calls
    messages = [record.getMessage() for record in faults(caplog)]
    assert messages == [
        "The drafter failed; decoding goes on plainly.",
        "The drafter failed 3 times in a row and is switched off.",
    ]


class SomeNan:
    """Drafts of NaN from one step on, for requests whose prompt begins with 7."""

    def __init__(self, drafter, step, everyone=False):
        self.drafter, self.step, self.everyone = drafter, step, everyone
        self.block_size, self.taps = drafter.block_size, drafter.taps
        self.context_shapes = drafter.context_shapes
        self.reads_next_token, self.rows_ahead = drafter.reads_next_token, drafter.rows_ahead

    def propose(self, context, batch, draw):
        ill = torch.tensor([self.everyone or tokens[0] == 7 for tokens in batch.tokens])

        def spoil(step, logits_RC, tokens=None):
            if step >= self.step:
                logits_RC = logits_RC.masked_fill(ill[:, None], math.nan)
            return draw(step, logits_RC, tokens)

        return self.drafter.propose(context, batch, spoil)

    def observe(self, *args):
        self.drafter.observe(*args)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize(("verifier", "temperature"), [*product(VERIFIERS, (0.0, 1.0))])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_drafts_of_nan_are_not_sent(tiny, step, verifier, temperature, threshold):
    """Their request has shorter blocks, or plain rounds; the others draft as ever."""
    target = sound(tiny)
    prompts = [(7, 1), (3, 4, 5), (7,), (8, 8)]
    requests = tiny.make_requests(prompts, max_new_tokens=14, temperature=temperature, seed=3)
    drafter = tiny.make_drafter(target)
    schedule = Schedule("threshold", threshold) if threshold else None
    options = {"verifier": verifier, "schedule": schedule, "max_length": 60}
    outputs = Engine(target, SomeNan(drafter, step), **options).run(requests)
    right = Engine(target, drafter, **options).run(requests)
    assert [o.token_ids for o in outputs[1::2]] == [o.token_ids for o in right[1::2]]
    assert [o.stats for o in outputs[1::2]] == [o.stats for o in right[1::2]]
    for output, other in zip(outputs[::2], right[::2], strict=True):
        assert output.finish_reason == "length"
        assert output.stats.verified <= step * output.stats.rounds
        if temperature == 0 or verifier == "coupled":
            assert output.token_ids == other.token_ids


@pytest.mark.faulty
def test_a_drafter_whose_drafts_are_never_numbers_is_switched_off(tiny, caplog):
    target = sound(tiny)
    requests = tiny.make_requests(tiny.make_prompts(3, 64), max_new_tokens=12, temperature=0.7)
    engine = Engine(target, SomeNan(tiny.make_drafter(target), 0, everyone=True), max_length=60)
    outputs = engine.run(requests)
    assert [output.finish_reason for output in outputs] == ["length"] * 3
    assert [output.stats.drafted for output in outputs] == [0] * 3
    assert engine._speculator.shield.off
    assert len(faults(caplog)) == 2
    strict = Engine(target, engine.drafter, max_length=60, strict=True)
    with pytest.raises(NumericsError, match="The drafter failed: its logits have NaN"):
        strict.run(requests)


@pytest.mark.faulty
def test_confidences_of_nan_are_a_fault_of_the_drafter(tiny, target, caplog):
    drafter = tiny.MarkovDrafter(64)
    drafter.confidence_V[:] = math.nan
    requests = tiny.make_requests([[1, 2]], max_new_tokens=9)
    outputs = tiny.decode(target, drafter, requests, threshold=0.5)
    assert tiny.token_ids(outputs) == tiny.token_ids(tiny.decode(target, None, requests))
    [record] = faults(caplog)
    assert isinstance(record.exc_info[1], NumericsError)


# Stop checks.


class Brittle:
    """A tokenizer that cannot decode one token."""

    def __init__(self, tokenizer, bad):
        self.tokenizer, self.bad = tokenizer, bad

    def decode(self, ids, **options):
        if self.bad in ids:
            raise ValueError(f"token {self.bad} has no text")
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("live", [True, False])
def test_a_stop_check_that_raises_ends_its_request_only(tiny, tokenizer, live):
    def make(with_tokenizer):
        return tiny.make_target(vocab=len(tokenizer), tokenizer=with_tokenizer, seed=3)

    params = SamplingParams(16, ignore_eos=True)
    requests = [Request((i, 5), params) for i in range(4)]
    talker = make(tokenizer)
    plain = tiny.decode(talker, None, requests)
    bad = next(
        token
        for token in plain[1].token_ids[3:]
        if all(token not in plain[i].token_ids for i in (0, 2, 3))
    )
    place = plain[1].token_ids.index(bad)
    brittle = make(Brittle(tokenizer, bad))
    for drafter in (None, tiny.TargetDrafter(brittle)):
        engine = Engine(brittle, drafter, max_length=60)
        for request in requests:
            engine.add(request, live=live)
        outputs = {}
        while engine.has_work:
            outputs |= {e.request_id: e.output for e in engine.step() if e.output is not None}
        failed = outputs.pop(1)
        assert failed.finish_reason == "error"
        assert failed.error.startswith("Decoding the text raised ValueError after ")
        assert f"token {bad} has no text" in failed.error
        assert len(failed.token_ids) == (place + 1 if live else 16)
        assert plain[1].text.startswith(failed.text)
        for i, output in outputs.items():
            assert (output.token_ids, output.text) == (plain[i].token_ids, plain[i].text)
        with pytest.raises(RequestError, match="Decoding the text raised"):
            failed.checked()


def test_cancelling_what_cannot_be_decoded(tiny, tokenizer):
    target = tiny.make_target(vocab=len(tokenizer), tokenizer=Brittle(tokenizer, 11), seed=3)
    engine = Engine(target, max_length=60)
    number = engine.add(Request((1, 5), SamplingParams(9, logit_bias={11: 1e4})))
    engine.step()
    engine.step()
    output = engine.cancel(number)
    assert (output.finish_reason, output.text, output.token_ids) == ("cancelled", "", (11, 11))
