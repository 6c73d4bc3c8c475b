"""States between the anchors of Mamba rows: the tape replayed from the nearest one before.

The same operations in the order of tokens give the same bits, and run no model forward. All rows
and layers replay together.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from retort.cache.mamba_anchors import Anchors
from retort.cache.rows import PackedRows
from retort.cache.tape import Tape
from retort.ops.native.scan import ScanRows, ragged_scan
from retort.ops.selective_scan import ScanInputs

Work = list[tuple[int, int, int]]
"""From which length to which, and the row."""


class Replay:
    """Gives rows the state of a length that has none.

    Args:
        anchors: of all rows.
        tape: (Δ, u, B) of what the rows read.
        page: tokens in a page of the tape.

    Attributes:
        a: A ``[N, D]`` of each layer, None of one that has not run.
        on_core: the last pass ran on the native core, so that its replay does.
    """

    def __init__(self, anchors: Anchors, tape: Tape, page: int) -> None:
        self._anchors, self._tape, self._page = anchors, tape, page
        self.a: list[Tensor | None] = [None] * len(anchors.states)
        self.on_core = False

    @torch.no_grad()
    def run(self, layout: PackedRows) -> None:
        """Give every row of the layout the state of its length, all rows and layers at once."""
        work = []
        for row, start in zip(layout.rows, layout.starts, strict=True):
            known = self._anchors.slots[row]
            if start not in known:
                work.append((max(end for end in known if end < start), start, row))
        if not work:
            return
        work.sort(key=lambda job: job[0] - job[1])  # the longest replay first
        slots = [self._anchors.slot() for _ in work]
        if self.on_core:  # a replay repeats the bits of the passes
            self._scanned(work, slots)
        else:
            self._anchors.states[:, self._tape.index(slots)] = self._stepped(work)
        for (_, start, row), slot in zip(work, slots, strict=True):
            self._anchors.slots[row][start] = slot

    def _scanned(self, work: Work, slots: list[int]) -> None:
        """States after tokens begin : end of each row's tape, into ``slots``, on the core."""
        places = [(row, place) for begin, end, row in work for place in range(begin, end)]
        counts = tuple(end - begin for begin, end, _ in work)
        ends = [n - 1 for n in accumulate(counts)]
        initial = tuple(self._anchors.slots[row][begin] for begin, _, row in work)
        rows = ScanRows(counts, initial, tuple(zip(ends, slots, strict=True)))
        fed = self._taped(places)
        for layer, a in enumerate(self.a):
            if a is not None:
                states = self._anchors.states[layer]
                ragged_scan(self._inputs(a, fed[layer]), None, rows, states, states)

    def _stepped(self, work: Work) -> Tensor:
        """States ``[layers, rows, N, D]`` after tokens begin : end of each row's tape."""
        old = self._tape.index([max(self._anchors.slots[row][begin], 0) for begin, _, row in work])
        state = self._anchors.states[:, old]
        state[:, self._tape.index([i for i, (begin, _, _) in enumerate(work) if begin == 0])] = 0
        a = torch.stack([x for x in self.a if x is not None]).unsqueeze(1)
        for i in range(work[0][1] - work[0][0]):
            places = [(row, begin + i) for begin, end, row in work if begin + i < end]
            decay, x = self._inputs(a, self._taped(places)).discretise()
            state[:, : len(places)] = x + decay * state[:, : len(places)]
        return state

    def _taped(self, places: list[tuple[int, int]]) -> Tensor:
        """What the recurrences of all layers were fed at (row, position): ``[layers, n, ...]``."""
        pages = self._tape.index([self._tape.find(row, p // self._page) or 0 for row, p in places])
        return self._tape.keys[:, pages, self._tape.index([p % self._page for _, p in places])]

    def _inputs(self, a: Tensor, fed: Tensor) -> ScanInputs:
        d = self._anchors.states.shape[-1]
        return ScanInputs(a, fed[..., :d], fed[..., 2 * d :], fed[..., d : 2 * d])
