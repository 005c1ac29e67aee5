"""Reads and writes drafter checkpoints in every layout (docs/checkpoints.md).

A directory holds config.json and model.safetensors (or shards with an index), with embedding and
head or without: the target's are then borrowed at bind. A GGUF, llama.cpp's, is one file with names
and keys of its own (`checkpoints.gguf`, `gguf_writer`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dspark.drafters.base import Layout
from dspark.drafters.checkpoints.files import (
    ATTACHED_FOLDER,
    CONFIG,
    INDEX,
    INSIDE,
    Written,
    fetch,
    holds_inside,
    read_json,
    read_weights,
    resolve,
    write,
)
from dspark.drafters.checkpoints.from_target import TargetTables
from dspark.drafters.checkpoints.gguf import ARCHITECTURES as GGUF_ARCHITECTURES
from dspark.drafters.checkpoints.gguf import from_gguf
from dspark.drafters.checkpoints.gguf_writer import to_gguf
from dspark.drafters.checkpoints.registry import (
    ATTACHED,
    DEEPSPEC,
    AnyDrafter,
    Found,
    has_drafter_inside,
    is_drafter,
    layouts,
    read_config,
    write_config,
)
from dspark.errors import CheckpointError
from dspark.sources.gguf import is_gguf
from dspark.sources.gguf_file import Field, GgufFile, write_gguf
from dspark.sources.names import SMOLLM2, drafter_source

_TABLES = ("embed_tokens.weight", "lm_head.weight")


def load_drafter(
    source: str | Path, *, revision: str | None = None, offline: bool = False
) -> AnyDrafter:
    """Load a drafter, in the checkpoint's dtype, on the CPU, in evaluation mode, unbound.

    Args:
        source: a directory of any layout, a hub id, or a GGUF file.
        revision: branch, tag or commit on the hub.
        offline: use the local hub cache only.

    Raises:
        CheckpointError: files are missing, damaged, pickled, or do not agree with config.json.
        CompatibilityError: the architecture or an option of it is not supported.
    """
    if is_gguf(source):
        return _load_gguf(Path(source))
    return _load(resolve(source, revision, offline))


def examine(directory: Path) -> tuple[AnyDrafter, dict[str, Tensor]]:
    """The drafter of a directory without its numbers, and the tensors of its files likewise.

    Both are on the meta device: names, shapes and dtypes are read and checked, nothing else.

    Raises:
        CheckpointError, CompatibilityError: as `load_drafter`.
    """
    files: dict[str, Tensor] = {}
    return _load(directory, files), files


def _load(directory: Path, headers: dict[str, Tensor] | None = None) -> AnyDrafter:
    """The drafter of a directory; where `headers` are asked for, they are all that is read."""
    path = directory / CONFIG
    data = read_json(path)
    found = read_config(data, str(path))
    layout = found.layout or Layout()
    if has_drafter_inside(data) and not holds_inside(directory):
        raise CheckpointError(
            f"{path} speaks of a draft module, but the files beside it hold no {INSIDE}*; fetch "
            "the published checkpoint, or decode with --draft none."
        )
    state = read_weights(directory, layout.prefix, headers_only=headers is not None)
    if headers is not None:
        headers.update(state)
    if layout.unpack is not None:
        state = layout.unpack(data, state, str(directory))
    return _filled(found, state, str(path), directory)


def _load_gguf(path: Path) -> AnyDrafter:
    config, state = from_gguf(GgufFile.open(path))
    return _filled(read_config(config, str(path)), state, str(path), path)


def _filled(found: Found, state: Mapping[str, Tensor], where: str, place: Path) -> AnyDrafter:
    """The drafter of a configuration with the tensors of its file."""
    assert found.kind.build is not None, "a configuration belongs to a drafter with weights"
    named = {_usual(name, found.renamed): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        drafter: AnyDrafter = found.kind.build(found.config, named.keys(), where)
    return _fill(drafter, named, place)


def borrow_tables(drafter: AnyDrafter, tables: TargetTables) -> None:
    """Bind a drafter to a target that is only read from disk, in order to save it.

    The drafter then knows how many layers the target has and how it is called, and its own
    embedding and head are dropped where they equal the target's.

    Raises:
        CompatibilityError: the target is not one that the drafter was made for.
    """
    drafter.bind(
        tables.as_dtype(next(drafter.parameters()).dtype), num_target_layers=tables.num_layers
    )
    extra = {**drafter.config.extra, **tables.named()}
    drafter.config = replace(drafter.config, num_target_layers=tables.num_layers, extra=extra)


def save(
    drafter: AnyDrafter,
    directory: str | Path,
    layout: str = DEEPSPEC,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Written:
    """Write a directory of a layout, with embedding and head where the layout holds them.

    Args:
        drafter: bound, or loaded with its own embedding and head.
        directory: made if absent.
        layout: its name: deepspec (the published one), speculators, or a plug-in's.
        dtype: of every weight; None keeps the parameters' own.

    Raises:
        CompatibilityError: the layout has no place for something of the drafter (a learned mask
            embedding, a window, ...), or it has no embedding and head.
        CheckpointError: the directory holds another model than a drafter.
    """
    holds = layouts()[layout].holds_tables
    tables = _all_tables(drafter) if holds else _own_tables(drafter)
    return _save(drafter, Path(directory), layout, tables, dtype)


def save_gguf(
    drafter: AnyDrafter,
    path: str | Path,
    tokenizer: Mapping[str, Field],
    *,
    weight_type: str = "bf16",
) -> Written:
    """Write llama.cpp's layout, without embedding and head where they are the target's.

    Args:
        drafter: bound to its target, in memory or by `borrow_tables`.
        path: the file.
        tokenizer: the target's (`from_target.tokenizer_fields`).
        weight_type: of matrices: bf16, f16 or q8_0.

    Raises:
        CompatibilityError: llama.cpp has no place for something of the drafter.
        CheckpointError: the file is there and holds another model than a drafter.
        UsageError: the package `gguf` is not installed.
    """
    path = Path(path)
    if path.is_file() and GgufFile.open(path).architecture not in GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds a model that is no drafter, which would be lost; name another file."
        )
    data = write_config(drafter, ATTACHED, weight_type)
    architecture, fields, tensors = to_gguf(drafter, data)
    size = write_gguf(path, architecture, {**tokenizer, **fields}, tensors, weight_type)
    return Written(path, len(tensors), size)


def save_attached(
    drafter: AnyDrafter, target_directory: str | Path, *, dtype: torch.dtype | None = torch.bfloat16
) -> Written:
    """Write the attached layout: `dspark/` inside the target's directory, or beside its GGUF.

    Embedding or head are written only where the drafter has its own.

    Raises:
        CheckpointError: the target's directory does not exist.
    """
    target = Path(target_directory)
    if is_gguf(target):
        target = target.parent
    if not target.is_dir():
        raise CheckpointError(f"{target} is no directory; save the target there first.")
    return save(drafter, target / ATTACHED_FOLDER, ATTACHED, dtype=dtype)


def has_attached_drafter(
    source: str | Path, *, revision: str | None = None, offline: bool = False
) -> bool:
    """Whether a target carries a drafter, in `dspark/` or among its own tensors.

    Args:
        source: a directory, a GGUF file (then beside it), a hub id, or a name that ships.
        revision: on the hub.
        offline: use the local hub cache only.

    Raises:
        CheckpointError: the hub id cannot be looked up.
    """
    directory = Path(drafter_source(source))
    if directory == SMOLLM2:  # its target comes from elsewhere
        return (directory / CONFIG).is_file()
    if not directory.exists():
        configs = (CONFIG, INDEX, f"{ATTACHED_FOLDER}/{CONFIG}")
        directory = fetch(str(source), revision, offline, configs)
    if (directory / ATTACHED_FOLDER / CONFIG).is_file():
        return True
    config = directory / CONFIG
    return config.is_file() and has_drafter_inside(read_json(config)) and holds_inside(directory)


def _usual(name: str, renamed: Mapping[str, str]) -> str:
    for beginning, usual in renamed.items():
        if name.startswith(beginning):
            return usual + name.removeprefix(beginning)
    return name


def _fill(drafter: AnyDrafter, state: dict[str, Tensor], directory: Path) -> AnyDrafter:
    """An empty drafter with the tensors of a file in it, after checking names, shapes, dtypes."""
    config = drafter.config
    empty = drafter.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    width, vocab = config.backbone.hidden_size, config.vocab_size
    (known,) = shapes.get("d2t", (vocab,))
    allowed = shapes | dict(zip(_TABLES, ((vocab, width), (known, width)), strict=True))
    _compare_names(set(shapes) - set(state), set(state) - set(allowed), directory)
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(allowed[name])}"
        for name, tensor in sorted(state.items())
        if tuple(tensor.shape) != allowed[name]
    ]
    if wrong:
        raise CheckpointError(f"{directory} has tensors of a wrong shape: {_few(wrong)}.")
    fixed = {n: x.dtype for n, x in empty.items() if not x.is_floating_point()}
    floats = {n: x for n, x in state.items() if n not in fixed}
    whole = [name for name, tensor in floats.items() if not tensor.is_floating_point()]
    if whole:
        raise CheckpointError(f"{directory} has tensors that are no floats: {_few(whole)}.")
    for name, dtype in fixed.items():
        if state[name].dtype != dtype:
            raise CheckpointError(f"{directory} has {name} as {state[name].dtype}, not {dtype}.")
    if "d2t" in fixed:
        _check_vocabulary(state["d2t"], state["t2d"], directory)
    others = {x.dtype for name, x in floats.items() if not drafter.keeps_fp32(name)}
    dtype = functools.reduce(torch.promote_types, others)
    tables = [state.pop(name, None) for name in _TABLES]
    cast = {n: x if n in fixed else x.to(_kept(drafter, n, dtype)) for n, x in state.items()}
    drafter.load_state_dict(cast, assign=True)
    drafter.own_embedding_VH, drafter.own_head_VH = tables
    drafter.eval()
    return drafter


def _kept(drafter: AnyDrafter, name: str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a tensor is kept beside others of `dtype`."""
    return torch.float32 if drafter.keeps_fp32(name) else dtype


