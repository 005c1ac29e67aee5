"""The command `dspark`: reads the command line, runs one subcommand, turns errors into statuses."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence

from dspark import __version__
from dspark.cli import convert, data, demo, fit, generate, serve, train
from dspark.cli.measure import bench, calibrate, check, eval, plan, profile, prove
from dspark.cli.options import read_options
from dspark.cli.screen import Screen, showing_remarks, without_nan
from dspark.errors import DSparkError, DSparkWarning, UsageError, is_unicode

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words after `dspark`; those of the process by default.

    Returns:
        0 done, 1 failed (also where a check found an error: its `ok` is false), 2 wrong usage,
        130 interrupted. With `--json` the last line of standard output is one JSON object, and
        all else goes to standard error.
    """
    try:
        found = _parse(argv)
        return found if isinstance(found, int) else _run(found)
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from flushing into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        sentence, status = "Interrupted.", INTERRUPTED
    except UsageError as error:
        sentence, status = str(error), WRONG_USAGE
    except DSparkError as error:
        sentence, status = str(error), FAILED
    except OSError as error:
        sentence, status = f"{error.filename or 'A file'}: {error.strerror or error}.", FAILED
    print(f"dspark: {sentence}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `command`."""
    parser = argparse.ArgumentParser(
        prog="dspark",
        description="Speculative decoding that makes a language model faster and changes nothing.",
        epilog="Each command has --help with an example. Start with: dspark demo",
    )
    parser.add_argument("--version", action="version", version=f"dspark {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (
        demo.COMMAND, fit.COMMAND, generate.COMMAND, serve.COMMAND, check.COMMAND, train.COMMAND,
        calibrate.COMMAND, profile.COMMAND, eval.COMMAND, eval.REPORT, bench.COMMAND, plan.COMMAND,
        prove.COMMAND, data.COMMAND, convert.COMMAND,
    ):  # fmt: skip
        command.add_to(commands)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace | int:
    """The parsed words; the exit status where argparse has printed help, or what is wrong."""
    try:
        found = build_parser().parse_args(argv)
    except SystemExit as stop:
        sys.stdout.flush()
        return stop.code if isinstance(stop.code, int) else WRONG_USAGE
    found.words = tuple(sys.argv[1:] if argv is None else argv)
    for word in found.words:
        if not is_unicode(word):
            shown = word.encode("ascii", "backslashreplace").decode()
            raise UsageError(f"The argument {shown!r} has bytes that are no text; convert it.")
    return found


def _run(found: argparse.Namespace) -> int:
    command = found.command
    options = read_options(command.options, found)
    stdout = sys.stdout
    rest = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    screen = Screen()

    def show(message: Warning | str, category: type[Warning], *rest: object) -> None:
        if issubclass(category, DSparkWarning):
            screen.warn(str(message))
        else:
            shown(message, category, *rest)  # type: ignore[arg-type]

    shown = warnings.showwarning
    with rest, showing_remarks(screen), warnings.catch_warnings():
        warnings.simplefilter("always", DSparkWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        result = command.run(options, screen)
    if options.json:
        print(json.dumps(without_nan(result), allow_nan=False), file=stdout)
    stdout.flush()
    return FAILED if result.get("ok") is False else DONE


if __name__ == "__main__":
    raise SystemExit(main())
