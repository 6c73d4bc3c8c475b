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
    own, oracle = _mean_kl(by_student), _mean_kl(by_teacher)
    reach = min(len(own), len(oracle), length or len(own))
    accumulated, per_step = own[:reach].sum().item(), oracle[:reach].mean().item()
    excess = (accumulated / per_step - reach) / reach * 100 if per_step else math.nan
    return ExposureBias(excess, accumulated, per_step, reach)


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


def _mean_kl(rows: Sequence[Tensor]) -> Tensor:
    """Mean at each position over the rows that reach it."""
    longest = max(map(len, rows))
    total, count = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest)
    for row in rows:
        total[: len(row)] += row
        count[: len(row)] += 1
    return total / count
