"""Training of a small target from scratch: tokenizer, token stream, next-token loss, bits per byte.

A token of the stream is learned, only read, or unlearned. Unlearning is for a model's own answers:
a token that repeats an n-gram of the same answer is made unlikely (unlikelihood training, Welleck
et al. 2020), which keeps a small model from looping at temperature 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dspark.data.conversations import Dialogue
from dspark.data.corpus import Conversation, read_source
from dspark.data.samples import conversation_samples
from dspark.data.templates import END, TEXT_END, train_tokenizer
from dspark.errors import RecipeError
from dspark.training.recipe import CorpusSettings, Source, TargetRecipe
from dspark.training.settings import DTYPES

LEARN, READ, UNLEARN = 1, 0, -1
TOKEN = np.dtype([("id", np.uint16), ("part", np.int8)])
"""A token id and its role: LEARN, READ or UNLEARN."""


def corpus_conversations(corpus: CorpusSettings) -> Iterator[Conversation]:
    """Yield the training conversations of every source, each `repeat` times."""
    for source in corpus.sources:
        for _ in range(source.repeat):
            yield from source_conversations(corpus, source)


def source_conversations(corpus: CorpusSettings, source: Source) -> Iterator[Conversation]:
    """Yield the conversations of one source, once."""
    path = None if source.path is None else Path(corpus.root) / source.path
    return read_source(source.format, path)


def corpus_documents(corpus: CorpusSettings, tokenizer: Any) -> list[np.ndarray]:
    """Every training conversation, rendered by the chat template and encoded: rows of `TOKEN`."""
    documents: list[np.ndarray] = []
    for source in corpus.sources:
        conversations = list(source_conversations(corpus, source))
        gram = source.unlearn_repeats
        encoded = (
            repeating_documents(tokenizer, conversations, gram)
            if gram
            else learned_documents(tokenizer, conversations)
        )
        documents += encoded * source.repeat
    return documents


def learned_documents(tokenizer: Any, conversations: Sequence[Conversation]) -> list[np.ndarray]:
    """Conversations with every token learned."""
    texts = [tokenizer.apply_chat_template(list(c), tokenize=False) for c in conversations]
    return [
        _document(tokenizer, ids, LEARN)
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]


def repeating_documents(
    tokenizer: Any, conversations: Sequence[Conversation], gram: int
) -> list[np.ndarray]:
    """Conversations whose answers repeat an n-gram; only the repeats are unlearned.

    Args:
        tokenizer: with a chat template.
        conversations: with assistant turns written by the model itself.
        gram: length of a repeated n-gram, tokens.
    """
    documents = []
    for conversation in conversations:
        for sample in conversation_samples(tokenizer, Dialogue(conversation)):
            repeated = repeated_tokens(sample.input_ids, sample.loss_mask, gram)
            if repeated.any():
                document = _document(tokenizer, sample.input_ids, READ)
                document["part"][:-1][repeated] = UNLEARN
                documents.append(document)
    return documents


def repeated_tokens(ids: Sequence[int], own: Sequence[bool], gram: int) -> np.ndarray:
    """Mask of tokens in an n-gram that occurred earlier in the same answer.

    Args:
        ids: tokens of a conversation.
        own: True for answer tokens; consecutive ones form an answer.
        gram: n.

    Returns:
        bool, one per token.
    """
    found = np.zeros(len(ids), dtype=bool)
    seen: set[tuple[int, ...]] = set()
    for start in range(len(ids) - gram + 1):
        if not all(own[start : start + gram]):
            if not own[start]:
                seen.clear()
            continue
        row = tuple(ids[start : start + gram])
        if row in seen:
            found[start : start + gram] = True
        seen.add(row)
    return found


def _document(tokenizer: Any, ids: Sequence[int], part: int) -> np.ndarray:
    document = np.empty(len(ids) + 1, dtype=TOKEN)
    document["id"][:-1] = ids
    document["id"][-1] = tokenizer.convert_tokens_to_ids(TEXT_END)
    document["part"] = part
    return document


class TokenStream:
    """Conversations, reshuffled each epoch, concatenated and split into rows.

    Row r of step s is a function of (seed, s, r) alone.
    """

    def __init__(self, documents: list[np.ndarray], row_tokens: int, seed: int) -> None:
        self.documents = documents
        self.row_tokens = row_tokens
        self.seed = seed
        self.rows_per_epoch = sum(len(d) for d in documents) // row_tokens
        self._epoch = -1
        self._tokens = np.empty(0, dtype=TOKEN)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows `first`..`first + count - 1` of the endless stream.

        Returns:
            Ids, int64, and parts, int8; both [count, row_tokens].
        """
        found = np.stack([self._row(first + i) for i in range(count)])
        ids, parts = found["id"].astype(np.int64), np.ascontiguousarray(found["part"])
        return torch.from_numpy(ids), torch.from_numpy(parts)

    def _row(self, index: int) -> np.ndarray:
        epoch, within = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
            self._tokens = np.concatenate([self.documents[i] for i in order])
            self._epoch = epoch
        start = within * self.row_tokens
        return self._tokens[start : start + self.row_tokens]


