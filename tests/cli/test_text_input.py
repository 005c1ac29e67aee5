"""Bytes that are no text, wherever text enters: one sentence, and no traceback."""

import io
import sys

import pytest

import dspark as package
from dspark.data.files.json_lines import read_json_lines
from dspark.data.prompts.sources import DataSet, read_rows
from dspark.errors import DataError, RecipeError, RequestError
from dspark.training.recipe import load_recipe


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input(dspark, pair, monkeypatch, errors):
    given = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", given)
    result = dspark("generate", pair.attached)
    assert (result.status, result.out) == (1, "")
    assert result.err == "dspark: Standard input is not utf-8 text; convert it.\n"


@pytest.mark.parametrize("option", ["--prompt", "--stop", "--draft", "--prompts"])
def test_arguments(dspark, pair, option):
    result = dspark("generate", pair.attached, option, "a\udcff")
    assert result.status == 2
    assert result.err == (
        "dspark: The argument 'a\\\\udcff' has bytes that are no text; convert it.\n"
    )


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"prompt": "a\xff"}', "is not UTF-8: invalid start byte at byte 13"),
        (b'{"prompt": "a\\ud800"}', "has half of a surrogate pair, which is no character"),
    ],
)
def test_prompt_files(dspark, pair, tmp_path, line, why):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "\\ud83d\\ude00"}\n' + line + b"\n")
    result = dspark("generate", pair.attached, "--prompts", path)
    assert (result.status, result.err) == (1, f"dspark: {path}, line 2 {why}.\n")


def test_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match="is not UTF-8: invalid start byte at byte 3; convert it"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "prompt",
    ["\ud800", [{"role": "user", "content": "\ud800"}], [{"role": "\ud800", "content": "a"}]],
)
def test_python(prompt):
    model = package.load("bundled", dtype="float32")
    given = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    with pytest.raises(RequestError, match="no character; give valid Unicode"):
        model.generate(**given)


def test_a_device_exists_and_holds_nothing(dspark, pair, tmp_path):
    result = dspark("generate", pair.attached, "--prompts", "/dev/null")
    assert (result.status, result.err) == (1, "dspark: /dev/null holds no prompt.\n")
    assert list(read_rows(DataSet("/dev/null"))) == []
    with pytest.raises(DataError, match="is a folder; give one of its files"):
        list(read_json_lines(tmp_path))