def _check_vocabulary(d2t: Tensor, t2d: Tensor, directory: Path) -> None:
    """Refuse a reduced vocabulary whose two tensors disagree, or that is out of order."""
    tokens = d2t + torch.arange(d2t.numel())
    if not torch.equal(tokens, t2d.nonzero().flatten()):
        raise CheckpointError(
            f"{directory} has tensors d2t and t2d that do not name the same tokens in ascending "
            "order; the checkpoint is damaged."
        )


def _compare_names(missing: set[str], extra: set[str], directory: Path) -> None:
    if missing:
        raise CheckpointError(
            f"{directory} lacks the tensors {_few(sorted(missing))}; fetch or save it again, or "
            f"correct its {CONFIG}."
        )
    if extra:
        raise CheckpointError(
            f"{directory} has tensors that its {CONFIG} does not explain: {_few(sorted(extra))}."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _own_tables(drafter: AnyDrafter) -> dict[str, Tensor]:
    """Embedding and head as far as the drafter has its own."""
    own = zip(_TABLES, (drafter.own_embedding_VH, drafter.own_head_VH), strict=True)
    return {name: table for name, table in own if table is not None}


def _all_tables(drafter: AnyDrafter) -> dict[str, Tensor]:
    """Embedding and head, the drafter's own or those that it borrows."""
    own = _own_tables(drafter)
    if len(own) == len(_TABLES):
        return own
    borrowed = zip(_TABLES, (drafter.borrowed.embedding_VH, drafter.borrowed.head_VH), strict=True)
    return {**dict(borrowed), **own}


def _refuse_to_replace(directory: Path) -> None:
    """Refuse to write over a model that is no drafter: a target, most likely."""
    if (directory / CONFIG).is_file() and not is_drafter(read_json(directory / CONFIG)):
        raise CheckpointError(
            f"{directory} holds a model that is no drafter, which would be lost; name another "
            "directory, or save the drafter attached to it."
        )


def _save(
    drafter: AnyDrafter,
    directory: Path,
    layout: str,
    tables: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> Written:
    _refuse_to_replace(directory)
    kept = next(drafter.parameters()).dtype if dtype is None else dtype
    data = write_config(drafter, layout, str(kept).removeprefix("torch."))
    named = {**drafter.state_dict(), **tables}
    # A tied embedding and head share memory, which safetensors refuses: each gets its own.
    state = {
        name: tensor.detach()
        .to(
            "cpu",
            _kept(drafter, name, kept) if tensor.is_floating_point() else tensor.dtype,
            copy=True,
        )
        .contiguous()
        for name, tensor in named.items()
    }
    pack = layouts()[layout].pack
    if pack is not None:
        state = pack(data, state)
    return write(directory, state, data)
