"""The commands that a fit ends with: `dspark` takes each of its own."""

import shlex

import pytest

from dspark.cli.convert import GGUF
from dspark.cli.main import build_parser
from dspark.drafters.checkpoints.registry import layouts
from dspark.fitting.evaluation import serving_commands
from dspark.fitting.recipe import Shape


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("drafts", [1, 7])
def test_every_command_of_ours_can_be_typed(reduced, attached, drafts):
    shape = Shape(1, 64, (1, 5, 9), None, 1e-3, block_size=drafts)
    commands = serving_commands("model", "fitted", shape, attached=attached, reduced=reduced)
    assert ("SGLang" in commands) == (not reduced or shape.algorithm == "eagle3")
    method = {1: "eagle3", 7: "dspark"}[drafts]
    assert f'"method": "{method}"' in commands["vLLM"]
    assert f"--spec-type draft-{method} --spec-draft-n-max {drafts}" in commands["llama.cpp"]
    written = {name for name, layout in layouts().items() if layout.writers} | {GGUF}
    for text in commands.values():
        for part in text.split(" && "):
            program, *words = shlex.split(part)
            if program == "dspark":
                found = build_parser().parse_args(words)
                assert getattr(found, "to", GGUF) in written
