"""What a drafter's file takes from its target's files: embedding, head, and a GGUF's tokenizer.

llama.cpp tokenizes with the target's own file; of the drafter's it reads the number of tokens,
their texts and the mask token. So a directory is enough where its tokenizer is a byte-level BPE of
a kind that llama.cpp has a name for; any other is taken from the target's GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.checkpoints.files import CONFIG, INDEX, fetch, read_json, read_named
from dspark.drafters.checkpoints.gguf import EMBEDDING, HEAD, MASK, TOKENS
from dspark.drafters.checkpoints.speculators import TARGET_ARCHITECTURES, TARGET_NAME
from dspark.errors import CheckpointError, CompatibilityError
from dspark.sources.gguf import is_gguf
from dspark.sources.gguf_file import Field, GgufFile
from dspark.sources.names import origin, public_name, target_source

_TIED = "tie_word_embeddings"
# DeepSeek-V4's own names for them.
_ITS_OWN = {"embed.weight": EMBEDDING, "head.weight": HEAD}


@dataclass(frozen=True)
class TargetTables:
    """What a checkpoint of a drafter borrows from its target's: `BorrowedParts` without scales.

    Enough to save a drafter with, not to run it.

    Attributes:
        name: the directory or hub id.
        architectures: of its config.json.
        num_layers: decoder layers.
        embedding_VH: input embedding.
        head_VH: output head; the embedding where they are tied.
    """

    name: str
    architectures: tuple[str, ...]
    num_layers: int
    embedding_VH: Tensor
    head_VH: Tensor
    embedding_scale: float = 1.0
    head_bias_V: Tensor | None = None
    logit_softcap: float | None = None
    final_norm_H: Tensor | None = None
    head: None = None
    pack: None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding_VH.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.embedding_VH.shape[1]

    @classmethod
    def read(
        cls, source: str | Path, *, revision: str | None = None, offline: bool = False
    ) -> TargetTables:
        """Read them from a directory, a GGUF file, a hub id or a name that ships.

        Raises:
            CheckpointError: files are missing or damaged, or hold no such tables.
            CompatibilityError: a GGUF cannot be loaded here.
        """
        place = target_source(source, offline=offline)
        directory = Path(place)
        if not directory.is_dir():
            directory = fetch(str(place), revision, offline, (CONFIG, "*.safetensors", INDEX))
        if not (directory / CONFIG).is_file():
            raise CheckpointError(f"{directory} has no {CONFIG}; give a target's directory.")
        config = read_json(directory / CONFIG)
        text = config.get("text_config", config)
        layers = text.get("num_hidden_layers") if isinstance(text, Mapping) else None
        if type(layers) is not int or layers < 1:
            raise CheckpointError(
                f"{directory / CONFIG} has num_hidden_layers {layers!r}; give a target's directory."
            )
        found = read_named(
            directory, lambda name: name in _ITS_OWN or name.endswith((EMBEDDING, HEAD))
        )
        found = {_ITS_OWN.get(name, name): table for name, table in found.items()}
        embedding = _one(found, EMBEDDING, directory)
        if embedding is None:
            raise CheckpointError(
                f"{directory} has no tensor that ends in {EMBEDDING}; bind the drafter to the "
                "loaded target in Python and save it there."
            )
        head = _one(found, HEAD, directory)
        if head is None and not text.get(_TIED, config.get(_TIED, True)):
            raise CheckpointError(
                f"{directory} has no tensor that ends in {HEAD}, though its {_TIED} is false; "
                "bind the drafter to the loaded target in Python and save it there."
            )
        architectures = config.get("architectures")
        return cls(
            name=public_name(source, offline=offline),
            architectures=tuple(architectures) if isinstance(architectures, list) else (),
            num_layers=layers,
            embedding_VH=embedding,
            head_VH=embedding if head is None else head,
        )

    def as_dtype(self, dtype: torch.dtype) -> TargetTables:
        """The same in another dtype; tied tables stay one."""
        embedding = self.embedding_VH.to(dtype)
        tied = self.head_VH is self.embedding_VH
        head = embedding if tied else self.head_VH.to(dtype)
        return replace(self, embedding_VH=embedding, head_VH=head)

    def named(self) -> dict[str, Any]:
        """The target's name and architectures, as a drafter's configuration records them."""
        return {TARGET_NAME: self.name, TARGET_ARCHITECTURES: list(self.architectures)}


def _one(found: Mapping[str, Tensor], suffix: str, directory: Path) -> Tensor | None:
    names = [name for name in found if name.endswith(suffix)]
    # Vision and audio towers may embed things of their own; the language model's comes first.
    text = [name for name in names if "language_model" in name] or names
    if len(text) > 1:
        raise CheckpointError(
            f"{directory} has {len(text)} tensors that end in {suffix} ({', '.join(text[:3])}); "
            "bind the drafter to the loaded target in Python and save it there."
        )
    return found[text[0]] if text else None


_PREFIX, _KINDS = "tokenizer.", "tokenizer.ggml.token_type"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
# Beginnings of the patterns that split a text, with llama.cpp's names of the whole pre-tokenizers.
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?["
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?["


def tokenizer_fields(target: str | Path, vocab_size: int, *, offline: bool) -> dict[str, Field]:
    """The fields of a target's tokenizer.

    Args:
        target: a GGUF file, a directory, a hub id or a name that ships.
        vocab_size: V, the drafter's; a directory's tokenizer may have fewer tokens.
        offline: use the local hub cache only.

    Raises:
        CheckpointError: files are missing or damaged.
        CompatibilityError: another number of tokens, or a tokenizer that only a GGUF file tells.
    """
    target = origin(target, offline=offline)
    if is_gguf(target):
        file = GgufFile.open(target)
        fields = {
            key: field
            for key, field in file.fields.items()
            if key.startswith(_PREFIX) and key != MASK
        }
    else:
        directory = Path(target)
        if not directory.is_dir():
            wanted = (CONFIG, _TOKENIZER, _TOKENIZER_CONFIG)
            directory = fetch(str(target), None, offline, wanted)
        fields = _from_directory(directory, vocab_size)
    tokens = len(fields[TOKENS].value) if TOKENS in fields else 0
    if tokens != vocab_size:
        raise CompatibilityError(
            f"{target} has a tokenizer of {tokens} tokens, but the drafter's vocab_size is "
            f"{vocab_size}; give the target that the drafter was made for."
        )
    return fields


def refuse_other_tokens(source: str | Path, vocab: Mapping[str, int] | None) -> None:
    """Refuse a GGUF drafter whose tokens are not the target's.

    Args:
        source: the drafter's file.
        vocab: ids of the target's tokens by their text; None where it has no tokenizer.

    Raises:
        CompatibilityError: naming the first token that differs.
    """
    file = GgufFile.open(source)
    tokens, kinds = file.get(TOKENS, []), file.get(_KINDS, [])
    if vocab is None or not tokens:
        return
    texts = {id_: text for text, id_ in vocab.items()}
    for id_, (text, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == _NORMAL and texts.get(id_, text) != text:
            raise CompatibilityError(
                f"{source} was made for another tokenizer than the target's: token {id_} is "
                f"{text!r} there and {texts[id_]!r} here; use a drafter made for this target."
            )


def _from_directory(directory: Path, vocab_size: int) -> dict[str, Field]:
    path = directory / _TOKENIZER
    if not path.is_file():
        raise CompatibilityError(
            f"{directory} has no {_TOKENIZER}; name the target's GGUF file in its place."
        )
    data = read_json(path)
    model = data.get("model")
    pre = _pre_tokenizer(data)
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or pre is None:
        raise CompatibilityError(
            f"{path} is no byte-level BPE tokenizer of a kind that is known; name the target's "
            "GGUF file in its place."
        )
    texts: dict[int, tuple[str, int]] = {id_: (t, _NORMAL) for t, id_ in model["vocab"].items()}
    for token in data.get("added_tokens") or ():
        kind = _CONTROL if token.get("special") else _USER_DEFINED
        texts[token["id"]] = (token["content"], kind)
    if texts and max(texts) >= vocab_size:
        raise CompatibilityError(
            f"{path} has tokens up to {max(texts)}, but the drafter's vocab_size is {vocab_size}; "
            "give the target that the drafter was made for."
        )
    rows = [texts.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(vocab_size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    fields = {
        "tokenizer.ggml.model": Field.of("gpt2"),
        "tokenizer.ggml.pre": Field.of(pre),
        TOKENS: Field.of([text for text, _ in rows]),
        _KINDS: Field.of([kind for _, kind in rows]),
        "tokenizer.ggml.merges": Field(merges, ("ARRAY", "STRING")),
        "tokenizer.ggml.add_bos_token": Field.of(False),
    }
    ids = {text: id_ for id_, (text, _) in texts.items()}
    return fields | _special_tokens(directory, ids)


def _special_tokens(directory: Path, ids: Mapping[str, int]) -> dict[str, Field]:
    """Begin, end, padding and unknown tokens, as tokenizer_config.json names them."""
    path = directory / _TOKENIZER_CONFIG
    if not path.is_file():
        return {}
    config, found = read_json(path), {}
    for theirs, ours in _SPECIAL.items():
        token = config.get(ours)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text in ids:
            found[f"tokenizer.ggml.{theirs}_token_id"] = Field.of(ids[text])
    return found


def _pre_tokenizer(data: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer.json splits a text before the merges; None: unknown."""
    pre = data.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    if not parts or parts[-1].get("type") != "ByteLevel":
        return None
    before, own_split = parts[:-1], parts[-1].get("use_regex", True)
    if not before:
        return "gpt-2" if own_split else None
    if len(before) > 1:
        return None
    kind, pattern = before[0].get("type"), json.dumps(before[0].get("pattern"))
    if own_split:
        digits = kind == "Digits" and before[0].get("individual_digits")
        single = kind == "Split" and pattern in (r'{"Regex": "\\d"}', r'{"Regex": "\\p{N}"}')
        return "smollm" if digits or single else None
    regex = str((before[0].get("pattern") or {}).get("Regex", ""))
    return next((n for n, p in (("qwen2", _QWEN2), ("llama-bpe", _LLAMA3)) if p in regex), None)
