"""Verification: which draft tokens stand, row by row.

A position is looked at only when every draft before it stands, so its context is the row's true
text: processors see what plain decoding would show them, once for each token. Greedy and `coupled`
rows compute the target's own token and compare; `rejection` weighs p against q. Either way the
first token that differs from its draft (or the one after the last draft) ends the row's gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.decode.draft import Draft, row_key
from retort.decode.processors import is_plain, shape_scores
from retort.decode.request import Request
from retort.decode.sampling import draw, judge, one_hot
from retort.decode.scoring import entries

RULES = ("coupled", "rejection")


def verify(
    requests: Sequence[Request], drafts: Sequence[Draft], logits: Tensor, rule: str = "coupled"
) -> list[list[int]]:
    """Tokens that each row gains.

    Args:
        requests: the rows that decode in this pass.
        drafts: what the pass verified of each row.
        logits: ``[Σ (1 + len(draft)), vocab]`` in row order; for rows that are all `greedy`, their
            argmax, int64 ``[Σ (1 + len(draft))]``, is enough.
        rule: for sampled rows, "coupled" or "rejection", see `retort.decode.sampling`.

    A row whose processing fails gains nothing and gets the finish reason "error".
    """
    best = (torch.argmax(logits, -1) if logits.is_floating_point() else logits).tolist()
    emitted, at = [], 0
    for request, draft in zip(requests, drafts, strict=True):
        end = at + len(draft) + 1
        emitted.append(_guarded(request, draft, logits[at:end], best[at:end], rule))
        at = end
    return emitted


def greedy(request: Request) -> bool:
    """Whether nothing of the request's logits but their argmax will be looked at."""
    params = request.params
    scored = params.logprobs is not None or params.prompt_logprobs is not None
    return not scored and is_plain(params, len(request.output))


def _guarded(
    request: Request, draft: Draft, logits: Tensor, best: list[int], rule: str
) -> list[int]:
    """A fault in one row's processing ends that row alone."""
    try:
        return _verify_row(request, draft, logits, best, rule)
    except Exception as error:
        request.finish_reason, request.error = "error", f"{type(error).__name__}: {error}"
        return []


def _verify_row(
    request: Request, draft: Draft, logits: Tensor, best: list[int], rule: str
) -> list[int]:
    tokens: list[int] = []
    for i, guess in enumerate([*draft.tokens, None]):
        output = request.output + tokens
        if is_plain(request.params, len(output)):
            token = best[i]
        else:
            scores = shape_scores(logits[i], request.params, request.prompt, output, request.eos)
            token = _token(request, scores, len(output), draft, i, rule)
        tokens.append(token)
        if token != guess:
            break
    _record_logprobs(request, logits, tokens)
    return tokens


def _token(
    request: Request, scores: Tensor, index: int, draft: Draft, place: int, rule: str
) -> int:
    """The row's token at one position; ``scores`` is ``[vocab]``."""
    if not request.params.do_sample:
        return int(torch.argmax(scores))
    if rule == "coupled" or place == len(draft):
        return int(draw(scores, row_key(request), index))
    guess = torch.tensor([draft.tokens[place]], device=scores.device)
    q = one_hot(guess, scores) if draft.probs is None else draft.probs[place].to(scores)
    return int(judge(scores, q, guess, row_key(request), index))


def _record_logprobs(request: Request, logits: Tensor, tokens: list[int]) -> None:
    if request.params.logprobs is not None:
        request.logprobs += entries(logits, tokens, request.params.logprobs)
