"""Verification: which draft tokens stand, row by row.

A position is looked at only when every draft before it stands, so its context is the row's true
text: processors see what plain decoding would show them, once for each token. Greedy and `coupled`
rows compute the target's own token and compare; `rejection` weighs p against q. The
first token that differs from its draft (or the one after the last draft) ends the row's gain, and
so does the token that ends the row: nothing behind it is looked at.
The first position of all rows is decided together, then the second of those that still stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.decode.choosing import Place, choose, likeliest, noise_of, pick
from retort.decode.draft import Draft, row_key
from retort.decode.faults import contained
from retort.decode.processors import is_plain, warp
from retort.decode.request import Request
from retort.decode.sampling import judge, one_hot
from retort.decode.scoring import entries
from retort.decode.stopping import end_if_full, grow

RULES = ("coupled", "rejection")


def verify(
    requests: Sequence[Request], drafts: Sequence[Draft], logits: Tensor, rule: str = "coupled"
) -> list[list[int]]:
    """Tokens that each row gained; they are appended to it, and rows end where they do.

    Args:
        requests: the rows that decode in this pass.
        drafts: what the pass verified of each row.
        logits: ``[Σ (1 + len(draft)), vocab]`` in row order; for rows that are all `greedy`, their
            argmax, int64 ``[Σ (1 + len(draft))]``, is enough.
        rule: for sampled rows, "coupled" or "rejection", see `retort.decode.sampling`.

    A row whose processing fails keeps what it gained before and gets the finish reason "error".
    """
    best = (likeliest(logits) if logits.is_floating_point() else logits).tolist()
    rows = _line_up(requests, drafts)
    while standing := [row for row in rows if row.stands]:
        shaped = []
        for row in standing:
            if row.plain:
                row.take(best[row.at])
            else:
                shaped.append(row)
        if shaped:
            with contained(*(row.request for row in shaped)):
                _weigh(shaped, logits, rule)
    for row in rows:
        with contained(row.request):
            row.record_logprobs(logits)
    return [row.tokens for row in rows]


def greedy(request: Request) -> bool:
    """Whether nothing of the request's logits but their argmax will be looked at."""
    params = request.params
    scored = params.logprobs is not None or params.prompt_logprobs is not None
    return not scored and is_plain(params, request.generated)


class _Row:
    """One row's verification: what it gained so far, and the position that is looked at next."""

    def __init__(self, request: Request, draft: Draft, start: int) -> None:
        self.request, self.draft, self.start = request, draft, start
        self.tokens: list[int] = []
        self._agrees = True
        end_if_full(request)

    @property
    def stands(self) -> bool:
        """Whether there is another position to look at: all drafts before it stand."""
        return self._agrees and self.request.finish_reason is None

    @property
    def plain(self) -> bool:
        """Whether the position's token is the bare argmax of the logits."""
        return is_plain(self.request.params, self.request.generated)

    @property
    def at(self) -> int:
        """Where the logits of the position lie."""
        return self.start + len(self.tokens)

    @property
    def guess(self) -> int | None:
        """The draft's token; None after its last."""
        n = len(self.tokens)
        return self.draft.tokens[n] if n < len(self.draft) else None

    @property
    def place(self) -> Place:
        """The position's context: the row's true text."""
        row = self.request
        return Place(row.params, row.prompt, row.output, row.eos, row_key(row))

    @property
    def judged(self) -> bool:
        """Whether the position has a guess that `rejection` may accept."""
        return self.request.params.do_sample and self.guess is not None

    def take(self, token: int) -> None:
        """The position's token is decided, unless another row's criterion ended the row."""
        if not self.stands:
            return
        if token < 0:
            self.request.fail(ValueError("no token has a finite score"))
            return
        self._agrees = token == self.guess
        self.tokens.append(token)
        grow(self.request, token)

    def q(self, like: Tensor) -> Tensor:
        """The distribution ``[vocab]`` that the guess was drawn from."""
        if self.draft.probs is not None:
            return self.draft.probs[len(self.tokens)].to(like)
        return one_hot(torch.tensor([self.guess], device=like.device), like)

    def record_logprobs(self, logits: Tensor) -> None:
        """Log-probabilities of the tokens gained, where asked for."""
        wanted = self.request.params.logprobs
        if wanted is not None:
            self.request.logprobs += entries(logits[self.start :], self.tokens, wanted)


def _line_up(requests: Sequence[Request], drafts: Sequence[Draft]) -> list[_Row]:
    rows, start = [], 0
    for request, draft in zip(requests, drafts, strict=True):
        rows.append(_Row(request, draft, start))
        start += 1 + len(draft)
    return rows


def _weigh(rows: list[_Row], logits: Tensor, rule: str) -> None:
    """Decide one position of each row by its shaped scores; ``logits`` are of the whole pass."""
    scores = logits[[row.at for row in rows]].to(torch.float64)
    for row, each in zip(rows, scores, strict=True):
        with contained(row.request):
            row.place.adjust(each)
    kept = [i for i, row in enumerate(rows) if row.stands]
    scores, rows = pick(scores, kept), [rows[i] for i in kept]
    scores = warp(scores, [row.request.params for row in rows])
    for row, token in zip(rows, _tokens(rows, scores, rule), strict=True):
        row.take(token)


def _tokens(rows: Sequence[_Row], scores: Tensor, rule: str) -> list[int]:
    """The target's own token of each row; by `rejection` the guess where that is accepted."""
    places = [row.place for row in rows]
    judged = [i for i, row in enumerate(rows) if rule == "rejection" and row.judged]
    tokens = choose(scores, places) if len(judged) < len(rows) else [0] * len(rows)
    if judged:
        part = scores[judged]
        q = torch.stack([rows[i].q(part[0]) for i in judged])
        guesses = torch.tensor([[rows[i].guess] for i in judged], device=part.device)
        noise = noise_of([places[i] for i in judged], part.device)
        for i, token in zip(judged, judge(part, q, guesses, *noise).tolist(), strict=True):
            tokens[i] = token
    return tokens
