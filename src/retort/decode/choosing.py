"""The next tokens of many rows at once: each row shaped by its own text, all drawn together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.decode.params import SamplingParams
from retort.decode.processors import adjust, is_plain
from retort.decode.sampling import TOKEN, draw, wrap


@dataclass(frozen=True)
class Place:
    """Where a row's next token is chosen: after ``output``, with the noise of ``key``."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    eos: Collection[int]
    key: int

    @property
    def plain(self) -> bool:
        """Whether the token is the bare argmax of the logits."""
        return is_plain(self.params, len(self.output))

    def adjust(self, scores: Tensor, drafting: bool = False) -> None:
        """Shape float64 ``scores`` ``[vocab]`` by the row's own text, in place."""
        adjust(scores, self.params, self.prompt, self.output, self.eos, drafting)


def likeliest(scores: Tensor) -> Tensor:
    """Tokens ``[...]`` of the highest ``scores`` ``[..., vocab]``; −1 where none can be told."""
    tokens = torch.argmax(scores, -1)
    return decided(tokens, scores.gather(-1, tokens[..., None])[..., 0])


def decided(tokens: Tensor, highest: Tensor) -> Tensor:
    """``tokens``, but −1 where the highest score is −inf or, since NaN beats all numbers, NaN."""
    return tokens.masked_fill(~(highest > -torch.inf), -1)


def choose(scores: Tensor, places: Sequence[Place], stream: int = TOKEN) -> list[int]:
    """A token for each row of shaped ``scores`` ``[rows, vocab]``; −1 where there is none."""
    found = [0] * len(places)
    for sampled in (False, True):
        rows = [i for i, place in enumerate(places) if place.params.do_sample == sampled]
        if not rows:
            continue
        part = pick(scores, rows)
        keys = noise_of([places[i] for i in rows], scores.device)
        tokens = draw(part, *keys, stream) if sampled else likeliest(part)
        for i, token in zip(rows, tokens.tolist(), strict=True):
            found[i] = token
    return found


def noise_of(places: Sequence[Place], device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and generated indices of rows, int64 ``[rows, 1]`` each."""
    keys = [[wrap(place.key), len(place.output)] for place in places]
    key, index = torch.tensor(keys, device=device).split(1, dim=1)
    return key, index


def pick(scores: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of ``scores``, without a copy where they are all."""
    return scores if len(rows) == len(scores) else scores[list(rows)]
