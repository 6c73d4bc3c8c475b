"""Log-probabilities of tokens, of the raw logits: for generated text and for prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.decode.faults import contained
from retort.decode.request import Request
from retort.decode.scheduler import Plan, Prefill

Entry = dict[int, float]


def entries(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[Entry]:
    """For each token ``{token id: log-probability}`` with the best alternatives after it.

    Args:
        logits: ``[n, vocab]``, n at least the number of tokens.
        alternatives: how many of the most likely tokens to add.
    """
    found: list[Entry] = []
    for row, token in zip(logits, tokens, strict=False):
        scores = row.double().log_softmax(-1)
        top = scores.topk(min(alternatives, len(scores)))
        entry = {token: float(scores[token])}
        found.append(entry | dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
    return found


def wanted(prefill: Prefill) -> int:
    """How many of a prompt slice's logits the pass must keep."""
    if prefill.request.params.prompt_logprobs is not None:
        return len(prefill.tokens)
    return int(prefill.last)


def score_prompts(plan: Plan, keep: Sequence[int], logits: Tensor) -> Tensor:
    """Record prompt tokens' log-probabilities where asked for; return the rows to verify.

    Args:
        plan: a pass whose rows have not moved on yet (``fed`` is the start of the slice).
        keep: logits kept of each prompt slice, then of each decoding row.
        logits: ``[Σ keep, vocab]``.
    """
    if all(p.request.params.prompt_logprobs is None for p in plan.prefills):
        return logits
    parts = list(logits.split(list(keep)))
    for i, prefill in enumerate(plan.prefills):
        if prefill.request.params.prompt_logprobs is not None:
            with contained(prefill.request):
                _record(prefill.request, parts[i])
            parts[i] = parts[i][len(parts[i]) - int(prefill.last) :]
    return torch.cat(parts)


def _record(request: Request, logits: Tensor) -> None:
    following = request.prompt[request.fed + 1 : request.fed + 1 + len(logits)]
    found = entries(logits, following, request.params.prompt_logprobs or 0)
    request.prompt_logprobs[request.fed : request.fed + len(found)] = found  # may be read again
