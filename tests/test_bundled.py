"""The bundled pair, the README's Python, and the demo, as a newcomer meets them."""

import json
import re
from pathlib import Path

import pytest

import dspark
from dspark.cli.main import main
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine.loading import BUNDLED
from dspark.request import merge_stats

ROOT = Path(__file__).parents[1]
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def bundled():
    return dspark.load("bundled", device="cpu")


def test_it_is_small_and_says_where_it_comes_from():
    files = [p for p in BUNDLED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40 * MEGABYTE
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
    outputs = bundled.engine(requests, verifier=verifier).run(requests)
    assert [o.token_ids for o in outputs] == [
        o.token_ids for o in plain.engine(requests).run(requests)
    ]
    assert merge_stats(outputs).accepted_length > 1.8


def test_readme_python_runs(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 5


def test_demo_compares_all_domains(capsys):
    assert main(["demo", "--max-new-tokens", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["identical"] is True
    assert set(report["domains"]) == {"math", "code", "chat"}
    assert report["accepted_length"] > 1.5
