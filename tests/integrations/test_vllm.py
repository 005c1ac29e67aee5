"""The plug-in without vLLM: which versions it knows, and what it changes of a configuration."""

import subprocess
import sys
import types

import pytest

from dspark.errors import CompatibilityError
from dspark.integrations import vllm as plugin
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_dspark, tiny_eagle3
from tests.helpers.targets import tiny_qwen3

CPU, OURS = "vllm.v1.worker.cpu_worker.CPUWorker", "dspark.integrations.vllm.proposer.DSparkWorker"
GPU = "vllm.v1.worker.gpu_worker.Worker"


def fake_config(method="dspark", worker=CPU, adaptive=False):
    spec = types.SimpleNamespace(
        method=method, use_dspark=lambda: method == "dspark", enable_adaptive_verification=adaptive
    )
    parallel = types.SimpleNamespace(worker_cls=worker)
    return types.SimpleNamespace(speculative_config=spec, parallel_config=parallel)


@pytest.fixture
def vllm(monkeypatch):
    """A module `vllm.config` whose V1 check refuses dspark, as vLLM 0.32's does."""

    class VllmConfig:
        def _get_v1_model_runner_unsupported_features(self):
            dspark = self.speculative_config.method == "dspark"
            return ["ubatching"] + ["dspark speculative decoding"] * dspark

        def _validate_adaptive_verification(self):
            return None

    config = types.SimpleNamespace(VllmConfig=VllmConfig)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(config=config))
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.32.0+cpu")
    return VllmConfig


@pytest.mark.parametrize(
    ("version", "missing", "words"),
    [
        ("0.31.4", [], "knows vLLM 0.32 and 0.33, but this is 0.31.4"),
        ("0.34.0", [], "this is 0.34.0"),
        ("1.0", [], "this is 1.0"),
        (None, [], "this is None"),
        ("0.33.1", ["_hook"], "vLLM 0.33.1 has no VllmConfig._hook"),
    ],
)
def test_a_version_that_is_not_known_is_refused_in_one_sentence(version, missing, words):
    reason = plugin.refusal(version, missing)
    assert words in reason
    assert reason.count(".\n") == 0
    assert reason.endswith(".")


def test_known_versions_are_not_refused():
    assert plugin.refusal("0.32.0+cpu", []) is plugin.refusal("0.33.1", []) is None


def test_on_a_cpu_the_runner_takes_dspark_by_our_worker(vllm):
    plugin.register()
    plugin.register()
    config = fake_config()
    assert vllm._get_v1_model_runner_unsupported_features(config) == ["ubatching"]
    assert config.parallel_config.worker_cls == OURS
    # Asked again, with our worker in place.
    assert vllm._get_v1_model_runner_unsupported_features(config) == ["ubatching"]


def test_other_methods_and_other_workers_stay(vllm):
    plugin.register()
    config = fake_config("eagle3")
    assert vllm._get_v1_model_runner_unsupported_features(config) == ["ubatching"]
    assert config.parallel_config.worker_cls == CPU
    calibrated = "dspark.integrations.vllm.verification.CalibratedWorker"  # of the V2 runner
    for worker in ("mine.Worker", GPU, calibrated):
        config = fake_config(worker=worker)
        assert len(vllm._get_v1_model_runner_unsupported_features(config)) == 2
        assert config.parallel_config.worker_cls == worker


@pytest.mark.parametrize(("adaptive", "method"), [(True, "dspark"), (False, "dspark"), (True, "x")])
def test_on_a_gpu_only_adaptive_verification_of_dspark_takes_our_worker(vllm, adaptive, method):
    plugin.register()
    config = fake_config(method, worker=GPU, adaptive=adaptive)
    vllm._validate_adaptive_verification(config)
    ours = config.parallel_config.worker_cls.startswith("dspark.")
    assert ours == (adaptive and method == "dspark")


def test_an_unknown_version_is_left_as_it_is(vllm, monkeypatch, caplog):
    before = vllm._get_v1_model_runner_unsupported_features
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.40.0")
    plugin.register()
    assert vllm._get_v1_model_runner_unsupported_features is before
    assert "this is 0.40.0" in caplog.text


@pytest.mark.parametrize(
    ("make", "drafts", "words"),
    [
        (tiny_dspark, 5, "num_speculative_tokens is 5, but the drafter makes 4 drafts at most"),
        (tiny_eagle3, 4, 'is of type Eagle3Drafter.*method \\("eagle3"\\)'),
    ],
)
def test_a_drafter_that_the_runner_cannot_take_is_refused(make, drafts, words):
    drafter = make(Target.from_model(tiny_qwen3(seed=2)), taps=(0,))
    with pytest.raises(CompatibilityError, match=words):
        plugin.refuse_drafter(drafter, drafts)
    plugin.refuse_drafter(tiny_dspark(Target.from_model(tiny_qwen3(seed=2)), taps=(0,)), 4)


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("parallel_config", "tensor_parallel_size", 2, "tensor parallelism"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
        ("model_config", "uses_mrope", True, "M-RoPE"),
        (None, "lora_config", "adapters", "LoRA adapters"),
    ],
)
def test_what_the_runner_does_beside_is_refused_by_name(part, field, value, words):
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        model_config=types.SimpleNamespace(uses_mrope=False),
        lora_config=None,
    )
    plugin.refuse_config(config)
    setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(CompatibilityError, match=words):
        plugin.refuse_config(config)


def test_without_vllm_nothing_of_it_is_imported():
    code = "import sys, dspark.integrations.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
