"""What shapes the distribution that a token comes from, in the order of transformers' generate.

Bias, penalties, forbidden words, minimum length, the caller's own processors, row by row; then,
when sampling, temperature, top-k, top-p and min-p, for many rows at once. Target and drafts go
through the same functions, and a row's scores are the same bits alone and in any batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from retort.decode.params import SamplingParams

_NUCLEUS = 256  # tokens sorted first; nearly always enough, and far cheaper than a whole sort


def shape_scores(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    eos: Collection[int],
    drafting: bool = False,
) -> Tensor:
    """Log-probabilities up to a constant, float64 ``[vocab]``, of the token after the output.

    Args:
        logits: ``[vocab]``.
        drafting: go through what the caller's processors have ``for_drafts`` instead of them.
    """
    scores = logits.to(torch.float64, copy=True)
    adjust(scores, params, prompt, output, eos, drafting)
    return warp(scores[None], [params])[0]


def adjust(
    scores: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    eos: Collection[int],
    drafting: bool = False,
) -> None:
    """What depends on a row's own text, in place on its ``scores`` ``[vocab]``."""
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    _penalise(scores, params, prompt, output)
    _forbid(scores, params, [*prompt, *output] if params.bad_words else (), eos)
    if len(output) < params.min_new_tokens:
        scores[list(eos)] = -torch.inf
    for process in params.logits_processors:
        chosen = getattr(process, "for_drafts", None) if drafting else process
        if chosen is not None:
            scores.copy_(chosen([*prompt, *output], scores))


def warp(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature and truncation of the rows that sample; rows of equal settings go together.

    Args:
        scores: float64 ``[rows, vocab]``, overwritten.
        params: of each row.
    """
    heat = [p.temperature if p.do_sample else 1.0 for p in params]
    if set(heat) != {1.0}:
        scores /= torch.tensor(heat, dtype=scores.dtype, device=scores.device)[:, None]
    alike: dict[tuple, list[int]] = defaultdict(list)
    for row, each in enumerate(params):
        if each.do_sample and (each.top_k, each.top_p, each.min_p) != (0, 1.0, 0.0):
            alike[each.top_k, each.top_p, each.min_p].append(row)
    for rows in alike.values():
        scores[rows] = truncate(scores[rows], params[rows[0]])
    return scores


def is_plain(params: SamplingParams, generated: int) -> bool:
    """Whether the token is the bare argmax of the logits (``generated`` tokens exist so far)."""
    return (
        not params.do_sample
        and not params.logit_bias
        and not params.bad_words
        and not params.logits_processors
        and generated >= params.min_new_tokens
        and params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
    )


def truncate(scores: Tensor, params: SamplingParams) -> Tensor:
    """``scores`` ``[..., vocab]`` with −inf outside top-k, top-p and min-p."""
    if 0 < params.top_k < scores.shape[-1]:
        least = scores.topk(params.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if params.top_p < 1.0:
        scores = _nucleus(scores, params.top_p)
    if params.min_p > 0.0:
        probs = scores.softmax(-1)
        low = probs < params.min_p * probs.amax(-1, keepdim=True)
        scores = scores.masked_fill(low, -torch.inf)
    return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keep the tokens before which less than ``top_p`` of the mass lies."""
    probs = scores.softmax(-1).reshape(-1, scores.shape[-1])
    keep, covered = _likeliest(probs, top_p, min(_NUCLEUS, probs.shape[-1]))
    if not covered.all():  # a row alone decides for itself, so that company changes nothing
        keep[~covered] = _likeliest(probs[~covered], top_p, probs.shape[-1])[0]
    return scores.masked_fill(~keep.view(scores.shape), -torch.inf)


def _likeliest(probs: Tensor, top_p: float, width: int) -> tuple[Tensor, Tensor]:
    """Which tokens to keep of ``probs`` ``[rows, vocab]``, and whether ``width`` were enough."""
    mass, order = probs.topk(width)
    before = mass.cumsum(-1) - mass
    keep = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before < top_p)
    return keep, before[:, -1] >= top_p


def _penalise(
    scores: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> None:
    """Repetition counts prompt and output (Hugging Face), the others the output only (OpenAI)."""
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *output}), device=scores.device)
        old, penalty = scores[seen], params.repetition_penalty
        scores[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(list(output), device=scores.device).unique(return_counts=True)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _forbid(
    scores: Tensor, params: SamplingParams, tokens: Sequence[int], eos: Collection[int]
) -> None:
    """−inf for the last token of every bad word that the row is about to complete.

    A bad word that is an end-of-sequence token alone is ignored, as in Hugging Face.
    """
    for word in params.bad_words:
        head, last = list(word[:-1]), word[-1]
        if head == list(tokens[len(tokens) - len(head) :]) and (head or last not in eos):
            scores[last] = -torch.inf
