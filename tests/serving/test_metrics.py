"""The figures say what happened."""

import numpy as np
import pytest

from dspark.engine.speculation.round_record import RoundRecord
from dspark.scheduling.reliability import expected_calibration_error
from dspark.serving.counters import GAP_S, Counters, RunningCalibrationError, SecondsHistogram


@pytest.fixture(scope="module")
def counted(model, kit):
    """Figures and usages of a server that was asked a few things."""
    with kit.serve(model, schedule="fixed") as live:
        usages = [live.chat(max_tokens=20 + i).json["usage"] for i in range(3)]
        early = live.figures()
        assert live.post("/v1/completions", {"prompt": "x", "nonsense": 1}).status == 400
        with live.client() as client:
            stream = client.completions.create(
                model="bundled", prompt="x", max_tokens=200, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            next(iter(stream))
            stream.close()
        live.wait_until(lambda now: now.running == 0)
        yield live.figures(), usages, live.service, early


def test_requests_and_tokens(counted):
    found, usages, *_ = counted
    ended = sum(v for key, v in found.items() if key[0] == "vllm:request_success_total")
    assert ended == 4
    assert found["vllm:request_success_total", "abort"] == 1
    tokens = sum(usage["completion_tokens"] for usage in usages)
    assert found["vllm:generation_tokens_total",] == tokens
    assert found["vllm:prompt_tokens_total",] == sum(u["prompt_tokens"] for u in usages)
    assert found["vllm:time_to_first_token_seconds_count",] == 4
    assert found["vllm:request_time_per_output_token_seconds_count",] == 3
    assert found["vllm:e2e_request_latency_seconds_count",] == 3
    assert found["vllm:num_requests_running",] == found["vllm:num_requests_waiting",] == 0
    assert found["dspark_http_requests_total", "/v1/completions", "400"] == 1
    assert found["dspark_http_requests_total", "/v1/chat/completions", "200"] == 3


def test_speculation(counted):
    found, usages, service, _ = counted
    verified = sum(usage["dspark"]["verified"] for usage in usages)
    total = found["vllm:spec_decode_num_draft_tokens_total",]
    assert total >= verified > 0  # the one that left had drafts too
    by_place = [found["dspark_verified_tokens_total", str(k)] for k in range(7)]
    assert sum(by_place) == total
    assert by_place == sorted(by_place, reverse=True)
    accepted = found["vllm:spec_decode_num_accepted_tokens_total",]
    kept = [found["vllm:spec_decode_num_accepted_tokens_per_pos_total", str(k)] for k in range(7)]
    assert sum(kept) == accepted > 0
    drafts = found["vllm:spec_decode_num_drafts_total",]
    assert found["dspark_accepted_length",] == pytest.approx(1 + accepted / drafts)
    assert found["dspark_step_seconds_count",] == service.counters.steps
    pages = {state: found["dspark_cache_pages", state] for state in ("held", "kept", "free")}
    assert pages["held"] == 0
    assert sum(pages.values()) == service.engine.memory.pool.pages


def test_time_between_outputs(counted):
    """One for each step after the first that brought an answer tokens, however many they were."""
    *_, usages, _, found = counted
    name = "vllm:inter_token_latency_seconds"
    rounds = sum(usage["dspark"]["rounds"] for usage in usages)
    tokens = sum(usage["completion_tokens"] for usage in usages)
    assert found[f"{name}_count",] == found[f"{name}_bucket", "+Inf"] == rounds
    assert rounds < tokens - len(usages)  # some steps brought several
    assert 0 < found[f"{name}_sum",] < found["vllm:e2e_request_latency_seconds_sum",]
    assert found[f"{name}_bucket", "0.01"] <= found[f"{name}_bucket", "80.0"] == rounds


def test_buckets_are_those_of_prometheus():
    values = np.concatenate([np.random.default_rng(0).lognormal(-3, 3, 500), GAP_S])
    times = SecondsHistogram(GAP_S)
    for value in values:
        times.add(float(value))
    below = [int((values <= bound).sum()) for bound in GAP_S]
    assert np.cumsum(times.counts).tolist() == [*below, len(values)]
    assert times.total_s == pytest.approx(values.sum())


def test_drift_is_the_calibration_error():
    rng = np.random.default_rng(0)
    predicted = rng.random(400)
    stayed = rng.random(400) < predicted**2
    drift = RunningCalibrationError()
    for part in np.split(np.arange(400), 8):
        drift.add(predicted[part], stayed[part])
    assert drift.observed == 400
    assert drift.error == pytest.approx(expected_calibration_error(predicted, stayed), abs=5e-3)
    for _ in range(400):  # a drafter that has become right is believed after a while
        drift.add(np.ones(400), np.ones(400, dtype=bool))
    assert drift.error < 0.01


def test_trimmed_drafts_tell_nothing(model, kit):
    """With the verifier `block` only whole blocks do, with `token` every verified draft."""

    record = RoundRecord(
        request_ids=(0, 1, 2),
        rounds=(0, 0, 0),
        anchors=(9, 9, 9),
        greedy=(False, False, False),
        drafts=((1, 2, 3), (4, 5, 6), ()),
        confidence_logits_RK=None,
        are_margins=False,
        survival_RK=np.array([[0.9, 0.5, 0.2], [0.8, 0.7, 0.6]]),
        lengths=(3, 1, 0),
        accepted=(1, 1, 0),
        committed=((1, 7), (4, 7), (7,)),
        rows=7,
        budget=None,
        draft_ms=1.0,
        schedule_ms=1.0,
        verify_ms=1.0,
    )
    for whole, seen in ((True, 3), (False, 4)):
        counters = Counters(3, whole_blocks=whole)
        counters.add_step(3.0, record)
        assert counters.drift.observed == seen
        assert counters.drafted_K.tolist() == [2, 2, 2]
        assert counters.verified_K.tolist() == [2, 1, 1]
        assert counters.accepted_K.tolist() == [2, 0, 0]
        assert counters.rounds == 2
