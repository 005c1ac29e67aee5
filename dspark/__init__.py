"""DSpark: speculative decoding that is trained, served and proven lossless.

import dspark
model = dspark.load("bundled")
print(model.generate("Once upon a time", max_new_tokens=64).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspark.errors import DSparkError
from dspark.request import Output, Request, SamplingParams, Stats

if TYPE_CHECKING:
    from dspark.engine.loading import load
    from dspark.engine.model import Model

__version__ = "0.1.0"
__all__ = ["DSparkError", "Model", "Output", "Request", "SamplingParams", "Stats", "load"]


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, only when it is asked for."""
    if name == "Model":
        from dspark.engine.model import Model

        return Model
    if name == "load":
        from dspark.engine.loading import load

        return load
    raise AttributeError(f"module 'dspark' has no attribute {name!r}")
