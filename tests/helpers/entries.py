"""A process that makes an entry of the cache; it imports next to nothing."""

import time
from pathlib import Path

from dspark.sources.cache import new_entry


def make_entry(place, started, turns):
    """Make an entry, slowly, once both processes are there; tell who has made it."""
    started.wait()
    with new_entry(Path(place)) as fresh:
        if fresh is not None:
            time.sleep(0.2)
            (fresh / "file").write_text("x")
            turns.put(1)
