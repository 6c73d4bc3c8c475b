"""Verification: which draft tokens plain decoding would have produced, row by row.

Greedy and `coupled` sampling share one rule: the target's own token is computed at each position
as if the drafts before it were its text; a draft is accepted while it equals that token, and the
first token that differs (or the one after the last draft) is the target's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.decode.request import Request
from retort.decode.sampling import choose, is_plain
from retort.decode.scoring import entries


def verify(requests: Sequence[Request], drafts: Sequence[list[int]], logits: Tensor) -> list:
    """Tokens that each row gains.

    Args:
        requests: the rows that decode in this pass.
        drafts: the draft tokens of each row that the pass verified.
        logits: ``[Σ (1 + len(draft)), vocab]`` in row order.

    A row whose processing fails gains nothing and gets the finish reason "error".
    """
    best = torch.argmax(logits, -1).tolist()
    emitted, at = [], 0
    for request, draft in zip(requests, drafts, strict=True):
        end = at + len(draft) + 1
        emitted.append(_guarded(request, draft, logits[at:end], best[at:end]))
        at = end
    return emitted


def _guarded(request: Request, draft: list[int], logits: Tensor, best: list[int]) -> list[int]:
    """A fault in one row's processing ends that row alone."""
    try:
        return _verify_row(request, draft, logits, best)
    except Exception as error:
        request.finish_reason, request.error = "error", f"{type(error).__name__}: {error}"
        return []


def _verify_row(request: Request, draft: list[int], logits: Tensor, best: list[int]) -> list[int]:
    tokens: list[int] = []
    for i, guess in enumerate([*draft, None]):
        output = request.output + tokens
        token = (
            best[i]
            if is_plain(request.params, len(output))
            else choose(logits[i], request.params, request.prompt, output, set(request.eos))
        )
        tokens.append(token)
        if token != guess:
            break
    _record_logprobs(request, logits, tokens)
    return tokens


def _record_logprobs(request: Request, logits: Tensor, tokens: list[int]) -> None:
    if request.params.logprobs is not None:
        request.logprobs += entries(logits, tokens, request.params.logprobs)
