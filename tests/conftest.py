"""One thread per test process, nothing in the user's cache, and no hidden fault of a drafter."""

from collections.abc import Iterator

import pytest
import torch

from dspark.scheduling.protection import Protection
from dspark.scheduling.step_times import StepTimes

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and cores may be shared


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost tables that a developer measured must not change what tests see."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def no_hidden_faults(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """A drafter that raises is logged, not raised: unless a test is about that, it fails here."""
    yield
    if "faulty" in request.keywords:
        return
    records = [
        r
        for r in caplog.get_records("call")
        if r.name == "dspark.engine.speculation.drafter_faults"
    ]
    assert [record.exc_info or record.getMessage() for record in records] == []


@pytest.fixture
def by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules go by their table of costs, however busy the machine under them is."""
    monkeypatch.setattr(Protection, "allows", lambda *_, **__: True)
    monkeypatch.setattr(Protection, "learn", lambda *_: None)
    monkeypatch.setattr(StepTimes, "learn", lambda *_: None)
