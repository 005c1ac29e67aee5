"""What a request may ask for, and the one sentence that refuses the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dspark.errors import RequestError, UsageError
from dspark.params import SamplingParams, sample_seed
from dspark.request import Logprob, Output, Request, Stats

NAN, INF = math.nan, math.inf
REFUSED = (
    ("max_new_tokens", 0, "max_new_tokens is 0, but must be an integer of at least 1"),
    ("max_new_tokens", -3, "max_new_tokens is -3"),
    ("max_new_tokens", 2.0, r"max_new_tokens is 2\.0"),
    ("max_new_tokens", True, "max_new_tokens is True"),
    ("max_new_tokens", "9", "max_new_tokens is '9'"),
    ("temperature", -0.1, r"temperature is -0\.1, but must be 0 or a positive number"),
    ("temperature", NAN, "temperature is nan"),
    ("temperature", INF, "temperature is inf"),
    ("temperature", "warm", "temperature is 'warm'"),
    ("temperature", None, "temperature is None"),
    ("top_k", -1, "top_k is -1"),
    ("top_k", 1.5, r"top_k is 1\.5"),
    ("top_p", 0.0, r"top_p is 0\.0, but must be above 0 and at most 1"),
    ("top_p", 1.01, r"top_p is 1\.01"),
    ("top_p", NAN, "top_p is nan"),
    ("min_p", -0.01, r"min_p is -0\.01"),
    ("min_p", 1.5, r"min_p is 1\.5"),
    ("repetition_penalty", 0.0, r"repetition_penalty is 0\.0"),
    ("repetition_penalty", INF, "repetition_penalty is inf"),
    ("presence_penalty", NAN, "presence_penalty is nan"),
    ("frequency_penalty", INF, "frequency_penalty is inf"),
    ("logit_bias", {3: NAN}, "logit_bias has 3: nan"),
    ("logit_bias", {3: INF}, "logit_bias has 3: inf"),
    ("logit_bias", {-1: 1.0}, "logit_bias has -1: 1.0"),
    ("logit_bias", {"3": 1.0}, "logit_bias has '3': 1.0"),
    ("logit_bias", {3: "much"}, "logit_bias has 3: 'much'"),
    ("logit_bias", [3], r"logit_bias is \[3\], but must be a mapping"),
    ("stop", ("a", ""), "stop is .* none of them empty"),
    ("stop", "end", "stop is 'end', but must be a tuple of strings"),
    ("stop", (7,), r"stop is \(7,\)"),
    ("stop", ("x" * 65_537,), "stop has 1 strings of 65537 characters together"),
    ("stop", tuple(map(str, range(100, 165))), "stop has 65 strings"),
    ("stop_token_ids", (1, -2), r"stop_token_ids is \(1, -2\)"),
    ("stop_token_ids", 4, "stop_token_ids is 4"),
    ("ignore_eos", "yes", "ignore_eos is 'yes', but must be True or False"),
    ("seed", 2**63, "seed is 9223372036854775808, but must be an integer from -2"),
    ("seed", -(2**63) - 1, "seed is -9223372036854775809"),
    ("seed", 0.5, r"seed is 0\.5"),
    ("seed", None, "seed is None"),
    ("n", 0, "n is 0, but must be an integer from 1 to 128"),
    ("n", 129, "n is 129"),
    ("n", 10**30, "n is 1000"),
    ("n", 2.0, r"n is 2\.0"),
    ("logprobs", -1, "logprobs is -1, but must be None or an integer from 0 to 20"),
    ("logprobs", 21, "logprobs is 21"),
    ("logprobs", True, "logprobs is True"),
)


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_values_without_a_meaning_are_refused(name, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_values_at_the_edge_are_taken():
    SamplingParams(
        max_new_tokens=1,
        temperature=1e-300,
        top_k=10**9,
        top_p=1e-12,
        min_p=1.0,
        logit_bias={0: -INF, np.int64(5): np.float32(0.5)},
        stop=("x" * 10_000, *map(str, range(63))),
        stop_token_ids=(np.int32(3),),
        seed=-(2**63),
        n=128,
        logprobs=0,
    )
    SamplingParams(seed=np.int64(2**63 - 1), logprobs=20, temperature=np.float64(0.5))


def test_unknown_options_are_named():
    with pytest.raises(UsageError, match="no option 'best_of'"):
        SamplingParams.of({"best_of": 3})
    assert SamplingParams.of({"stop": "end"}).stop == ("end",)


@pytest.mark.parametrize("timeout", [0, -1.0, NAN, INF])
def test_a_timeout_is_a_positive_number_of_seconds(timeout):
    with pytest.raises(UsageError, match="timeout_s is"):
        Request((1,), timeout_s=timeout)


@pytest.mark.parametrize("prompt", [(1, 2.0), ("a",), (True,), "text"])
def test_a_prompt_is_made_of_token_ids(prompt):
    with pytest.raises(RequestError, match="but token ids are integers"):
        Request(prompt)


def test_seeds_of_answers_differ_and_the_first_keeps_its_own():
    """Neighbouring seeds and answers never share one; a plain sum would."""
    assert [sample_seed(seed, 0) for seed in (-5, 0, 7)] == [-5, 0, 7]
    seeds = [sample_seed(seed, i) for seed in range(-50, 50) for i in range(128)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    # Every bit of the seeds is fair.
    for bit in range(64):
        ones = sum((seed >> bit) & 1 for seed in seeds if abs(seed) > 100)
        assert abs(ones / len(seeds) - 0.5) < 0.02
    assert sample_seed(1, 3) == -4091768566809800617  # what a seed gave once it gives for ever


def test_a_request_parts_into_its_answers():
    request = Request((1, 2), SamplingParams(n=3, seed=9, logprobs=2), timeout_s=4.0)
    samples = request.samples()
    assert [sample.params.n for sample in samples] == [1, 1, 1]
    assert [sample.params.seed for sample in samples] == [sample_seed(9, i) for i in range(3)]
    assert all(replace(s, params=request.params) == request for s in samples)
    assert samples[0].samples() == (samples[0],)


def test_an_output_with_a_fault_says_so():
    good = Output("", "", (), "stop", Stats(), logprobs=(Logprob(1, -0.5),))
    assert good.error is None
    assert good.checked() is good
    bad = Output("", "", (), "error", Stats(), fault=RequestError("The mask is broken."))
    assert bad.error == "The mask is broken."
    with pytest.raises(RequestError, match="mask is broken"):
        bad.checked()
