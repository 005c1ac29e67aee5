"""The bundled pair, the README's Python, and the demo, as a newcomer meets them."""

import json
import re
from pathlib import Path

import pytest

import dspark
from dspark.cli.main import main
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.request import merge_stats
from dspark.sources.names import ASSETS, BUNDLED, BUNDLED_DRAFTERS

ROOT = Path(__file__).parents[1]
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def bundled():
    return dspark.load("bundled", device="cpu")


def test_it_is_small_and_says_where_it_comes_from():
    files = [p for p in ASSETS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 85 * MEGABYTE
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for word in ("licence", "GSM8K", "MBPP", "tldr", "SGD", "bits per byte", "dspark train"):
        assert word in card, word


def test_its_drafter_borrows_embedding_and_head(bundled):
    assert isinstance(bundled.drafter, DSparkDrafter)
    parts = bundled.target.parts()
    assert bundled.drafter.borrowed.embedding_VH is parts.embedding_VH
    assert bundled.drafter.borrowed.head_VH is parts.head_VH


@pytest.mark.parametrize("verifier", ["token", "block", "coupled"])
def test_speculation_pays_and_changes_nothing(bundled, verifier):
    plain = dspark.Model(bundled.target)
    questions = ["What does the command `ls` do?", "I need a taxi in Berkeley.", "What is 3 * 4?"]
    requests = [
        dspark.Request(
            bundled.encode([{"role": "user", "content": q}]),
            dspark.SamplingParams(max_new_tokens=48, seed=i),
        )
        for i, q in enumerate(questions)
    ]
    expected = [o.token_ids for o in plain.engine(requests).run(requests)]
    usual = bundled.engine(requests, verifier=verifier).run(requests)
    assert [o.token_ids for o in usual] == expected
    # How much the usual schedule drafts depends on how busy the machine is.
    outputs = bundled.engine(requests, verifier=verifier, schedule="fixed").run(requests)
    assert [o.token_ids for o in outputs] == expected
    assert merge_stats(outputs).accepted_length > 1.8


@pytest.mark.parametrize("name", BUNDLED_DRAFTERS)
def test_its_other_drafters_pay_and_change_nothing(bundled, name):
    model = dspark.load("bundled", name, device="cpu")
    assert isinstance(model.drafter, Eagle3Drafter) == (name != "bundled-dflash")
    assert model.drafter.block_size == (1 if name == "bundled-mtp" else 7)
    messages = [{"role": "user", "content": "I need a taxi in Berkeley."}]
    own = model.generate(messages=messages, max_new_tokens=48, schedule="fixed")
    plain = dspark.Model(bundled.target).generate(messages=messages, max_new_tokens=48)
    assert own.token_ids == plain.token_ids
    assert own.stats.accepted_length > 1.3


def test_it_is_calibrated(bundled):
    """For the verifier that is the default, at temperature 0 and above."""
    assert bundled.calibration is not None
    for temperature_class in ("greedy", "sampled"):
        entry = bundled.calibration.entry(7, "block", temperature_class)
        before, after = (sum(r.ece for r in found) / 7 for found in (entry.before, entry.after))
        assert after < 0.025 < before
        assert entry.after[0].count >= 20_000


def test_readme_python_runs(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 5


def test_demo_compares_all_domains(capsys):
    assert main(["demo", "--model", "bundled", "--max-new-tokens", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["identical"] is True
    assert set(report["domains"]) == {"math", "code", "chat"}
    assert report["accepted_length"] > 1.5
