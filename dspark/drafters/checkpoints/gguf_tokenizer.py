"""A target's tokenizer as the fields of a GGUF file: copied from another, or made of its files.

llama.cpp tokenizes with the target's own file; of the drafter's it reads the number of tokens,
their texts and the mask token. So a directory is enough where its tokenizer is a byte-level BPE of
a kind that llama.cpp has a name for; any other is taken from the target's GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark.drafters.checkpoints.files import CONFIG, fetch, read_json
from dspark.drafters.checkpoints.gguf import MASK, TOKENS
from dspark.errors import CompatibilityError
from dspark.sources.gguf import is_gguf
from dspark.sources.gguf_file import Field, GgufFile

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
        target: a GGUF file, a directory or a hub id.
        vocab_size: V, the drafter's; a directory's tokenizer may have fewer tokens.
        offline: use the local hub cache only.

    Raises:
        CheckpointError: files are missing or damaged.
        CompatibilityError: another number of tokens, or a tokenizer that only a GGUF file tells.
    """
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
