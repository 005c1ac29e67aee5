"""The measurement of the server: every answer is compared, and what is wrong is told apart."""

import pytest

from benchmarks import serving
from benchmarks.common import load_pair
from benchmarks.serving import Ask, Heard, differences, judge


def test_all_answers_over_http_are_the_engines(run, monkeypatch):
    monkeypatch.setattr(serving, "QUESTIONS", ("{}?", "What is {}?"))  # the pair's context is short
    line = run(
        serving, "--requests", "12", "--users", "4", "--leaving", "0.2", "--max-new-tokens", "12",
        "--overhead-requests", "4", "--repeats", "1", use_data=False,
    )  # fmt: skip
    stayed = line["requests"] - line["left"]
    assert 0 < stayed < 12
    assert (line["complete"], line["identical"], line["lost"]) == (stayed, stayed, 0)
    assert (line["held_pages_when_idle"], line["running_when_idle"]) == (0, 0)
    assert line["overhead"]["requests"] == 4
    assert line["overhead"]["bare_tokens_per_s"] > 0


def test_lost_changed_and_abandoned_answers_are_told_apart():
    asks = [Ask((1,), 4, leaves) for leaves in (None, None, None, 2, 2)]
    heard = [
        Heard("abcd", finished=True, first_s=1.0),
        Heard("abXd", finished=True, first_s=2.0),
        Heard("ab", first_s=3.0),
        Heard("ab", first_s=4.0, left=True),
        Heard("aX", first_s=5.0, left=True),
    ]
    found = judge(asks, heard, ["abcd"] * 5)
    assert found["left"] == 2
    assert (found["complete"], found["identical"], found["lost"]) == (2, 1, 1)
    assert found["wrong_before_leaving"] == 1
    assert found["first_token_s"]["p50"] == 3.0


def test_where_an_answer_leaves_the_engines_is_found_with_the_gap_between_its_tokens(pair):
    model = load_pair(str(pair), "float32")
    want, place = model.generate("What is 7?", max_new_tokens=8, logprobs=2, seed=0), 3
    prompt, tokenizer = model.encode("What is 7?", raw=True), model.target.tokenizer
    (_, best), (_, second), *_ = want.logprobs[place].top
    engine, ask = model.open_engine(max_requests=1, max_length=64), Ask(prompt, 8, None)
    other = tokenizer.decode(want.token_ids[:place]) + "?!"
    answers = [Heard(want.text, finished=True), Heard(other, finished=True), Heard("half")]
    (found,) = differences(engine, [ask] * 3, answers, [want] * 3)
    assert (found["request"], found["token"]) == (1, place)
    assert found["gap"] == pytest.approx(best - second, abs=1e-4)
