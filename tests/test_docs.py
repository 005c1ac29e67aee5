"""What the Markdown files point at is there: links, files, commands with their options, targets."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from dspark.cli.main import build_parser

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "dspark" / "recipes"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "dspark/assets/**/*.md", "tests/golden/**/*.md")
    for path in ROOT.glob(pattern)
)
NOW = [page for page in PAGES if page not in ("docs/LOG.md", "CHANGELOG.md")]  # these tell what was
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links that lead to no file, or to no heading of one."""
    found = []
    prose = SPAN.sub("", FENCE.sub("", text))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        if not there.exists():
            found.append(link)
        elif anchor and there.suffix == ".md":
            own = text if there == page else there.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", own), re.M)
            if anchor not in map(slug, headings):
                found.append(link)
    return found


def code_lines(text: str) -> Iterator[str]:
    """Lines of shell in fenced blocks, continued ones joined; then what stands in backquotes."""
    for language, block in FENCE.findall(text):
        if language not in ("python", "json", "yaml"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from SPAN.findall(FENCE.sub("", text))


def missing_files(text: str) -> list[str]:
    """Files named in backquotes by their path that are neither here nor in the package."""
    named = [
        span
        for span in SPAN.findall(FENCE.sub("", text))
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|md|sh|yaml)", span)
    ]
    return [n for n in named if not (ROOT / n).exists() and not (ROOT / "dspark" / n).exists()]


def command_words(line: str) -> list[str]:
    """The words after `dspark` on a line of shell, as far as the command goes; none without one."""
    match = re.search(r"(?:^|(?<!\bin)\s|/)dspark (?=[a-z])(.*)", line)
    if match is None or re.search(r"\b(import|pip install)\b", line):
        return []
    lexer = shlex.shlex(match[1], posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    words = [word.strip("[]") for word in lexer]
    return list(takewhile(lambda word: word[:1] not in (";", "|", "&", "<", ">"), words))


def wrong_commands(text: str) -> list[str]:
    """Command lines that `dspark` would refuse; what leaves words out is read for options."""
    found = []
    for words in filter(None, map(command_words, code_lines(text))):
        name = words[: 2 if words[0] == "data" else 1]
        given, elided = [], len(words) == len(name)
        for before, word in zip(["", *words], words, strict=False):
            if word in ("…", "...") and before.startswith("--"):
                given.append("1")
            elif word in ("…", "...") or (before.startswith("--") and re.fullmatch("[A-Z]", word)):
                elided = True
            else:
                given.append(word)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                build_parser().parse_args([*name, "--help"] if elided else given)
            except SystemExit as stop:
                if stop.code:
                    found.append(f"dspark {' '.join(words)}: {said.getvalue().splitlines()[-1]}")
        options = [word for word in given if word.startswith("--")] if elided else []
        for option in options:
            if not re.search(rf"{option}\b", said.getvalue()):
                found.append(f"dspark {' '.join(words)}: {option}")
        recipe = given[1] if name == ["train"] and given[1:] else ""
        if re.fullmatch(r"[a-z0-9_]+", recipe) and not [*RECIPES.glob(f"*/{recipe}.yaml")]:
            found.append(f"dspark {' '.join(words)}: no such recipe")
    return found


def wrong_measurements(text: str) -> list[str]:
    """`python -m benchmarks.NAME` that is not there, or knows an option not."""
    found = []
    for line in code_lines(text):
        for name, rest in re.findall(r"python -m benchmarks\.(\w+)([^;|&]*)", line):
            path = ROOT / "benchmarks" / f"{name}.py"
            if not path.exists():
                found.append(name)
                continue
            source = path.read_text(encoding="utf-8")
            for other in set(re.findall(r"from benchmarks\.(\w+) import", source)):
                source += (ROOT / "benchmarks" / f"{other}.py").read_text(encoding="utf-8")
            options = re.findall(r"(?<!\S)--[\w-]+", rest)
            found += [f"{name} {option}" for option in options if f'"{option}"' not in source]
    return found


def wrong_targets(text: str) -> list[str]:
    """`make NAME` without such a target."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    names = (name for line in code_lines(text) for name in re.findall(r"^make ([\w-]+)", line))
    return [name for name in names if name not in targets]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    assert broken_links(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("page", NOW)
def test_what_a_page_names_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert missing_files(text) == []
    assert wrong_measurements(text) == []
    assert wrong_targets(text) == []


@pytest.mark.parametrize("page", NOW)
def test_commands_parse(page):
    assert wrong_commands((ROOT / page).read_text(encoding="utf-8")) == []


def test_the_makefiles_measurements_are_there():
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)/", "")
    assert "benchmarks.identity" in text
    assert wrong_measurements(f"```\n{text}\n```\n") == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (missing_files, "see `engine/nowhere.py`"),
        (wrong_commands, "`dspark lie`"),
        (wrong_commands, "```sh\ndspark generate DIR --draught D\n```\n"),
        (wrong_commands, "```\nx=1 && dspark generate --top-k all \\\n  DIR | less\n```\n"),
        (wrong_commands, "```\ntorchrun -m dspark train r.yaml \\\n  --sett run.steps=3 # x\n```"),
        (wrong_commands, "`dspark data regenerate … --prompt FILE`"),
        (wrong_commands, "`dspark convert SRC`"),
        (wrong_commands, "`dspark train dspark_qwen3_5b`"),
        (wrong_measurements, "`python -m benchmarks.nothing`"),
        (wrong_measurements, "`python -m benchmarks.soak --thread 1`"),
        (wrong_targets, "```sh\nmake haste\n```\n"),
    ],
)  # fmt: skip
def test_control_what_is_wrong_is_found(check, text):
    assert len(check(text)) == 1


def test_control_broken_links_are_found():
    page = ROOT / "docs" / "memory.md"
    text = (
        "# A head, two\n[a](#a-head-two) [b](#no-head) [c](requests.md#masks) [d](requests.md#no)\n"
        "[e](nowhere.md) [f](https://example.org/x) `[g](nowhere.md)` [h](../README.md)"
    )
    assert broken_links(text, page) == ["#no-head", "requests.md#no", "nowhere.md"]


def test_control_what_is_right_passes():
    text = (
        "`dspark prove` `dspark data regenerate TARGET --prompts … --out … [--server URL …]`\n"
        "```sh\nfor d in a b; do dspark train bundled_$d --resume; done\nmake demo   # quick\n"
        "pip install dspark x\ndspark serve DIR --max-requests R > log\n```\n"
        "`python -m benchmarks.load --shape qwen3_4b` `engine/round.py` `make it so`\n"
    )
    assert wrong_commands(text) == []
    assert missing_files(text) == wrong_measurements(text) == []
    assert wrong_targets(text) == ["it"]
