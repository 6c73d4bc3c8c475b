"""Which token is where: the clock of every sequence in a rectangular batch.

Padding may stand anywhere and several sequences may share one row; neither costs a sequence a
position or any decay, because all sums run over the *real* tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Clock:
    """Per-token clock of a batch ``[B, T]``.

    Attributes:
        real: bool ``[B, T]``, False at padding.
        sequence: int64 ``[B, T]``, which sequence of its row a token belongs to.
        seen: int64 ``[B, T]``, real tokens of that sequence up to and including this one;
            a real token's position is ``seen - 1``.
        uniform: every row is one sequence without padding, so one row's clock serves all.
    """

    real: Tensor
    sequence: Tensor
    seen: Tensor
    uniform: bool = False

    @property
    def positions(self) -> Tensor:
        """Number of real tokens of the sequence before each token, int64 ``[B, T]``."""
        return (self.seen - 1).clamp_min(0)

    @classmethod
    def of(
        cls,
        real: Tensor | None,
        starts: Tensor | None,
        shape: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> Clock:
        """Clock of a batch of ``shape`` ``[B, T]``.

        Args:
            real: bool ``[B, T]``, or None where every token is real.
            starts: bool, broadcast to ``[B, T]``, the first token of each packed sequence; None
                where a row is one sequence.
            shape: ``[B, T]``.
            device: where the clock lives.
        """
        if real is not None and bool(real.all()):
            real = None
        if starts is not None and real is None and not bool(starts[:, 1:].any()):
            starts = None
        uniform = real is None and starts is None
        mask = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real
        count = mask.long().cumsum(1)
        if starts is None:
            return cls(mask, torch.zeros_like(count), count, uniform)
        first = starts.to(device).expand(shape) & mask
        before = torch.where(first, count - 1, 0).cummax(1).values
        return cls(mask, first.long().cumsum(1), count - before, False)

    def chunks(self, size: int) -> Clock:
        """The clock cut into chunks, ``[B, C, size]``; the tail counts as padding.

        A uniform clock stays one chunk ``[1, 1, size]`` that counts from its own start, since
        only differences inside a chunk matter.
        """
        if self.uniform:
            count = torch.arange(1, size + 1, device=self.seen.device).view(1, 1, size)
            return Clock(torch.ones_like(count, dtype=torch.bool), torch.zeros_like(count), count)
        tail = -self.seen.shape[1] % size
        cut = (len(self.seen), -1, size)
        sequence, seen = (
            torch.cat([t, t[:, -1:].expand(-1, tail)], 1).view(cut)
            for t in (self.sequence, self.seen)
        )
        return Clock(F.pad(self.real, (0, tail)).view(cut), sequence, seen)
