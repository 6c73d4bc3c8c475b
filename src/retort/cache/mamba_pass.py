"""What the layers of one pass over Mamba rows share: where states and inputs come from and go."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

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
            tokens = torch.tensor(self.tokens[part], dtype=torch.long, device=self._device)
            places = torch.tensor(self.places[part], dtype=torch.long, device=self._device)
            places = places.view(len(tokens), self._width)
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
