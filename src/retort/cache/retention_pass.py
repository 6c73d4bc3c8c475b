"""What the layers of one pass over retention rows share; made whole by the arithmetic that runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from retort.cache.retention_waves import Waves
from retort.cache.rows import PackedRows
from retort.cache.tape import Tape
from retort.cache.taped import TapeKind
from retort.cache.waves import WavePlan
from retort.ops.native.retention import RetentionRows
from retort.ops.retention import BlockDecay

Written = tuple[Tensor, Tensor, Tensor]
"""Tokens for the tape, their pages and offsets."""


@dataclass
class RetentionPass:
    """One pass.

    Attributes:
        layout: its rows.
        tape, decay, block: the cache's tape, decays and L.
        anchors: of each row when the pass ends.
        written: what joins the tape.
        moved: layer, rows and states of the anchors that moved.
    """

    layout: PackedRows
    tape: Tape
    decay: BlockDecay
    block: int
    anchors: dict[int, int]
    written: Written
    moved: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        layout: PackedRows,
        tape: Tape,
        decay: BlockDecay,
        block: int,
        kind: TapeKind,
        max_draft: int,
    ) -> RetentionPass:
        """Plan for a layout with at least one row; the pages that it needs are reserved."""
        slack = max(1, max_draft)
        anchors = {
            row: max(start, start + count - slack) // block
            for row, start, count in zip(layout.rows, layout.starts, layout.counts, strict=True)
        }
        oldest = {row: 0 if kind == "completion" else (b - 1) * block for row, b in anchors.items()}
        return cls(layout, tape, decay, block, anchors, _written(layout, tape, block, oldest))

    @cached_property
    def waves(self) -> Waves:
        """The pass for the arithmetic in PyTorch."""
        layout = self.layout
        anchors = [self.anchors[row] for row in layout.rows]
        plan = WavePlan.of(layout, anchors, self.block, self.tape.keys.device)
        slots = min(self.block, 8 if plan.longest_piece <= 8 else self.block)
        segment, offset = plan.place
        query_place = (segment, offset % slots)
        offsets = offset.new_zeros(plan.segments, slots).index_put(query_place, offset)
        young = [span.first < 2 for span in plan.spans]
        return Waves(
            plan=plan,
            slots=slots,
            query_place=query_place,
            decay=self.decay.at(offsets),
            before=self._pages([(span.row, span.first - 1) for span in plan.spans]),
            current=self._pages([(span.row, span.first) for span in plan.spans]),
            has_state=~self.tape.index(young).bool().view(-1, 1, 1, 1) if any(young) else None,
        )

    def _pages(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        pages = [self.tape.find(row, block) for row, block in places]
        exist = [page is not None for page in pages]
        mask = None if all(exist) else self.tape.index(exist).bool().view(-1, 1, 1, 1)
        return self.tape.index([page or 0 for page in pages]), mask

    @cached_property
    def native(self) -> RetentionRows:
        """The pass for the native core."""
        layout, length = self.layout, self.block
        firsts = [start // length for start in layout.starts]
        blocks = [self.anchors[row] for row in layout.rows]
        movers = [i for i, first in enumerate(firsts) if blocks[i] > first]
        places = list(zip(layout.rows, firsts, strict=True))

        def page(row: int, block: int) -> int:
            found = self.tape.find(row, block)
            return -1 if found is None else found

        return RetentionRows(
            starts=layout.starts,
            counts=layout.counts,
            states=tuple(row if first >= 2 else -1 for row, first in places),
            before=tuple(page(row, first - 1) for row, first in places),
            current=tuple(page(row, first) for row, first in places),
            moved=tuple(movers.index(i) if i in movers else -1 for i in range(len(firsts))),
            moved_blocks=tuple(blocks),
        )

    @property
    def movers(self) -> list[int]:
        """Rows whose anchor the native core moves."""
        rows = zip(self.layout.rows, self.native.moved, strict=True)
        return [row for row, at in rows if at >= 0]


def _written(layout: PackedRows, tape: Tape, block: int, oldest: dict[int, int]) -> Written:
    """Every row's tokens from its ``oldest`` on; their pages are reserved."""
    tokens: list[int] = []
    places: list[tuple[int, int]] = []
    parts = zip(layout.rows, layout.starts, layout.counts, layout.offsets[:-1], strict=True)
    for row, start, count, offset in parts:
        first, end = max(start, oldest[row]), start + count
        tokens += range(offset + first - start, offset + count)
        blocks = range(first // block, (end - 1) // block + 1)
        pages = {b: tape.reserve(row, b) for b in blocks}
        places += [(pages[p // block], p % block) for p in range(first, end)]
    pages_of, offsets = tape.index(places).view(-1, 2).unbind(1)
    return tape.index(tokens), pages_of, offsets
