"""Texts, the tokenizer trained on them, and their packing into blocks.

A corpus becomes one stream of ids, each text followed by the end token and the whole preceded by
one, so that every token of every text is predicted from something. A block is ``block_size`` ids
and shares its first id with the end of the block before, which predicts block_size − 1 tokens:
over all blocks each token of the stream but the first is predicted exactly once [ours].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.train.rows import load_named, named_file, read_jsonl

IGNORED = -100
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Corpus:
    """Texts and where they are from; ``size`` counts their bytes (UTF-8) and words."""

    texts: Sequence[str]
    origin: str

    @property
    def size(self) -> tuple[int, int]:
        """UTF-8 bytes, and words split at white space, over all texts."""
        return sum(len(t.encode()) for t in self.texts), sum(len(t.split()) for t in self.texts)


def load_texts(
    name: str,
    split: str = "train",
    config: str | None = None,
    column: str = "text",
    limit: int | None = None,
) -> Corpus:
    """Texts of a .txt file (one text), a JSONL or Parquet file, a folder, or a hub dataset.

    Empty texts are left out. Raises ConfigurationError, naming row and column, where a text is
    missing or none is left.
    """
    plain = named_file(name, split, ".txt")
    if plain is not None:
        values: Sequence[Any] = [_decoded(plain)]
    else:
        values = _column(name, split, config, column)
    origin = Path(name).name
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise ConfigurationError(f"{origin}, row {number}: column {column!r} must be text")
    texts = [text for text in values if text.strip()][:limit]
    if not texts:
        raise ConfigurationError(f"{name} holds no text: give at least one")
    return Corpus(texts, origin)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE of at most ``vocab_size`` ids; id 0 is the end and padding token.

    Every byte has an id, so that any text has ids and comes back. The same texts give the same
    tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end)


class Blocks(torch.utils.data.Dataset):
    """Blocks of ``block_size`` ids over one stream ``[N]``; see this module.

    Args:
        stream: ids, first an end token.
        block_size: ids of a block.
        whole: leave out the last block where it is short (for training).
    """

    def __init__(self, stream: np.ndarray, block_size: int, whole: bool) -> None:
        self.stream, self.block_size = stream, block_size
        predicted, stride = len(stream) - 1, block_size - 1
        self._count = predicted // stride if whole else -(-predicted // stride)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * (self.block_size - 1)
        return {"input_ids": self.stream[start : start + self.block_size]}

    @property
    def predicted_tokens(self) -> int:
        """Tokens that one pass over all blocks predicts."""
        return min(len(self.stream) - 1, self._count * (self.block_size - 1))

    @property
    def digest(self) -> str:
        """Hash of ids and block size: the data of a run and of its continuation are equal."""
        return sha256(self.stream.tobytes() + str(self.block_size).encode()).hexdigest()[:16]


def pack(corpus: Corpus, tokenizer: Any, block_size: int, whole: bool) -> Blocks:
    """Blocks of a corpus. Raises ConfigurationError when there is no end token, or no block."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigurationError("the tokenizer has no eos_token: set one, it ends each text")
    stream = np.fromiter(_ids(corpus.texts, tokenizer, end), dtype=np.int32)
    blocks = Blocks(stream, block_size, whole)
    if not len(blocks):
        raise ConfigurationError(
            f"{corpus.origin} has {len(stream)} tokens, less than block_size={block_size}: give "
            "more text, or a smaller block_size"
        )
    return blocks


def collate(features: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """``input_ids`` and ``labels`` (by default the ids), ``[B, T]``.

    A short block is filled up at its end, without loss there.
    """
    length = max(len(f["input_ids"]) for f in features)
    ids = torch.zeros(len(features), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, feature in enumerate(features):
        found = feature["input_ids"]
        ids[row, : len(found)] = _long(found)
        labels[row, : len(found)] = _long(feature.get("labels", found))
    return {"input_ids": ids, "labels": labels}  # causal models need no mask for filling at the end


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _ids(texts: Sequence[str], tokenizer: Any, end: int) -> Iterator[int]:
    yield end
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        for ids in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
            yield from ids
            yield end


def _column(name: str, split: str, config: str | None, column: str) -> Sequence[Any]:
    path = named_file(name, split)
    if path is not None:
        rows = read_jsonl(path)
        if rows and not any(column in row for row in rows):
            raise ConfigurationError(_no_column(path.name, column, sorted(rows[0])))
        return [row.get(column) for row in rows]
    found = load_named(name, split, config)
    if column not in found.column_names:
        raise ConfigurationError(_no_column(name, column, found.column_names))
    return list(found[column])


def _no_column(origin: str, column: str, names: Sequence[str]) -> str:
    return f"{origin} has the columns {list(names)} and no {column!r}: set dataset_text_field"


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path.name} is not UTF-8 text: {error.reason}") from error
