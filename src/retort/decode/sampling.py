"""From logits to the target's token: penalties, truncation and counter-based Gumbel noise.

`coupled` sampling (our choice, on the idea of drafter-invariant speculation by Gumbel coupling,
Daliri, Musco and Suresh 2024): the token is ``argmax(log p + g)`` where ``g`` depends only on
(seed, generated index, token id). The text is then a function of seed and logits alone, and a
draft is right exactly when it equals that token: speculation cannot change what is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.decode.request import SamplingParams

_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def choose(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: set
) -> int:
    """The token that plain decoding takes after ``prompt + output``; ``logits`` is ``[vocab]``."""
    scores = shape_scores(logits, params, prompt, output, eos)
    if params.do_sample:
        kept = torch.nonzero(scores > -torch.inf)[:, 0]
        noise = gumbel(params.seed, len(output), kept)
        return int(kept[torch.argmax(scores[kept] + noise)])
    return int(torch.argmax(scores))


def shape_scores(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: set
) -> Tensor:
    """Log-probabilities up to a constant, float64 ``[vocab]``, in Hugging Face's order.

    Penalties and bias, minimum length, then (when sampling) temperature, top-k, top-p, min-p.
    """
    scores = logits.to(torch.float64, copy=True)
    _penalise(scores, params, prompt, output)
    if len(output) < params.min_new_tokens:
        scores[list(eos)] = -torch.inf
    return _truncate(scores / params.temperature, params) if params.do_sample else scores


def is_plain(params: SamplingParams, generated: int) -> bool:
    """Whether the token is the bare argmax of the logits (``generated`` tokens exist so far)."""
    return (
        not params.do_sample
        and not params.logit_bias
        and generated >= params.min_new_tokens
        and params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
    )


def gumbel(seed: int, index: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, a pure function of (seed, index, token id)."""
    key = _mix(torch.tensor(_wrap(seed)) * _GOLDEN + _wrap(index))
    bits = _mix(_mix(tokens.to(torch.int64) * _GOLDEN + key) + _GOLDEN)
    uniform = (_shift(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser in wrapping int64 arithmetic."""
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _penalise(
    scores: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> None:
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *output}), device=scores.device)
        old, penalty = scores[seen], params.repetition_penalty
        scores[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(list(output), device=scores.device).unique(return_counts=True)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias


def _truncate(scores: Tensor, params: SamplingParams) -> Tensor:
    if 0 < params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1.0:
        ordered, order = scores.sort()
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        drop[-1] = False
        scores[order[drop]] = -torch.inf
    if params.min_p > 0.0:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < params.min_p * probs.max(), -torch.inf)
    return scores
