"""The commands that a fit ends with: `dspark` takes each of its own."""

import shlex

import pytest

from dspark.cli.convert import GGUF
from dspark.cli.main import build_parser
from dspark.drafters.checkpoints.registry import layouts
from dspark.fitting.evaluation import serving_commands


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_every_command_of_ours_can_be_typed(reduced, attached):
    commands = serving_commands("model", "fitted", 7, attached=attached, reduced=reduced)
    assert ("SGLang" in commands) != reduced
    written = {name for name, layout in layouts().items() if layout.writers} | {GGUF}
    for text in commands.values():
        for part in text.split(" && "):
            program, *words = shlex.split(part)
            if program == "dspark":
                found = build_parser().parse_args(words)
                assert getattr(found, "to", GGUF) in written
