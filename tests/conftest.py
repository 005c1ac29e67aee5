"""One thread per test process, and no test sees or leaves anything in the user's cache."""

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and cores may be shared


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost tables that a developer measured must not change what tests see."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
