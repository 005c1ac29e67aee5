"""What a kind of drafter and a checkpoint layout declare of themselves, and those from outside.

An installed package adds one by an entry point, whose value is a `DrafterKind` (group
`dspark.drafters`) or a `Layout` (group `dspark.checkpoints`); docs/adding_a_family.md shows both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import Tensor, nn

from dspark.drafters.base import Drafter
from dspark.errors import DSparkWarning, first_line

Reader = Callable[[Mapping[str, Any], str], Any]
"""(parsed config.json, what to call it in errors) -> the configuration of a kind of drafter"""
Writer = Callable[[Any, str], dict[str, Any]]
"""(drafter, dtype of its stored weights) -> config.json; refuses what the layout cannot carry"""
T = TypeVar("T")
DRAFTERS, CHECKPOINTS = "dspark.drafters", "dspark.checkpoints"


@dataclass(frozen=True)
class DrafterKind:
    """A kind of drafter. One without weights has `create`, one with weights all the others.

    Attributes:
        create: makes one for `--draft NAME`, NAME being that of the entry point.
        drafter: the type of its module, a `target_bound.TargetBound`.
        config: the type of its configuration, by which a file is known to hold one.
        build: (configuration, names of the file's tensors, what to call it in errors) -> an empty
            module.
        readers: by architecture, those that no layout reads.
        write: its config.json in full, for the attached layout.
        renamed: other beginnings of tensors' names that are read, each with the usual one.
    """

    create: Callable[[], Drafter] | None = None
    drafter: type[nn.Module] | None = None
    config: type | None = None
    build: Callable[[Any, Set[str], str], Any] | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict)
    write: Writer | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A layout of checkpoint directories: config.json and safetensors.

    Attributes:
        readers: by the architecture that config.json names.
        writers: by the drafter's type.
        renamed: other beginnings of tensors' names that are read, each with the usual one.
        holds_tables: embedding and head are written too.
        prefix: begins the names of the drafter's tensors in files that hold others beside them.
        unpack: (parsed config.json, the file's tensors, what to call it in errors) -> the module's
            tensors, where more than beginnings of names differ.
        pack: (config.json, the module's tensors) -> those of the file.
    """

    readers: Mapping[str, Reader] = field(default_factory=dict)
    writers: Mapping[type[nn.Module], Writer] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    holds_tables: bool = True
    prefix: str = ""
    unpack: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], dict[str, Tensor]] | None = (
        None
    )
    pack: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def plugins(group: str, kind: type[T]) -> dict[str, T]:
    """What installed packages register in a group, by name.

    One that cannot be loaded is left out with a warning.
    """
    found: dict[str, T] = {}
    for entry in entry_points(group=group):
        try:
            value, reason = entry.load(), ""
        except Exception as error:  # whatever another package raises
            value, reason = None, f" ({first_line(error)})"
        if isinstance(value, kind):
            found[entry.name] = value
        else:
            warnings.warn(
                DSparkWarning(
                    f"The plug-in {entry.name} of {group} is left out: {entry.value} is no "
                    f"{kind.__name__}{reason}; update or remove its package."
                ),
                stacklevel=2,
            )
    return found
