import subprocess
import sys
from dataclasses import replace

import pytest

from dspark import __version__
from dspark.cli import generate, main
from dspark.engine.speculation.schedule import SCHEDULES
from dspark.errors import DSparkError, UsageError
from dspark.request import VERIFIERS

COMMANDS = (
    "demo", "generate", "check", "train", "calibrate", "profile", "bench", "prove", "data",
    "convert", "serve",
)  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [*([name] for name in COMMANDS), ["data", "regenerate"]],
)
def test_every_command_has_help_with_an_example(dspark, words):
    result = dspark(*words, "--help")
    assert result.status == 0
    assert f"example:\n  dspark {' '.join(words[:1])}" in result.out
    if words != ["data"]:
        for option in ("--device", "--dtype", "--seed", "--json", "--threads"):
            assert option in result.out


def test_overview_and_version(dspark):
    overview = dspark("--help")
    assert overview.status == 0
    listed = {line.split()[0] for line in overview.out.splitlines() if line.startswith("    ")}
    assert listed >= set(COMMANDS)
    assert dspark("--version").out == f"dspark {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["data"],
        ["generate"],
        ["generate", "x", "--dtype", "int8"],
        ["generate", "x", "--seed", "-1"],
        ["generate", "x", "--seed", str(1 << 63)],
        ["generate", "x", "--threads", "0"],
        ["generate", "x", "--prompt", "a", "--prompts", "b"],
        ["generate", "x", "--verifier", "hope"],
        ["generate", "x", "--schedule", "hope"],
        ["demo", "--only", "poetry"],
        ["bench", "x", "--concurrency", "0,2"],
        ["bench", "x", "--concurrency", "two"],
        ["bench", "x", "--schedule", "off,hope"],
        ["bench", "x", "--floors", "10,-1"],
        ["bench", "x", "--floors", "fast"],
        ["data", "regenerate", "x"],
    ],
)
def test_wrong_usage_is_status_2_and_says_so_on_standard_error(dspark, words):
    result = dspark(*words)
    assert result.status == 2
    assert result.out == ""
    assert "error:" in result.err


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UsageError("Use less."), 2, "Use less."),
        (DSparkError("It broke; mend it."), 1, "It broke; mend it."),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "a/b: No such file"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_errors_become_statuses(dspark, monkeypatch, error, status, sentence):
    def fail(_options, _screen):
        raise error

    monkeypatch.setattr(generate, "COMMAND", replace(generate.COMMAND, run=fail))
    result = dspark("generate", "x", "--prompt", "a", "--json")
    assert result.status == status
    assert result.out == ""
    assert result.err.startswith(f"dspark: {sentence}")
    assert result.err.count("\n") == 1


def test_under_json_all_else_goes_to_standard_error(dspark, monkeypatch):
    def chatter(_options, screen):
        print("printed")
        screen.out.print("shown")
        return {"loss": float("nan"), "rows": [float("inf"), 1.5]}

    monkeypatch.setattr(generate, "COMMAND", replace(generate.COMMAND, run=chatter))
    result = dspark("generate", "x", "--json")
    assert result.out == '{"loss": null, "rows": [null, 1.5]}\n'
    assert result.err == "printed\nshown\n"


@pytest.mark.parametrize(("flag", "names"), [("schedule", SCHEDULES), ("verifier", VERIFIERS)])
def test_the_parser_takes_every_name_of_the_engine(flag, names):
    for name in names:
        options = main.build_parser().parse_args(["generate", "x", f"--{flag}", name])
        assert getattr(options, flag) == name


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "dspark", "generate", "x", "--max-new-tokens", "0"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == main.WRONG_USAGE
    assert done.stdout == ""
    assert done.stderr == "dspark: max_new_tokens is 0, but must be an integer of at least 1.\n"


def test_a_reader_that_leaves_gets_no_traceback():
    command = [sys.executable, "-m", "dspark", "train", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        complaints = started.stderr.read()
    assert (started.returncode, complaints) == (1, b"")
