"""Which engine runs which drafter, by its parts."""

import pytest

from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.integrations import vllm
from dspark.integrations.engines import verdict
from dspark.sources.names import BUNDLED, BUNDLED_DRAFTERS, SMOLLM2
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark, tiny_eagle3
from tests.helpers.targets import tiny_qwen3


@pytest.fixture(scope="module")
def target():
    return Target.from_model(tiny_qwen3(seed=2))


def made(target, **changes):
    return tiny_dspark(target, taps=(0,), **changes)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_the_bundled_drafter_runs_in_every_engine(engine):
    found = verdict(engine, load_drafter(BUNDLED / "dspark"), "D")
    assert (found.why_not, len(found.loses) >= 3) == ((), True)
    assert any(" 7" in command for command in found.commands)
    assert any("D" in command.split() or '"D"' in command for command in found.commands)


@pytest.mark.parametrize(
    ("engine", "changes", "words"),
    [
        ("llama.cpp", {"markov_head_type": "gated"}, "gated Markov head"),
        ("llama.cpp", {"markov_head_type": "rnn"}, "rnn Markov head"),
        ("sglang", {"markov_rank": 0, "confidence_head": False}, "markov_rank 0"),
        ("sglang", {"known": (1, 2, 5)}, "reduced vocabulary"),
        ("sglang", {"mask_token_id": None}, "learned mask embedding"),
    ],
)
def test_what_an_engine_lacks_is_named_and_no_command_given(target, engine, changes, words):
    found = verdict(engine, made(target, **changes), "D")
    assert any(words in reason for reason in found.why_not)
    assert found.commands == ()


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_vllm_runs_other_heads_on_a_cpu_alone(target, kind):
    found = verdict("vllm", made(target, markov_head_type=kind), "D")
    assert found.why_not == ()
    assert any(f"GPU vLLM does not run a {kind} Markov head" in note for note in found.notes)


def test_eagle3_has_its_own_method(target):
    found = verdict("vllm", tiny_eagle3(target, taps=(0, 1)), "D")
    assert '"method": "eagle3"' in found.commands[-1]
    assert "parallel_drafting" not in found.commands[-1]
    at_once = tiny_eagle3(target, taps=(0, 1), mask_token_id=3)
    assert '"parallel_drafting": true' in verdict("vllm", at_once, "D").commands[-1]
    for engine in ("sglang", "llama.cpp"):
        assert any("P-EAGLE" in reason for reason in verdict(engine, at_once, "D").why_not)
    layer = tiny_backbone(target.hidden_size, 1, input_projection=True)
    projected = tiny_eagle3(target, taps=(target.num_layers - 1,), backbone=layer)
    for engine in ("vllm", "sglang", "llama.cpp"):
        found = verdict(engine, projected, "D")
        assert any("input_projection" in reason for reason in found.why_not)
        assert found.commands == ()
    bundled = load_drafter(BUNDLED_DRAFTERS["bundled-eagle3"])
    assert "Qwen3's layer" in verdict("llama.cpp", bundled, "D").why_not[0]


@pytest.mark.parametrize(
    ("source", "directory"),
    [
        ("bundled", BUNDLED / "dspark"),
        (str(BUNDLED), BUNDLED / "dspark"),
        ("smollm2", SMOLLM2),
        ("owner/drafter", "owner/drafter"),
    ],
)
def test_vllm_is_told_where_a_drafter_lies(target, source, directory):
    [command] = verdict("vllm", made(target), source).commands
    assert f'"model": "{directory}"' in command


def test_vllm_is_given_no_gguf_file(target):
    convert, serve = verdict("vllm", made(target), "d.gguf").commands
    assert convert == "dspark convert d.gguf for_vllm --to speculators --target TARGET"
    assert '"model": "for_vllm"' in serve


@pytest.mark.parametrize(
    ("engine", "meant", "other"),
    [
        ("vllm", "0.32.0+cpu", "0.34.1"),
        ("sglang", "0.5.23", "0.5.24"),
        ("llama.cpp", "11434.0.0", "12000.0.0"),
    ],
)
def test_a_release_that_is_not_meant_is_named(target, monkeypatch, engine, meant, other):
    drafter = made(target)
    monkeypatch.setattr(vllm, "installed_version", lambda *_: meant)
    known = verdict(engine, drafter, "D").notes
    monkeypatch.setattr(vllm, "installed_version", lambda *_: None)
    assert verdict(engine, drafter, "D").notes == known
    monkeypatch.setattr(vllm, "installed_version", lambda *_: other)
    *same, said = verdict(engine, drafter, "D").notes
    assert tuple(same) == known
    assert other in said