class LanguageModelObjective:
    """Next-token cross-entropy of a Qwen3-architecture model over a token stream."""

    def __init__(self, recipe: TargetRecipe, device: str) -> None:
        self.recipe = recipe
        self.device = device
        self.tokenizer = prepare_tokenizer(recipe)
        documents = corpus_documents(recipe.corpus, self.tokenizer)
        self.stream = TokenStream(documents, recipe.run.row_tokens, recipe.run.seed)
        torch.manual_seed(recipe.run.seed)
        config = _config(recipe, self.tokenizer)
        # On a CPU, compiled products of whole score matrices beat the flash kernel (docs/LOG.md).
        config._attn_implementation = "eager" if device == "cpu" else "sdpa"
        self.model = Qwen3ForCausalLM(config)
        if recipe.initial is not None:
            _load_initial(self.model, Path(recipe.initial))
        self.model.generation_config = GenerationConfig(eos_token_id=self.tokenizer.eos_token_id)
        self.model.to(device=device, dtype=DTYPES[recipe.run.dtype])
        self.module: nn.Module = self.model
        self.tokens_seen = 0
        self._loss = torch.compile(self._row_loss) if recipe.run.compile else self._row_loss

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """Loss per token, in nats, of this part's rows: see `stream_loss`."""
        run = self.recipe.run
        share = run.rows // parts
        ids, parts_BS = self.stream.rows(step * run.rows + part * share, share)
        self.tokens_seen += ids.numel()
        loss = self._loss(ids.to(self.device), parts_BS.to(self.device))
        return loss, {"epoch": step * run.rows / self.stream.rows_per_epoch}

    def _row_loss(self, ids_BS: Tensor, parts_BS: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1].flatten(0, 1)).float()
        weight = self.recipe.corpus.unlearn_weight
        return stream_loss(logits, ids_BS[:, 1:].flatten(), parts_BS[:, 1:].flatten(), weight)

    def export(self, directory: Path) -> None:
        """Write the model in bf16, its tokenizer, and held-out bits per byte per domain."""
        weights = self.model.to(torch.bfloat16)
        weights.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        report = {
            domain: heldout_bits_per_byte(
                self.model, self.tokenizer, list(source_conversations(self.recipe.corpus, source))
            )
            for domain, source in self.recipe.corpus.heldout.items()
        }
        (directory / "heldout.json").write_text(json.dumps(report, indent=2) + "\n")


def stream_loss(
    logits_NV: Tensor, labels_N: Tensor, parts_N: Tensor, unlearn_weight: float
) -> Tensor:
    """-log p of learned tokens and -weight log(1 - p) of unlearned ones, over all N tokens.

    The divisor is always N, so that the loss of several batches is the mean of theirs.

    Args:
        logits_NV: of the tokens' predictions.
        labels_N: the tokens.
        parts_N: LEARN, READ or UNLEARN.
        unlearn_weight: weight of unlearned tokens.
    """
    nats_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    # In a loop p is nearly 1; the constant keeps the gradient finite.
    unlearned_N = -torch.log(1 - torch.exp(-nats_N) + 1e-5)
    wanted_N = torch.where(parts_N == LEARN, nats_N, unlearn_weight * unlearned_N)
    return torch.where(parts_N == READ, 0.0, wanted_N).mean()


def prepare_tokenizer(recipe: TargetRecipe) -> Any:
    """The tokenizer in the recipe's output directory, trained on its corpus if absent."""
    output = Path(recipe.run.output_dir)
    for directory in (output, Path(recipe.initial or output)):
        if (directory / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
            if directory != output:  # do not rewrite what other ranks read
                tokenizer.save_pretrained(output)
            return tokenizer
    if recipe.initial is not None:
        raise RecipeError(f"initial is {recipe.initial!r}, which holds no tokenizer.json.")
    texts = (m["content"] for c in corpus_conversations(recipe.corpus) for m in c)
    tokenizer = train_tokenizer(texts, recipe.architecture.vocab_size)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    return tokenizer


def _load_initial(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Copy a checkpoint's weights into the model.

    Raises:
        RecipeError: there is none, or its tensors are not the model's.
    """
    path = directory / "model.safetensors"
    if not path.is_file():
        raise RecipeError(f"initial is {str(directory)!r}, which holds no model.safetensors.")
    state = load_file(path)
    own = {name: p.shape for name, p in model.named_parameters()}
    if own != {name: tensor.shape for name, tensor in state.items()}:
        raise RecipeError(
            f"initial is {str(directory)!r}, whose tensors are not those of the recipe's "
            "architecture; give the architecture that it was trained with."
        )
    model.load_state_dict(state, strict=False)  # a tied head is stored once


def _config(recipe: TargetRecipe, tokenizer: Any) -> Qwen3Config:
    shapes = recipe.architecture.model_dump()
    return Qwen3Config(
        rope_parameters={"rope_type": "default", "rope_theta": shapes.pop("rope_theta")},
        **shapes,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def heldout_bits_per_byte(
    model: Any, tokenizer: Any, conversations: list[Conversation], limit: int = 200
) -> dict[str, float]:
    """Bits per UTF-8 byte of the assistant turns, each conditioned on what precedes it.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer, with a chat template that marks `generation` spans.
        conversations: held-out conversations, in file order.
        limit: how many of them count.

    Returns:
        {"bits_per_byte", "nats_per_token", "conversations"}.
    """
    nats = tokens = size = 0.0
    used = 0
    for conversation in conversations[:limit]:
        encoded = tokenizer.apply_chat_template(
            list(conversation),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = torch.tensor(encoded["input_ids"][: model.config.max_position_embeddings])
        mask = torch.tensor(encoded["assistant_masks"][: len(ids)], dtype=torch.bool)
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        losses = F.cross_entropy(logits, ids[1:], reduction="none")[mask[1:].to(ids.device)]
        nats += float(losses.sum())
        tokens += len(losses)
        size += sum(len(m["content"].encode()) for m in conversation if m["role"] == "assistant")
        used += 1
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / tokens,
        "conversations": used,
    }
