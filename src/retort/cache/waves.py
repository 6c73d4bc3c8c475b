"""A packed pass cut into blocks: wave d holds the d-th block of every row that reaches it.

A *segment* is the part of one row's new tokens in one block of L positions. Wave 0 continues
from the cache; wave d continues from wave d−1. A decoding step is one wave (two where a row
crosses a block), a prefill of T tokens is T/L waves, for all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retort.cache.rows import PackedRows


@dataclass(frozen=True, order=True)
class RowSpan:
    """One row of a pass: its blocks first..last, and where its anchor will be after the pass."""

    row: int
    start: int
    count: int
    block: int
    anchor: int

    @property
    def first(self) -> int:
        """Block of the first new token."""
        return self.start // self.block

    @property
    def last(self) -> int:
        """Block of the last new token."""
        return (self.start + self.count - 1) // self.block

    @property
    def pieces(self) -> list[int]:
        """New tokens in each block."""
        end = self.start + self.count
        cuts = [self.start, *range((self.first + 1) * self.block, end, self.block)]
        ends = [*cuts[1:], end]
        return [end - cut for cut, end in zip(cuts, ends, strict=True)]


@dataclass(frozen=True)
class Wave:
    """The d-th block of the rows that reach it.

    Attributes:
        segments: its part of the segments.
        carry: places in the wave before of the rows that go on; None where all do.
        kept: places of the rows whose anchor this wave's state becomes.
        kept_rows: those rows.
    """

    segments: slice
    carry: Tensor | None
    kept: Tensor
    kept_rows: Tensor


@dataclass(frozen=True)
class WavePlan:
    """Everything that the layers of one pass share.

    Attributes:
        spans: the rows in the order of wave 0, ascending.
        waves: the waves.
        place: segment and offset of each packed token, two int64 ``[total]``.
        rows: rows of wave 0, a slice where they are neighbours.
        longest_piece: the most new tokens in one segment.
    """

    spans: tuple[RowSpan, ...]
    waves: tuple[Wave, ...]
    place: tuple[Tensor, Tensor]
    rows: slice | Tensor
    longest_piece: int

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self.waves[-1].segments.stop

    @classmethod
    def of(
        cls, layout: PackedRows, anchors: list[int], block: int, device: torch.device
    ) -> WavePlan:
        """Plan for a layout with at least one row.

        Args:
            layout: the pass.
            anchors: for each row of the layout, its anchor block after the pass.
            block: L.
            device: where the indices live.
        """
        parts = zip(layout.rows, layout.starts, layout.counts, anchors, strict=True)
        spans = [RowSpan(row, start, count, block, anchor) for row, start, count, anchor in parts]
        ordered = tuple(sorted(spans))
        waves, number = _waves(ordered, device)
        pieces = [(number[s.row, d], n) for s in spans for d, n in enumerate(s.pieces)]
        segments, lengths = torch.tensor(pieces).T
        segment = segments.repeat_interleave(lengths).to(device)
        offset = layout.position_ids(device)[0] % block
        rows = [span.row for span in ordered]
        longest = max(n for _, n in pieces)
        return cls(ordered, waves, (segment, offset), _places(rows, device), longest)

    def members(self) -> list[tuple[int, int]]:
        """(row, block) of every segment."""
        depth = range(max(span.last - span.first for span in self.spans) + 1)
        return [(s.row, s.first + d) for d in depth for s in self.spans if s.first + d <= s.last]


def _waves(
    spans: tuple[RowSpan, ...], device: torch.device
) -> tuple[tuple[Wave, ...], dict[tuple[int, int], int]]:
    """The waves, and the number of each segment by (row, depth)."""
    waves: list[Wave] = []
    number: dict[tuple[int, int], int] = {}
    before = list(spans)
    while members := [span for span in before if span.last - span.first >= len(waves)]:
        start, depth = len(number), len(waves)
        number |= {(span.row, depth): start + i for i, span in enumerate(members)}
        carry = [i for i, span in enumerate(before) if span.last - span.first >= depth]
        kept = [i for i, span in enumerate(members) if depth and span.anchor - span.first == depth]
        waves.append(
            Wave(
                slice(start, len(number)),
                None if len(carry) == len(before) else torch.tensor(carry, device=device),
                torch.tensor(kept, dtype=torch.long, device=device),
                torch.tensor([members[i].row for i in kept], dtype=torch.long, device=device),
            )
        )
        before = members
    return tuple(waves), number


def _places(rows: list[int], device: torch.device) -> slice | Tensor:
    """A slice where ascending ``rows`` are neighbours, so that reading them copies nothing."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
