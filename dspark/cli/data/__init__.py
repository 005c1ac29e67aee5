"""`dspark data`: prepares what a drafter is trained on, a subcommand a file."""

from __future__ import annotations

from dspark.cli import cache, collect, corpus, regenerate
from dspark.cli.common import Commands, new_parser

EXAMPLE = """\
  dspark data prompts mlabonne/open-perfectblend --against eval/ --out prompts.jsonl
  dspark data regenerate bundled --prompts prompts.jsonl --out answers.jsonl.gz"""


def add_parser(commands: Commands) -> None:
    """Add `data` and its own subcommands."""
    parser = new_parser(commands, "data", "prepare what a drafter is trained on", EXAMPLE)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (collect, regenerate, corpus, cache):
        command.add_parser(commands)
