"""Does revision (SCRG) help? Revised texts against the student's own, paired by prompt.

Two differences, each with a bootstrap interval over prompts; below 0 the revised texts are better:
the mean −log p a token under the teacher, and excess accumulated error (see `exposure`) with the
revised texts in the place of the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retort.errors import ConfigurationError
from retort.evaluate.exposure import Divergences, excess_error, token_kl
from retort.evaluate.predictions import Example, predict
from retort.evaluate.significance import BootstrapResult, bootstrap, paired_bootstrap


@dataclass(frozen=True)
class RevisionGain:
    """``nll`` in nats a token and ``excess`` in percent, each revised − own; the values apart."""

    nll: BootstrapResult
    excess: BootstrapResult
    nll_own: float
    nll_revised: float
    excess_own: float
    excess_revised: float
    changed: int


def revision_gain(
    teacher: nn.Module,
    student: nn.Module,
    own: Sequence[Example],
    revised: Sequence[Example],
    by_teacher: Sequence[Example],
    samples: int = 2_000,
    seed: int = 0,
) -> RevisionGain:
    """Compare texts (prompt ids, completion ids) of the same prompts in the same order.

    Raises ConfigurationError for lists of unequal length, for none and for an empty completion.
    """
    if not len(own) == len(revised) == len(by_teacher):
        raise ConfigurationError(
            "texts of the same prompts are compared, got "
            f"{len(own)} own, {len(revised)} revised and {len(by_teacher)} of the teacher"
        )
    before, after = ([_nll(teacher, each) for each in texts] for texts in (own, revised))
    rows = [
        Divergences([token_kl(teacher, student, e) for e in texts])
        for texts in (own, revised, by_teacher)
    ]

    def excess(which: int, chosen: Sequence[int]) -> float:
        return excess_error(rows[which].mean(chosen), rows[2].mean(chosen)).excess

    every = range(len(own))
    return RevisionGain(
        nll=paired_bootstrap(before, after, samples, seed=seed),
        excess=bootstrap(lambda c: excess(1, c) - excess(0, c), len(own), samples, seed=seed),
        nll_own=sum(before) / len(own),
        nll_revised=sum(after) / len(own),
        excess_own=excess(0, every),
        excess_revised=excess(1, every),
        changed=sum(a[1] != b[1] for a, b in zip(own, revised, strict=True)),
    )


@torch.no_grad()
def _nll(teacher: nn.Module, example: Example, chunk_size: int = 128) -> float:
    """Mean −log p of a completion's tokens."""
    prompt, completion = example
    found = predict(teacher, [*prompt, *completion], len(prompt))
    pairs = zip(found.chunks(chunk_size), found.targets.split(chunk_size), strict=True)
    parts: list[Tensor] = [-x.double().log_softmax(-1).gather(1, y[:, None]) for x, y in pairs]
    return float(torch.cat(parts).mean())
