"""Loss terms from hidden states, a chunk of tokens at a time.

The logits of N tokens over V ids are the largest tensors of distillation, and there are several
of each model. Here the head runs on `chunk_size` rows at a time and everything after it is
recomputed in the backward pass (`fused`, or torch.utils.checkpoint where the head is more than a
linear layer), so that [N, V] never exists for either
model. Values and gradients are those of one chunk of N rows up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retort.distill.losses.fused import fits, fused_sums
from retort.distill.losses.rows import IGNORED, Term, TermSum, TokenRows
from retort.distill.signals import Head, SignalSource, at_least_float32
from retort.errors import ConfigurationError


class SftTerm:
    """Cross-entropy with the target over the student's whole vocabulary, at temperature 1."""

    name = "sft"

    def __call__(self, rows: TokenRows) -> TermSum:
        """Sums −log q(target) over counted rows."""
        logits = at_least_float32(rows.student_logits)
        total = F.cross_entropy(logits, rows.targets, ignore_index=IGNORED, reduction="sum")
        return TermSum(total, rows.counted.sum())


def chunked_loss(
    student_hidden: Tensor,
    student_head: Head,
    targets: Tensor,
    terms: Sequence[Term],
    *,
    signal: SignalSource | None = None,
    pairs: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = 256,
) -> dict[str, TermSum]:
    """Every term's sum and count over N rows, by name.

    student_hidden: [N, D], what the student's head reads (after the final norm); student_head:
    the head itself, called on [n, D]. targets: int64 [N], IGNORED for rows that do not count.
    signal: the teacher's, N rows (`HeadSignal` for a live teacher). pairs: bool [N] for the span
    loss; a pair that crosses a chunk's end is kept, by one row of overlap. chunk_size None holds
    everything at once. Gradients reach student_hidden, the head's and the terms' parameters; call
    backward before changing them or a term's state. Raises ConfigurationError when lengths differ.
    """
    inputs = _Inputs(student_hidden, student_head, targets, signal, pairs, temperature)
    inputs.check()
    size = chunk_size or max(len(targets), 1)
    starts = range(0, max(len(targets), 1), size)
    if chunk_size is not None and torch.is_grad_enabled() and fits(student_head):
        return _fused(inputs, terms, starts, size)
    sums: dict[str, TermSum] = {}
    for start in starts:
        part = _chunk_sums(inputs, terms, start, size, recompute=chunk_size is not None)
        sums = {name: sums[name] + part[name] if sums else part[name] for name in part}
    return sums


@dataclass
class _Inputs:
    hidden: Tensor
    head: Head
    targets: Tensor
    signal: SignalSource | None
    pairs: Tensor | None
    temperature: float

    def check(self) -> None:
        lengths = {"hidden states": len(self.hidden), "targets": len(self.targets)}
        lengths |= {} if self.signal is None else {"the signal": len(self.signal)}
        lengths |= {} if self.pairs is None else {"pairs": len(self.pairs)}
        if len(set(lengths.values())) > 1:
            raise ConfigurationError(f"Numbers of rows differ: {lengths}.")

    def rows(self, logits: Tensor, start: int, size: int) -> TokenRows:
        """Rows start … start + size − 1; one more row, which pairs may need, counts nowhere."""
        stop = start + len(logits)
        own = torch.arange(start, stop, device=logits.device) < start + size
        return TokenRows(
            student_logits=logits,
            targets=self.targets[start:stop].where(own, IGNORED),
            signal=None if self.signal is None else self.signal.rows(start, stop),
            pairs=None if self.pairs is None else self.pairs[start:stop] & own,
            temperature=self.temperature,
        )


def _fused(
    inputs: _Inputs, terms: Sequence[Term], starts: Sequence[int], size: int
) -> dict[str, TermSum]:
    """The same sums where the head is a plain linear layer, see `fused`."""
    extra, last = int(inputs.pairs is not None), len(inputs.targets)
    chunks = [(start, min(start + size + extra, last)) for start in starts]

    def compute(logits: Tensor, number: int) -> dict[str, TermSum]:
        rows = inputs.rows(logits, starts[number], size)
        return {term.name: term(rows) for term in terms}

    head = cast("nn.Linear", inputs.head)
    return fused_sums(inputs.hidden, head, chunks, compute, terms)


def _chunk_sums(
    inputs: _Inputs, terms: Sequence[Term], start: int, size: int, recompute: bool
) -> dict[str, TermSum]:
    def compute(hidden: Tensor) -> dict[str, TermSum]:
        rows = inputs.rows(inputs.head(hidden), start, size)
        return {term.name: term(rows) for term in terms}

    hidden = inputs.hidden[start : start + size + (inputs.pairs is not None)]
    if not (recompute and torch.is_grad_enabled()):
        return compute(hidden)
    # Nothing here draws random numbers, so their state need not be saved for the second run.
    result: dict[str, TermSum] = checkpoint(
        compute, hidden, use_reentrant=False, preserve_rng_state=False
    )
    return result
