"""Perplexity of a model on a corpus: per token, and per byte and word so that models compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from retort.errors import ConfigurationError
from retort.evaluate.perplexity import Perplexity, token_nll, total, windows
from retort.pretrain.corpus import Corpus, load_texts


@dataclass(frozen=True)
class CorpusPerplexity:
    """Sums over all texts, each followed by one end token; ``nll`` is in nats.

    ``bits_per_byte`` and ``word_perplexity`` divide the same sum by UTF-8 bytes and by words
    (split at white space), which do not depend on the tokenizer.
    """

    perplexity: float
    nll: float
    tokens: int
    bits_per_byte: float
    word_perplexity: float


def corpus_perplexity(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int = 1024
) -> CorpusPerplexity:
    """Perplexity of ``texts``: every token of a text and its end token are predicted, once.

    The first token of a text is predicted from an end token, as `retort.pretrain` trains it [ours].
    Texts longer than ``max_length`` are read in windows that overlap by half, as in
    `retort.evaluate.perplexity`. Raises `ConfigurationError` for a tokenizer without an end
    token, ``max_length`` below 2, or no text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigurationError("the tokenizer has no eos_token: set one, it ends each text")
    if max_length < 2:
        raise ConfigurationError(f"max_length must be 2 or more to predict a token: {max_length}")
    corpus = Corpus(texts, "the corpus")
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False) for text in texts)
    found = total(
        token_nll(model, ids, first)
        for text in encoded
        for ids, first in windows([end, *text["input_ids"], end], max_length)
    )
    return _over(found, *corpus.size)


def evaluate_folder(
    folder: str | Path,
    dataset_name: str,
    max_length: int = 1024,
    max_rows: int | None = None,
    text_field: str = "text",
    split: str = "train",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> CorpusPerplexity:
    """The same for a saved model (zoo name, hub id or folder) and a corpus by name.

    ``dataset_name`` is what `retort pretrain` takes: a .txt, JSONL or Parquet file, a folder, or
    a hub dataset. Raises ConfigurationError or RetortError naming what cannot be read.
    """
    from retort.models import zoo

    corpus = load_texts(dataset_name, split, column=text_field, limit=max_rows)
    model = zoo.load_model(folder, device=device, trust_remote_code=trust_remote_code)
    tokenizer = zoo.load_tokenizer(folder, trust_remote_code)
    return corpus_perplexity(model, tokenizer, corpus.texts, max_length)


def _over(found: Perplexity, count_bytes: int, words: int) -> CorpusPerplexity:
    whole = found.nll * found.tokens
    by_word = whole / max(words, 1)
    return CorpusPerplexity(
        perplexity=found.value,
        nll=found.nll,
        tokens=found.tokens,
        bits_per_byte=whole / math.log(2) / max(count_bytes, 1),
        word_perplexity=math.exp(by_word) if by_word < 700 else math.inf,
    )
