"""Mamba rows: the state after each pass, and a tape of inputs from which earlier ones return.

A row commits every step: its newest *anchor* is the state at its end, which the next pass starts
from. The tape holds what the recurrence and the convolution were fed, (Δ, B, u) and the
convolution's inputs with the d_conv−1 older ones, so that a rewind replays the tape from the
nearest anchor before the new end: the same operations in the order of tokens, hence the same
bits, and no model forward. A rewind itself only forgets; replays wait for the row's next pass,
and all rows and layers replay together.

Anchors besides the end [ours]: the start of the last pass, so that a rejected draft replays only
what was accepted of it, and two that keep the tape short while ``max_draft`` tokens can be taken
back. `tape="completion"` keeps the tape from the first token and an anchor every 64 tokens.
States and tapes are float32 at least, whatever the model's dtype.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from retort.cache.mamba_pass import MambaPassPlan, Places
from retort.cache.recurrent import RecurrentRowCache, TapeKind, check_tape
from retort.cache.rows import PackedRows, Spare
from retort.cache.tape import Pages, Tape, grown
from retort.ops.native.mamba import MambaMemory
from retort.ops.native.scan import ScanRows, ragged_scan
from retort.ops.segments import Piece, Span
from retort.ops.selective_scan import ScanInputs

EMPTY = -1  # stands for the state before the first token, which needs no slot
GRID = 64  # tokens between the anchors of a completion tape


@dataclass(frozen=True)
class MambaShape:
    """Sizes of the states: layers, channels D, states a channel N, width K of the convolution."""

    layers: int
    channels: int
    states: int
    kernel: int


class MambaRowCache(RecurrentRowCache):
    """The recurrent row cache of a Mamba model.

    Args:
        shape: sizes of the states.
        dtype: the model's dtype; states and tapes have it or float32, whichever is wider.
        device: where states and tapes live.
        tape: "draft" reaches back ``max_draft`` tokens at least; "completion" every token.
        max_draft: the longest rewind that "draft" must serve after a pass.
        page: tokens in a page of the tape.
    """

    def __init__(
        self,
        shape: MambaShape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tape: TapeKind = "draft",
        max_draft: int = 16,
        page: int = 16,
    ) -> None:
        super().__init__(torch.device(device))
        check_tape(tape, max_draft, page)
        self.shape, self.kind, self.max_draft, self.page = shape, tape, max_draft, page
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.states = self._zeros(0, shape.states, shape.channels)
        width = 2 * shape.channels + shape.states
        self.tape = Tape(
            lambda n: (self._zeros(n, page, width), self._zeros(n, page, shape.channels))
        )
        self._a: list[Tensor | None] = [None] * shape.layers
        self._anchors: dict[int, dict[int, int]] = {}
        self._free: list[int] = []
        self._pass: MambaPassPlan | None = None
        self._scanned_natively = False

    @torch.inference_mode(False)
    def _zeros(self, count: int, *sizes: int) -> Tensor:
        return torch.zeros(self.shape.layers, count, *sizes, dtype=self.dtype, device=self.device)

    def earliest(self, row: int) -> int:
        """The oldest anchor; 0 while the tape reaches back to the first token."""
        self._require(row)
        return min(self._anchors[row])

    # Rows

    def _open(self, row: int) -> None:
        self._anchors[row] = {0: EMPTY}
        self.tape.open(row)

    def _close(self, row: int) -> None:
        self._release(self._anchors.pop(row).values())
        self.tape.close(row)

    def _rewind(self, row: int, length: int) -> None:
        anchors = self._anchors[row]
        self._release(anchors.pop(end) for end in [end for end in anchors if end > length])
        self.tape.keep(row, 0, -(-length // self.page))

    @torch.inference_mode(False)
    def _copy_rows(self, order: Sequence[int]) -> None:
        sources = [self._anchors[row] for row in order]
        used = [slot for anchors in sources for slot in anchors.values() if slot != EMPTY]
        self.states = self.states[:, self._index(used)]
        numbers = iter(range(len(used)))
        self._anchors = {
            i: {end: slot if slot == EMPTY else next(numbers) for end, slot in anchors.items()}
            for i, anchors in enumerate(sources)
        }
        self._free = []
        self.tape.select(order)

    def _copy_out(self, row: int) -> tuple[dict[int, bool], Tensor, Pages]:
        anchors = self._anchors[row]
        slots = self._index([slot for slot in anchors.values() if slot != EMPTY])
        filled = {end: slot != EMPTY for end, slot in anchors.items()}
        return filled, self.states[:, slots], self.tape.copy_out(row)

    @torch.inference_mode(False)
    def _copy_in(self, row: int, state: tuple[dict[int, bool], Tensor, Pages]) -> None:
        filled, kept, pages = state
        self._anchors[row] = {end: self._slot() if full else EMPTY for end, full in filled.items()}
        slots = [slot for slot in self._anchors[row].values() if slot != EMPTY]
        self.states[:, self._index(slots)] = kept
        self.tape.copy_in(row, pages)

    def _faults(self) -> list[str]:
        faults = [] if set(self._anchors) == set(self._lengths) else ["anchors of other rows"]
        for row, length in self._lengths.items():
            if max(self._anchors.get(row, {0: EMPTY})) > length:
                faults.append(f"row {row} of {length} tokens keeps a state beyond its end")
        used = [s for anchors in self._anchors.values() for s in anchors.values() if s != EMPTY]
        if sorted(used + self._free) != list(range(self.states.shape[1])):
            faults.append("states are shared or lost")
        return faults + self.tape.faults(self._lengths)

    def _spare(self) -> Spare:
        pages = self.tape.free
        return [(self.states, self._free), (self.tape.keys, pages), (self.tape.values, pages)]

    def _slot(self) -> int:
        if not self._free:
            old = self.states.shape[1]
            self.states = grown(self.states, max(4, 2 * old))
            self._free += range(old, self.states.shape[1])
        return self._free.pop()

    def _release(self, slots: Iterable[int]) -> None:
        self._free += [slot for slot in slots if slot != EMPTY]

    # A pass: begin, then for each layer history, resume and record of every piece, then end

    def _reserve(self, layout: PackedRows) -> None:
        self._drop_pass()
        self._replay(layout)
        if layout.rows:
            self._pass = self._planned(layout)

    def end(self) -> None:
        """Close the pass: its states become anchors, what no rewind needs is let go."""
        super().end()
        run, self._pass = self._pass, None
        for row, anchors in (run.anchors if run else {}).items():
            old = self._anchors[row]
            self._release(slot for end, slot in old.items() if end not in anchors)
            self._anchors[row] = anchors
            self.tape.keep(row, self._first_taped(anchors) // self.page)

    def cancel(self) -> None:
        """Drop a pass that failed: anchors stay where they were."""
        super().cancel()
        self._drop_pass()

    def _drop_pass(self) -> None:
        if self._pass is not None:
            self._release(self._pass.fresh)
        self._pass = None

    def _first_taped(self, anchors: dict[int, int]) -> int:
        return max(0, min(anchors) - self.shape.kernel + 1)

    def _planned(self, layout: PackedRows) -> MambaPassPlan:
        anchors: dict[int, dict[int, int]] = {}
        kept, taped = Places(1, self.device), Places(2, self.device)
        parts = zip(layout.rows, layout.starts, layout.counts, layout.offsets[:-1], strict=True)
        for row, start, count, offset in parts:
            anchors[row] = self._next_anchors(row, start, start + count)
            for place in sorted(end for end in anchors[row] if end > start):
                kept.add(offset + place - start - 1, anchors[row][place])
            for place in range(max(start, self._first_taped(anchors[row])), start + count):
                page = self.tape.reserve(row, place // self.page)
                taped.add(offset + place - start, page, place % self.page)
        starts = zip(layout.rows, layout.starts, strict=True)
        heads = [self._anchors[row][start] for row, start in starts]
        resumed = [i for i, slot in enumerate(heads) if slot != EMPTY]
        return MambaPassPlan(
            anchors=anchors,
            fresh=[place[0] for place in kept.places],
            resumed=(resumed, self._index([heads[i] for i in resumed])),
            history=self._history(layout),
            kept=kept,
            taped=taped,
        )

    def _next_anchors(self, row: int, start: int, end: int) -> dict[int, int]:
        """The anchors that ``row`` will have, with new slots for those in the pass."""
        old = self._anchors[row]
        wanted = self._wanted(sorted({*old, *self._candidates(start, end)}), start, end)
        return {place: old[place] if place in old else self._slot() for place in sorted(wanted)}

    def _candidates(self, start: int, end: int) -> list[int]:
        """Lengths inside a pass whose states are taken, ascending."""
        places = {end}
        if self.kind == "completion":
            places |= set(range((start // GRID + 1) * GRID, end, GRID))
        elif end - self.max_draft > start:
            places.add(end - self.max_draft)
        return sorted(places)

    def _wanted(self, ends: list[int], start: int, end: int) -> set[int]:
        """Which anchors remain: see the module."""
        cut = bisect_left(ends, end - self.max_draft + 1)
        wanted = {start, end, ends[max(cut - 1, 0)], ends[min(cut, len(ends) - 1)]}
        if self.kind == "completion":
            return wanted | {0} | {place for place in ends if place % GRID == 0}
        return {place for place in wanted if place >= ends[max(cut - 1, 0)]}

    def _history(self, layout: PackedRows) -> tuple[Tensor, Tensor, Tensor | None]:
        width = self.shape.kernel - 1
        spans = [range(start - width, start) for start in layout.starts]
        places = self._index([place for span in spans for place in span])
        places = places.view(len(spans), width)
        pages = [
            (self.tape.find(row, place // self.page) or 0) if place >= 0 else 0
            for row, span in zip(layout.rows, spans, strict=True)
            for place in span
        ]
        young = min(layout.starts) < width
        valid = (places >= 0).unsqueeze(-1) if young else None
        return self._index(pages).view_as(places), places % self.page, valid

    def _index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def history(self, layer: int, rows: slice) -> Tensor:
        """The K−1 convolution inputs before rows of the layout ``[r, K−1, D]``, 0 before any."""
        pages, offsets, valid = self._running.history
        x = self.tape.values[layer, pages[rows], offsets[rows]]
        return x if valid is None else x.masked_fill(~valid[rows], 0)

    def resume(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Those of the rows that have a state (numbers from 0), and their states ``[k, N, D]``."""
        numbers, slots = self._running.resumed
        part = slice(bisect_left(numbers, rows.start), bisect_left(numbers, rows.stop))
        return self._index(numbers[part]) - rows.start, self.states[layer, slots[part]]

    @torch.no_grad()
    def record(self, layer: int, piece: Piece, x: Tensor, inputs: ScanInputs, h: Tensor) -> None:
        """Put a piece on the tape, and take the states that become anchors.

        Args:
            layer: which layer.
            piece: its part of the packed axis.
            x: the convolution's inputs ``[n, D]``.
            inputs: A, Δ, B and u of the piece.
            h: its states ``[n, N, D]``.
        """
        self._scanned_natively = False
        tokens, (slots,) = self._running.kept.within(piece)
        self.states[layer].index_copy_(0, slots, h[tokens])
        self.tape_inputs(layer, piece, x, inputs)

    def scan_rows(self) -> ScanRows:
        """The pass for a scan that reads its first states from `states` and keeps others there."""
        run = self._running
        self._scanned_natively = True
        numbers, slots = run.resumed
        initial = dict(zip(numbers, slots.tolist(), strict=True))
        counts = self.layout.counts if self.layout else ()
        kept = zip(run.kept.tokens, run.fresh, strict=True)
        return ScanRows(counts, tuple(initial.get(i, -1) for i in range(len(counts))), tuple(kept))

    def native_memory(self, a: Sequence[Tensor]) -> MambaMemory:
        """This pass for a call that runs all layers, which writes states and tape itself.

        Args:
            a: A ``[N, D]`` of each layer.
        """
        run, layout = self._running, self.layout
        assert layout is not None
        rows, self._a = self.scan_rows(), list(a)
        parts = zip(layout.rows, layout.starts, layout.counts, strict=True)
        last = tuple(run.anchors[row][start + count] for row, start, count in parts)
        pages, offsets, valid = run.history
        if valid is not None:
            pages = pages.masked_fill(~valid[..., 0], -1)
        tape = torch.full((2, layout.total), -1)
        tape[1] = 0
        if run.taped.tokens:
            tape[:, run.taped.tokens] = self._index(run.taped.places).t()
        stores = self.states, self.tape.keys, self.tape.values
        return MambaMemory(rows, last, *stores, (pages, offsets), (tape[0], tape[1]))

    @torch.no_grad()
    def tape_inputs(self, layer: int, piece: Piece | Span, x: Tensor, inputs: ScanInputs) -> None:
        """Put a piece on the tape; arguments as in `record`."""
        self._a[layer] = inputs.a.detach()
        tokens, where = self._running.taped.within(piece)
        fed = torch.cat([inputs.dt, inputs.u, inputs.b], -1)
        self.tape.keys[layer].index_put_(where, fed[tokens])
        self.tape.values[layer].index_put_(where, x[tokens].to(self.dtype))

    @property
    def _running(self) -> MambaPassPlan:
        if self._pass is None:
            raise RuntimeError("layers read and write the cache between begin() and end() only")
        return self._pass

    # Replay

    @torch.no_grad()
    def _replay(self, layout: PackedRows) -> None:
        """Give every row of the layout the state of its length, all rows and layers at once."""
        work = []
        for row, start in zip(layout.rows, layout.starts, strict=True):
            if start not in self._anchors[row]:
                work.append((max(end for end in self._anchors[row] if end < start), start, row))
        if not work:
            return
        work.sort(key=lambda job: job[0] - job[1])  # the longest replay first
        slots = [self._slot() for _ in work]
        if self._scanned_natively:  # a replay repeats the bits of the passes
            self._replay_on_core(work, slots)
        else:
            self.states[:, self._index(slots)] = self._replayed(work)
        for (_, start, row), slot in zip(work, slots, strict=True):
            self._anchors[row][start] = slot

    def _replay_on_core(self, work: list[tuple[int, int, int]], slots: list[int]) -> None:
        """States after tokens begin : end of each row's tape, into ``slots``."""
        places = [(row, place) for begin, end, row in work for place in range(begin, end)]
        counts = tuple(end - begin for begin, end, _ in work)
        ends = [n - 1 for n in accumulate(counts)]
        initial = tuple(self._anchors[row][begin] for begin, _, row in work)
        rows = ScanRows(counts, initial, tuple(zip(ends, slots, strict=True)))
        fed = self._taped(places)
        for layer, a in enumerate(self._a):
            if a is not None:
                states = self.states[layer]
                ragged_scan(self._inputs(a, fed[layer]), None, rows, states, states)

    def _taped(self, places: list[tuple[int, int]]) -> Tensor:
        """What the recurrences of all layers were fed at (row, position): ``[layers, n, ...]``."""
        pages = self._index([self.tape.find(row, p // self.page) or 0 for row, p in places])
        return self.tape.keys[:, pages, self._index([p % self.page for _, p in places])]

    def _inputs(self, a: Tensor, fed: Tensor) -> ScanInputs:
        d = self.shape.channels
        return ScanInputs(a, fed[..., :d], fed[..., 2 * d :], fed[..., d : 2 * d])

    def _replayed(self, work: list[tuple[int, int, int]]) -> Tensor:
        """States ``[layers, rows, N, D]`` after tokens begin : end of each row's tape."""
        old = self._index([max(self._anchors[row][begin], 0) for begin, _, row in work])
        state = self.states[:, old]
        state[:, self._index([i for i, (begin, _, _) in enumerate(work) if begin == 0])] = 0
        a = torch.stack([x for x in self._a if x is not None]).unsqueeze(1)
        for i in range(work[0][1] - work[0][0]):
            places = [(row, begin + i) for begin, end, row in work if begin + i < end]
            decay, x = self._inputs(a, self._taped(places)).discretise()
            state[:, : len(places)] = x + decay * state[:, : len(places)]
        return state
