"""What is installed is the whole of it: a wheel holds the data files that the code opens."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from dspark.training.recipe import recipe_names

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
LIST = (
    "import dspark; print(dspark.__file__); from dspark.cli.main import main; "
    "main(['train', '--list'])"
)
NO_WEIGHTS = shutil.ignore_patterns("__pycache__", "*.safetensors")


def run(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel of this tree, unpacked where nothing else of it lies; without weights, for speed."""
    pytest.importorskip("setuptools", "77")
    tree, installed = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "dspark", tree / "dspark", ignore=NO_WEIGHTS)
    built = run(tree, "-c", BUILD, str(tree / "dist"))
    assert built.returncode == 0, built.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    ZipFile(wheel).extractall(installed)
    return installed


def test_a_wheel_holds_every_file_of_the_package(installed):
    def files(root):
        found = (path.relative_to(root) for path in (root / "dspark").rglob("*") if path.is_file())
        return {path for path in found if "__pycache__" not in path.parts}

    here = {path for path in files(ROOT) if path.suffix != ".safetensors"}
    assert files(installed) == here
    assert Path("dspark/recipes/base/published_dspark.yaml") in here


def test_recipes_are_found_by_name_from_a_wheel(installed):
    listed = run(installed, "-c", LIST)
    assert listed.returncode == 0, listed.stderr
    package, *lines = listed.stdout.splitlines()
    assert package == str(installed / "dspark" / "__init__.py")
    assert [line.split()[0] for line in lines] == recipe_names()
    assert "dspark_qwen3_4b         dspark for Qwen/Qwen3-4B" in lines  # what it extends is there
