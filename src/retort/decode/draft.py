"""What a drafter is told about a row, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from retort.decode.params import SamplingParams
from retort.decode.request import Request
from retort.decode.sampling import stream_key


@dataclass(frozen=True)
class DraftContext:
    """One row that may be drafted for. A drafter needs no more than the first three fields.

    Attributes:
        request_id: the same at every call for one request.
        tokens: all tokens of the row.
        limit: the longest useful draft.
        prompt_length: how many of the tokens are the prompt.
        params: how the target's tokens are chosen, for drafters that choose in the same way.
        eos: the row's end-of-sequence ids.
        key: the row's noise, see `retort.decode.sampling`.
        coupled: draw with the noise that the target will use; otherwise (`rejection`) with noise
            of the drafter's own, and tell q.
    """

    request_id: str
    tokens: Sequence[int]
    limit: int
    prompt_length: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    eos: frozenset[int] = frozenset()
    key: int = 0
    coupled: bool = True

    @classmethod
    def of(cls, row: Request, limit: int, coupled: bool) -> DraftContext:
        """What there is to tell about a request; the tokens are a copy, which may be written on."""
        tokens, prompt = list(row.tokens), len(row.prompt)
        return cls(row.id, tokens, limit, prompt, row.params, row.eos, row_key(row), coupled)


@dataclass(frozen=True)
class Draft:
    """Proposed tokens.

    Attributes:
        tokens: the next tokens of the row.
        probs: q, ``[len(tokens), vocab]``: the very distributions that the tokens were drawn from.
            None where they were given and not drawn (prompt lookup): q is one-hot.
        match: how many tokens at the row's end a copied draft prolongs; 0 where none was copied.
            The budget gives longer drafts to longer matches.
    """

    tokens: list[int] = field(default_factory=list)
    probs: Tensor | None = None
    match: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Draft:
        """Its first ``length`` tokens."""
        probs = None if self.probs is None else self.probs[:length]
        return Draft(self.tokens[:length], probs, self.match)


def as_draft(proposed: Draft | Sequence[int]) -> Draft:
    """A drafter may answer with bare tokens."""
    return proposed if isinstance(proposed, Draft) else Draft(list(proposed))


def row_key(row: Request) -> int:
    """The key of a request's noise."""
    return stream_key(row.params.seed, row.sample, row.round)
