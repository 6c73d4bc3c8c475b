"""Token-weighted perplexity: exp of the mean −log p over all tokens of all texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retort.errors import ConfigurationError
from retort.evaluate.predictions import Example, predict


@dataclass(frozen=True)
class Perplexity:
    """``value`` = exp(``nll``), with ``nll`` the mean in nats over ``tokens`` scored tokens."""

    value: float
    nll: float
    tokens: int


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = 1024,
    chunk_size: int = 128,
) -> Perplexity:
    """Perplexity of ``texts``; a long text counts more than a short one (the weight is a token).

    A text longer than ``max_length`` tokens is read in windows that overlap by half, so that each
    token is scored exactly once and, past the first window, after at least half a window of
    context (our choice). The first token of a text has no context and is not scored. Raises
    `ConfigurationError` if no token can be scored or ``max_length`` is below 2.
    """
    if max_length < 2:
        raise ConfigurationError(f"max_length must be 2 or more to predict a token: {max_length}")
    return total(text_nll(model, tokenizer, text, max_length, chunk_size) for text in texts)


def text_nll(
    model: nn.Module, tokenizer: Any, text: str, max_length: int = 1024, chunk_size: int = 128
) -> Tensor:
    """−log p of each token of ``text`` but its first, in the windows of `perplexity`."""
    cut = windows(list(tokenizer(text)["input_ids"]), max_length)
    parts = [token_nll(model, ids, first, chunk_size) for ids, first in cut]
    return torch.cat(parts) if parts else torch.empty(0)


def completion_perplexity(
    model: nn.Module, examples: Sequence[Example], chunk_size: int = 128
) -> Perplexity:
    """Perplexity of completions after their prompts (token ids of both); prompts are not scored."""
    return total(
        token_nll(model, [*prompt, *completion], len(prompt), chunk_size)
        for prompt, completion in examples
    )


def token_nll(
    model: nn.Module, token_ids: Sequence[int], first: int = 1, chunk_size: int = 128
) -> Tensor:
    """−log p of each of ``token_ids[first:]``, at least float32 ``[N]``, on the model's device."""
    found = predict(model, token_ids, first)
    parts = []
    with torch.no_grad():
        chunks = zip(found.chunks(chunk_size), found.targets.split(chunk_size), strict=True)
        for logits, targets in chunks:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            parts.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(parts)


def windows(token_ids: list[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Windows of at most ``size`` tokens with the index in each of the first token to score."""
    stride = max(1, size // 2)
    scored = 1
    while scored < len(token_ids):
        start = 0 if scored == 1 else scored - (size - stride)
        window = token_ids[start : start + size]
        yield window, scored - start
        scored = start + len(window)


def total(losses: Iterator[Tensor]) -> Perplexity:
    """Perplexity over −log p of tokens ``[n]``. Raises ConfigurationError if there is none."""
    total, tokens = 0.0, 0
    for loss in losses:
        total += loss.double().sum().item()
        tokens += loss.numel()
    if not tokens:
        raise ConfigurationError("perplexity: the texts hold no token to predict; give longer ones")
    nll = total / tokens
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, tokens)
