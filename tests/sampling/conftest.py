"""Loads the enumeration beside this file (test folders are not packages)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def enumeration() -> ModuleType:
    name = "dspark_test_enumeration"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "enumeration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
