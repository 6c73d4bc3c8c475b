"""Exposure bias: how much faster errors add up on a student's own text than on its teacher's.

Arora et al. 2022 (arXiv 2204.01171), section 3, with the teacher as the oracle p_o. With
KL_t = KL(p_o ‖ p_θ) at position t of a text:

    R(l) = Σ_{t ≤ l} E[KL_t | text written by the student]
    ε(l) = 1/l Σ_{t ≤ l} E[KL_t | text written by the oracle]
    ExAccErr(l) = (R(l) / ε(l) − l) / l · 100 %

0 % is a student whose own text does it no harm. A mean at t is taken over the texts that reach t
[our choice], and l is at most what both kinds of text reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retort.errors import ConfigurationError
from retort.evaluate.predictions import Example, predict


@dataclass(frozen=True)
class ExposureBias:
    """``excess`` in percent (NaN where the student errs nowhere: 0 / 0), R(l), ε(l) in nats, l."""

    excess: float
    accumulated: float
    per_step: float
    length: int


def exposure_bias(
    teacher: nn.Module,
    student: nn.Module,
    by_student: Sequence[Example],
    by_teacher: Sequence[Example],
    length: int | None = None,
    chunk_size: int = 128,
) -> ExposureBias:
    """Excess accumulated error from texts (prompt ids, completion ids) of both writers.

    For the definition's expectations both should be sampled at temperature 1; greedy texts measure
    greedy decoding. Raises ConfigurationError for no texts or an empty completion.
    """
    if not by_student or not by_teacher:
        raise ConfigurationError("exposure bias needs texts of the student and of the teacher")
    own, oracle = (
        [token_kl(teacher, student, e, chunk_size) for e in examples]
        for examples in (by_student, by_teacher)
    )
    return from_token_kl(own, oracle, length)


def from_token_kl(
    by_student: Sequence[Tensor], by_teacher: Sequence[Tensor], length: int | None = None
) -> ExposureBias:
    """The same from each text's `token_kl`."""
    own, oracle = (Divergences(rows).mean(range(len(rows))) for rows in (by_student, by_teacher))
    return excess_error(own, oracle, length)


def excess_error(own: Tensor, oracle: Tensor, length: int | None = None) -> ExposureBias:
    """The same from E[KL_t] at each position t of both kinds of text."""
    reach = min(len(own), len(oracle), length or len(own))
    accumulated, per_step = own[:reach].sum().item(), oracle[:reach].mean().item()
    excess = (accumulated / per_step - reach) / reach * 100 if per_step else math.nan
    return ExposureBias(excess, accumulated, per_step, reach)


class Divergences:
    """`token_kl` of many texts, of which any choice can be averaged at each position."""

    def __init__(self, rows: Sequence[Tensor | Sequence[float]]) -> None:
        longest = max(map(len, rows))
        self._values = torch.zeros(len(rows), longest, dtype=torch.float64)
        self._reached = torch.zeros_like(self._values)
        for i, row in enumerate(rows):
            self._values[i, : len(row)] = torch.as_tensor(row, dtype=torch.float64)
            self._reached[i, : len(row)] = 1

    def mean(self, chosen: Sequence[int]) -> Tensor:
        """E[KL_t] over the chosen texts that reach t, as long as the longest of them."""
        index = torch.tensor(list(chosen))
        reached = self._reached[index].sum(0)
        longest = int(reached.count_nonzero())
        return self._values[index].sum(0)[:longest] / reached[:longest]


@torch.no_grad()
def token_kl(
    teacher: nn.Module, student: nn.Module, example: Example, chunk_size: int = 128
) -> Tensor:
    """KL(teacher ‖ student) before each completion token, float64 ``[N]`` on the CPU."""
    prompt, completion = example
    ids = [*prompt, *completion]
    found = [predict(model, ids, len(prompt)).chunks(chunk_size) for model in (teacher, student)]
    parts = []
    for p, q in zip(*found, strict=True):
        width = min(p.shape[-1], q.shape[-1])
        p, q = (x[:, :width].cpu().double().log_softmax(-1) for x in (p, q))
        parts.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
    return torch.cat(parts)
