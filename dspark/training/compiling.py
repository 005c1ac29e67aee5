"""torch.compile for a module's forward, with the plain one to fall back on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from dspark.errors import first_line


def compile_forward(module: nn.Module, say: Callable[[str], None]) -> None:
    """Compile a module's forward; where that fails, it runs as it is from then on.

    Args:
        module: changed in place; its other methods stay as they are.
        say: is told, once, why it runs plainly.
    """
    plain = module.forward
    chosen: list[Callable[..., Any]] = [torch.compile(plain, dynamic=True)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return chosen[0](*args, **kwargs)
        except TorchDynamoException as error:
            if chosen[0] is plain:
                raise
            chosen[0] = plain
            reason = first_line(error)
            say(f"run.compile is true, but torch.compile failed ({reason}); training runs plainly.")
            return plain(*args, **kwargs)

    module.forward = forward
