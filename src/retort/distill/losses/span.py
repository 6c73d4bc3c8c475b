"""Span-level correlation loss (MGSR, arXiv 2407.10068, section 3.3).

Within a span the predictions of neighbouring tokens belong together: for a pair (t, t+1) the
correlation is a = p_t ⊙ p_{t+1}, p_t being the prediction *of* token t, and the student's is
drawn towards the teacher's. With a top-k signal a is kept on the union S of both rows' ids and on
one rest class, (1 − Σ_S p_t)(1 − Σ_S p_{t+1}) [our choice]. Token chunks with recomputation (see
`chunked`) bound the memory of the dense form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retort.distill.losses.divergence import forward_kl
from retort.distill.losses.rows import TermSum, TokenRows
from retort.distill.signals import split
from retort.errors import ConfigurationError


def l2(teacher: Tensor, student: Tensor) -> Tensor:
    """‖a_T − a_S‖², the paper's distance; inputs are log a [P, C], the result is [P]."""
    return (teacher.exp() - student.exp()).square().sum(-1)


def sqrt_l1(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ |√a_T − √a_S| [ours]: √a sums to the overlap of the two predictions, so no entry of
    ordinary size vanishes as it does in the square of a product."""
    return ((teacher / 2).exp() - (student / 2).exp()).abs().sum(-1)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(a_T/Σa_T ‖ a_S/Σa_S) [ours]: compares the shape of the correlation, whatever its size."""
    return forward_kl(teacher.log_softmax(-1), student.log_softmax(-1))


SPAN_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": l2,
    "sqrt_l1": sqrt_l1,
    "kl": kl,
}


class SpanTerm:
    """The span loss as a term: its count is the number of pairs, not of tokens."""

    name = "span"

    def __init__(self, distance: str = "l2") -> None:
        if distance not in SPAN_DISTANCES:
            raise ConfigurationError(
                f"span_distance = {distance!r}: use one of {sorted(SPAN_DISTANCES)}."
            )
        self.distance = SPAN_DISTANCES[distance]

    def __call__(self, rows: TokenRows) -> TermSum:
        """Sums the distance over pairs (n, n + 1) marked in `rows.pairs`."""
        if rows.pairs is None:
            raise ConfigurationError("The span loss needs `pairs`: tag spans and pass pair_mask().")
        first = rows.pairs[:-1].nonzero().squeeze(1)  # the last row has no successor
        values = self.distance(*correlations(rows, first))
        return TermSum(values.sum(), torch.tensor(len(first), device=values.device))


def correlations(rows: TokenRows, first: Tensor) -> tuple[Tensor, Tensor]:
    """log a [P, C] of teacher and student for pairs (first, first + 1), first: int64 [P].

    C = W for a dense signal, 2K + 1 for a top-k signal (duplicate ids hold FLOOR).
    """
    if rows.support is None:
        teacher, student = (p[first] + p[first + 1] for p in (rows.teacher, rows.student))
        return teacher, student
    union = _union(rows.support[first], rows.support[first + 1])
    teacher, student = (_product(p, first, union) for p in (rows.teacher, rows.student))
    return teacher, student


def _product(log_probs: Tensor, first: Tensor, union: Tensor) -> Tensor:
    now, rest_now = split(log_probs[first], union)
    after, rest_after = split(log_probs[first + 1], union)
    return torch.cat([now + after, (rest_now + rest_after)[:, None]], 1)


def _union(left: Tensor, right: Tensor) -> Tensor:
    """Ids of both [P, K] as [P, 2K], every repeated id replaced by −1."""
    ids = torch.cat([left, right], 1).sort(1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return ids.masked_fill(repeated, -1)
