"""Imports point down only, in a circle never, and take no private name of another file.

Heavy packages stay in their rooms.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dspark"
LAYERS = (
    ("errors",),
    ("params",),
    ("request", "sources"),
    ("attention", "scheduling", "sampling"),
    ("targets", "drafters"),
    ("engine",),
    ("",),  # dspark/__init__.py: the public API, loaded lazily
    ("data",),
    ("evaluation", "training"),
    ("serving", "simulation", "fitting", "integrations", "hf"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Where each heavy package may be imported: a room, or one file of it.
HEAVY = {
    "transformers": (
        "sources.gguf",  # which becomes a checkpoint by it
        "targets",
        "drafters.checkpoints",
        "drafters.deepseek_v4_layers",  # which are transformers' own
        "data",
        "hf",
        "training.language_model",  # builds the bundled target from scratch: a Qwen3 model
    ),
    "datasets": ("data",),
    "fastapi": ("serving",),
    "starlette": ("serving",),
    "uvicorn": ("serving",),
    "aiohttp": ("serving",),
    "vllm": ("integrations.vllm",),
    "matplotlib": ("evaluation", "simulation"),
    "torch": (
        "sources.gguf",
        "sources.gguf_file",
        "sources.names",  # a dtype's type alone
        "attention",
        "sampling",
        "targets",
        "drafters",
        "engine",
        "data",
        "evaluation",
        "training",
        "serving",
        "fitting",
        "integrations",
        "hf",
        "cli",
    ),
}


# Entries of a folder; every other one has 14 at most.
ENTRIES = {".": 24}


def module_name(path: Path, root: Path) -> str:
    """Dotted name below the package; empty for the package itself."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports anywhere, functions and type checks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            base = node.module or ""
            # `from dspark import cli` imports the module dspark.cli.
            yield from (f"{base}.{a.name}" if base == "dspark" else base for a in node.names)


def violations(name: str, source: str) -> list[str]:
    """What is wrong with a module's imports."""
    room = name.partition(".")[0]
    if room not in LEVEL:
        return [f"{name} belongs to no known room"]
    found = []
    for module in imported(source):
        top, _, rest = module.partition(".")
        if top == "dspark":
            other = rest.split(".")[0] if rest.split(".")[0] in LEVEL else ""
            if other != room and LEVEL[other] >= LEVEL[room]:
                found.append(f"{name} imports {module}")
        elif top in HEAVY:
            homes = HEAVY[top]
            if not any(name == home or name.startswith(f"{home}.") for home in homes):
                found.append(f"{name} imports {module}")
    return found


def private_names(name: str, source: str) -> list[str]:
    """Names with an underscore that a module takes from other modules of the package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            taken = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            taken = [alias.name for alias in node.names]
        else:
            continue
        found += [
            f"{name} imports {path}"
            for path in taken
            if path.startswith("dspark.") and re.search(r"\._(?!_)", path)
        ]
    return found


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere, type checks included."""
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                graph[name].update(alias.name.removeprefix("dspark.") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dspark"):
                base = (node.module or "").removeprefix("dspark").removeprefix(".")
                for alias in node.names:
                    module = f"{base}.{alias.name}".removeprefix(".")
                    # `from room import module` is of the module, and not of its room.
                    graph[name].add(module if module in sources else base)
        graph[name] &= sources.keys() - {"", name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that all import one another, by whatever way round."""
    reach = {name: set(found) for name, found in graph.items()}
    for between in graph:
        for found in reach.values():
            if between in found:
                found.update(reach[between])
    sets = {frozenset(m for m in reach[n] if n in reach[m]) for n in graph if n in reach[n]}
    return [set(found) for found in sets]


def sources() -> dict[str, str]:
    """Every module of the package, and its text."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {module_name(path, PACKAGE): path.read_text(encoding="utf-8") for path in files}


def test_no_circles():
    assert circles(import_graph(sources())) == []


def test_no_file_takes_a_private_name_of_another():
    found = [each for name, text in sources().items() for each in private_names(name, text)]
    assert found == []


def test_no_folder_is_above_14_entries():
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())):
        entries = [path for path in folder.iterdir() if path.name != "__pycache__"]
        name = folder.relative_to(PACKAGE).as_posix()
        if "__pycache__" not in folder.parts:
            assert len(entries) <= ENTRIES.get(name, 14), name


def test_imports_point_down_and_heavy_packages_stay_home():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    found = [
        problem
        for path in files
        for problem in violations(module_name(path, PACKAGE), path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("engine.engine", "from dspark.cli.main import main"),
        ("targets.target", "from dspark.drafters.base import Drafter"),
        ("drafters.base", "import dspark.targets.target"),
        ("drafters.dspark", "from transformers import AutoModel"),
        ("training.loop", "def f():\n    import transformers.models"),
        ("training.loop", "from dspark import evaluation"),
        ("engine.model", "from dspark import load"),
        ("scheduling.prefix", "import torch"),
        ("engine.engine", "if TYPE_CHECKING:\n    from dspark.data.templates import END"),
        ("errors", "from dspark.request import Output"),
        ("unheard.of", "import json"),
    ],
)
def test_control_a_bad_import_is_caught(name, source):
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from dspark.drafters.checkpoints.published import _write_dspark",
        "from dspark.targets import _hidden",
        "import dspark.targets._hidden",
        "def f():\n    from dspark.targets.fast.packing import PLAIN, _seconds",
    ],
)
def test_control_a_private_name_is_caught(source):
    assert len(private_names("engine.engine", source)) == 1
    assert private_names("engine.engine", source.replace("_", "")) == []


def test_control_a_circle_is_caught():
    texts = {
        "a.one": "from dspark.a.two import f",
        "a.two": "if TYPE_CHECKING:\n    from dspark.b import three",
        "b": "",
        "b.three": "def f():\n    import dspark.a.one",
        "b.four": "from dspark.b.three import f",
    }
    assert circles(import_graph(texts)) == [{"a.one", "a.two", "b.three"}]
    assert circles(import_graph(texts | {"a.two": "from dspark.b import four"})) == [
        {"a.one", "a.two", "b.three", "b.four"}
    ]
    assert circles(import_graph(texts | {"b.three": ""})) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli.main", "from dspark import __version__\nfrom dspark.cli import demo"),
        ("engine.engine", "import torch\nfrom dspark.targets.target import Target"),
        ("drafters.checkpoints.checkpoint", "import transformers"),
        ("", "from dspark.request import Output\nfrom dspark.engine import model"),
    ],
)
def test_control_a_good_import_passes(name, source):
    assert violations(name, source) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import dspark",
        "import dspark.scheduling.survival, dspark.scheduling.budget, dspark.request",
        "from dspark.cli.main import main; main(['generate', '--help'])",
    ],
)
def test_torch_is_not_imported_where_it_is_not_needed(statement):
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
