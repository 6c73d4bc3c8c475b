"""What the layers of one pass over Mamba rows share: where states and inputs come from and go."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.cache.mamba_anchors import EMPTY, Anchors
from retort.cache.pool import index
from retort.cache.rows import PackedRows
from retort.cache.tape import Tape
from retort.ops.segments import Piece, Span


class Places:
    """Tokens of the packed axis, ascending, and where in the storage each one goes."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens: list[int] = []
        self.places: list[tuple[int, ...]] = []
        self._width, self._device = width, device
        self._within: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def add(self, token: int, *place: int) -> None:
        """One more token; ``place`` has ``width`` numbers."""
        self.tokens.append(token)
        self.places.append(place)

    def within(self, piece: Piece | Span) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The tokens of a piece, numbered from 0, and their places; the same for all layers."""
        if piece.begin not in self._within:
            part = slice(bisect_left(self.tokens, piece.begin), bisect_left(self.tokens, piece.end))
            tokens = index(self.tokens[part], self._device)
            places = index(self.places[part], self._device).view(len(tokens), self._width)
            self._within[piece.begin] = (tokens - piece.begin, places.unbind(1))
        return self._within[piece.begin]


@dataclass(frozen=True)
class MambaPassPlan:
    """What the layers of one pass share; tokens are numbered along the packed axis.

    Attributes:
        anchors: of each row when the pass has ended, length → slot.
        fresh: slots that this pass fills.
        resumed: rows of the layout that have a state, and its slot; ascending.
        history: pages and offsets of the K−1 inputs before each row ``[R, K−1]``, and which
            exist, None where all do.
        kept: tokens whose states are kept, and their slots.
        taped: tokens for the tape, and their pages and offsets.
    """

    anchors: dict[int, dict[int, int]]
    fresh: list[int]
    resumed: tuple[list[int], Tensor]
    history: tuple[Tensor, Tensor, Tensor | None]
    kept: Places
    taped: Places

    @classmethod
    def of(
        cls, layout: PackedRows, anchors: Anchors, tape: Tape, page: int, kernel: int
    ) -> MambaPassPlan:
        """Plan for a layout with at least one row; slots and pages that it needs are reserved.

        Args:
            layout: the pass.
            anchors, tape: of all rows; every row has a state at its start.
            page: tokens in a page of the tape.
            kernel: K.
        """
        planned: dict[int, dict[int, int]] = {}
        device = tape.keys.device
        kept, taped = Places(1, device), Places(2, device)
        parts = zip(layout.rows, layout.starts, layout.counts, layout.offsets[:-1], strict=True)
        for row, start, count, offset in parts:
            planned[row] = anchors.after(row, start, start + count)
            for place in sorted(end for end in planned[row] if end > start):
                kept.add(offset + place - start - 1, planned[row][place])
            for place in range(max(start, first_taped(planned[row], kernel)), start + count):
                number = tape.reserve(row, place // page)
                taped.add(offset + place - start, number, place % page)
        starts = zip(layout.rows, layout.starts, strict=True)
        heads = [anchors.slots[row][start] for row, start in starts]
        resumed = [i for i, slot in enumerate(heads) if slot != EMPTY]
        return cls(
            anchors=planned,
            fresh=[place[0] for place in kept.places],
            resumed=(resumed, index([heads[i] for i in resumed], device)),
            history=_history(layout, tape, page, kernel - 1),
            kept=kept,
            taped=taped,
        )


def first_taped(anchors: dict[int, int], kernel: int) -> int:
    """The first token of a row that a replay from its oldest anchor reads."""
    return max(0, min(anchors) - kernel + 1)


def _history(
    layout: PackedRows, tape: Tape, page: int, width: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    device = tape.keys.device
    spans = [range(start - width, start) for start in layout.starts]
    places = index([place for span in spans for place in span], device)
    places = places.view(len(spans), width)
    pages = [
        (tape.find(row, place // page) or 0) if place >= 0 else 0
        for row, span in zip(layout.rows, spans, strict=True)
        for place in span
    ]
    young = min(layout.starts) < width
    valid = (places >= 0).unsqueeze(-1) if young else None
    return index(pages, device).view_as(places), places % page, valid
