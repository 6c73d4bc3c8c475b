"""Divergences between a teacher p and a student q, a number a row.

Each function takes log-probabilities `teacher` and `student` [N, C] over the same C outcomes
(the vocabulary, or the K ids of a top-k signal and its tail as one more outcome) and returns
[N], in nats. `DIVERGENCES` maps the name used in a configuration to the function; its keyword
parameters are the configuration's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from retort.distill.losses.rows import TermSum, TokenRows
from retort.distill.signals import split
from retort.errors import ConfigurationError

Divergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) (Hinton et al. 2015): covers every mode of the teacher."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(q ‖ p) (MiniLLM, arXiv 2306.08543): seeks the teacher's main modes."""
    return forward_kl(student, teacher)


def jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence (GKD, arXiv 2306.13649, eq. 1), TRL's convention.

    β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q; by definition forward KL at
    β = 0 and reverse KL at β = 1, the limits of the formula divided by β and by 1 − β.
    """
    _check_unit("beta", beta)
    if beta in (0.0, 1.0):
        return reverse_kl(teacher, student) if beta else forward_kl(teacher, student)
    mixture = _mix(teacher, student, beta)
    return beta * forward_kl(teacher, mixture) + (1 - beta) * forward_kl(student, mixture)


def skew_forward_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p ‖ α p + (1 − α) q) (DistiLLM, arXiv 2402.03898, section 3.1); 0.1 is the paper's."""
    _check_unit("alpha", alpha)
    return forward_kl(teacher, _mix(teacher, student, alpha))


def skew_reverse_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q ‖ α q + (1 − α) p) (DistiLLM, arXiv 2402.03898, section 3.1)."""
    _check_unit("alpha", alpha)
    return forward_kl(student, _mix(student, teacher, alpha))


def alpha_beta(teacher: Tensor, student: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """α-β divergence (ABKD, arXiv 2505.04560; Cichocki et al. 2011).

    −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)], continued where α or β is 0:
    (1, 0) is forward KL and (0, 1) reverse KL. Raises ConfigurationError for negative parameters
    (powers of vanishing probabilities overflow) and for α = β = 0.
    """
    if min(alpha, beta) < 0 or alpha + beta == 0:
        raise ConfigurationError(
            f"alpha = {alpha} and beta = {beta}: the α-β divergence needs both ≥ 0, one > 0."
        )
    if alpha == 0:
        return _one_sided(student, teacher, beta)
    if beta == 0:
        return _one_sided(teacher, student, alpha)
    both = (alpha * teacher + beta * student).exp()
    own = alpha * ((alpha + beta) * teacher).exp() + beta * ((alpha + beta) * student).exp()
    return -(both - own / (alpha + beta)).sum(-1) / (alpha * beta)


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """½ Σ |p − q| (f-DISTILL, arXiv 2307.15190); 1 − this is a draft token's acceptance."""
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "alpha_beta": alpha_beta,
    "total_variation": total_variation,
}


def divergence(name: str, **parameters: float) -> Divergence:
    """The named divergence with its parameters bound; they are checked now, not in training.

    Raises ConfigurationError for an unknown name, an unknown parameter or a value out of range.
    """
    if name not in DIVERGENCES:
        raise ConfigurationError(f"Unknown divergence {name!r}: use one of {sorted(DIVERGENCES)}.")
    known = list(inspect.signature(DIVERGENCES[name]).parameters)[2:]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        takes = ", ".join(known) or "none"
        raise ConfigurationError(f"{name} has no parameter {unknown[0]!r} (it takes: {takes}).")
    bound = partial(DIVERGENCES[name], **parameters)
    bound(torch.zeros(1, 1), torch.zeros(1, 1))
    return bound


class DivergenceTerm:
    """A divergence per token as a term, over the vocabulary or over a signal's K ids and tail."""

    def __init__(self, divergence: Divergence, name: str = "kd") -> None:
        self.name = name
        self.divergence = divergence

    def __call__(self, rows: TokenRows) -> TermSum:
        """Sums the divergence over counted rows."""
        values = self.divergence(*outcomes(rows))
        return TermSum((values * rows.counted).sum(), rows.counted.sum())


class AcceptanceMetric:
    """α = Σ min(p, q), the chance that speculative sampling accepts the student's token.

    A metric, not a loss: `total` carries no gradient, and the models are compared as they decode,
    at temperature 1. Leviathan et al. 2023 (arXiv 2211.17192), definition 3.1 and theorem 3.5.
    """

    name = "acceptance"

    def __call__(self, rows: TokenRows) -> TermSum:
        """Sums the acceptance probability over counted rows."""
        plain = rows if rows.temperature == 1.0 else replace(rows, temperature=1.0)
        with torch.no_grad():
            values = 1 - total_variation(*outcomes(plain))
            return TermSum((values * rows.counted).sum(), rows.counted.sum())


def outcomes(rows: TokenRows) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities [N, C]: C = W, or K + 1 for a top-k signal."""
    if rows.support is None:
        return rows.teacher, rows.student
    pair = (split(log_probs, rows.support) for log_probs in (rows.teacher, rows.student))
    teacher, student = (torch.cat([kept, rest[:, None]], 1) for kept, rest in pair)
    return teacher, student


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share · exp(first) + (1 − share) · exp(second))."""
    if share in (0.0, 1.0):
        return first if share else second
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _one_sided(first: Tensor, second: Tensor, power: float) -> Tensor:
    """The α-β divergence where the other exponent is 0: KL of `power`-th powers, unnormalised."""
    first, second = power * first, power * second
    raw = first.exp() * (first - second) - first.exp() + second.exp()
    return raw.sum(-1) / power**2


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigurationError(f"{name} = {value} is outside [0, 1].")
