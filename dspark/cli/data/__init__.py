"""`dspark data`: prepares what a drafter is trained on, a module for each of its commands."""

from __future__ import annotations

from typing import Any

from dspark.cli.data import cache, corpus, prompts, regenerate
from dspark.cli.options import new_parser

EXAMPLE = """\
  dspark data prompts mlabonne/open-perfectblend --against eval/ --out prompts.jsonl
  dspark data regenerate bundled --prompts prompts.jsonl --out answers.jsonl.gz"""


class _Data:
    """The command and its own subcommands."""

    def add_to(self, commands: Any) -> None:
        """Add all of them."""
        parser = new_parser(commands, "data", "prepare what a drafter is trained on", EXAMPLE)
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for module in (prompts, regenerate, corpus, cache):
            module.COMMAND.add_to(commands)


COMMAND = _Data()
