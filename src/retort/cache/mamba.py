"""Mamba rows: the state after each pass, and a tape of inputs from which earlier ones return.

A row commits every step: its newest *anchor* is the state at its end, which the next pass starts
from. The tape holds what the recurrence and the convolution were fed, (Δ, B, u) and the
convolution's inputs with the d_conv−1 older ones, so that a rewind replays the tape from the
nearest anchor before the new end: the same operations in the order of tokens, hence the same
bits, and no model forward. A rewind itself only forgets; replays wait for the row's next pass,
and all rows and layers replay together.

`tape="completion"` keeps the tape from the first token. States and tapes are float32 at least,
whatever the model's dtype. Which other states are kept is said in `mamba_anchors`; replays are in
`mamba_replay`, and what a pass reads and writes is planned in `mamba_pass`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.cache.mamba_anchors import Anchors
from retort.cache.mamba_pass import MambaPassPlan, first_taped
from retort.cache.mamba_replay import Replay
from retort.cache.rows import PackedRows, Spare
from retort.cache.tape import Pages, Tape
from retort.cache.taped import TapedRowCache, TapeKind, outside_a_pass
from retort.ops.native.mamba import MambaMemory
from retort.ops.native.scan import ScanRows
from retort.ops.segments import Piece, Span
from retort.ops.selective_scan import ScanInputs


@dataclass(frozen=True)
class MambaShape:
    """Sizes of the states: layers, channels D, states a channel N, width K of the convolution."""

    layers: int
    channels: int
    states: int
    kernel: int


class MambaRowCache(TapedRowCache):
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
        super().__init__(dtype, device, tape, max_draft, page)
        self.shape, self.page = shape, page
        width = 2 * shape.channels + shape.states
        self.tape = Tape(
            lambda n: (self._zeros(n, page, width), self._zeros(n, page, shape.channels))
        )
        self.anchors = Anchors(
            lambda n: self._zeros(n, shape.states, shape.channels), tape, max_draft
        )
        self._replay = Replay(self.anchors, self.tape, page)
        self._pass: MambaPassPlan | None = None

    @property
    def states(self) -> Tensor:
        """The kept states of all rows ``[layers, n, N, D]``."""
        return self.anchors.states

    @torch.inference_mode(False)
    def _zeros(self, count: int, *sizes: int) -> Tensor:
        return torch.zeros(self.shape.layers, count, *sizes, dtype=self.dtype, device=self.device)

    def earliest(self, row: int) -> int:
        """The oldest anchor; 0 while the tape reaches back to the first token."""
        self._require(row)
        return min(self.anchors.slots[row])

    # Rows

    def _open(self, row: int) -> None:
        self.anchors.open(row)
        self.tape.open(row)

    def _close(self, row: int) -> None:
        self.anchors.close(row)
        self.tape.close(row)

    def _rewind(self, row: int, length: int) -> None:
        self.anchors.forget(row, length)
        self.tape.keep(row, 0, -(-length // self.page))

    @torch.inference_mode(False)
    def _copy_rows(self, order: Sequence[int]) -> None:
        self.anchors.select(order)
        self.tape.select(order)

    def _copy_out(self, row: int) -> tuple[dict[int, bool], Tensor, Pages]:
        return *self.anchors.copy_out(row), self.tape.copy_out(row)

    @torch.inference_mode(False)
    def _copy_in(self, row: int, state: tuple[dict[int, bool], Tensor, Pages]) -> None:
        filled, kept, pages = state
        self.anchors.copy_in(row, filled, kept)
        self.tape.copy_in(row, pages)

    def _faults(self) -> list[str]:
        faults = self._anchor_faults({row: max(ends) for row, ends in self.anchors.slots.items()})
        return faults + self.anchors.faults() + self.tape.faults(self._lengths)

    def _spare(self) -> Spare:
        return self._spare_of(self.anchors.states, self.anchors.free)

    # A pass: begin, then for each layer history, resume and record of every piece, then end

    def _reserve(self, layout: PackedRows) -> None:
        self._drop_pass()
        self._replay.run(layout)
        if layout.rows:
            self._pass = MambaPassPlan.of(
                layout, self.anchors, self.tape, self.page, self.shape.kernel
            )

    def end(self) -> None:
        """Close the pass: its states become anchors, what no rewind needs is let go."""
        super().end()
        run, self._pass = self._pass, None
        for row, anchors in (run.anchors if run else {}).items():
            self.anchors.replace(row, anchors)
            self.tape.keep(row, first_taped(anchors, self.shape.kernel) // self.page)

    def cancel(self) -> None:
        """Drop a pass that failed: anchors stay where they were."""
        super().cancel()
        self._drop_pass()

    def _drop_pass(self) -> None:
        if self._pass is not None:
            self.anchors.release(self._pass.fresh)
        self._pass = None

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
        self._replay.on_core = False
        tokens, (slots,) = self._running.kept.within(piece)
        self.states[layer].index_copy_(0, slots, h[tokens])
        self.tape_inputs(layer, piece, x, inputs)

    def scan_rows(self) -> ScanRows:
        """The pass for a scan that reads its first states from `states` and keeps others there."""
        run = self._running
        self._replay.on_core = True
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
        rows, self._replay.a = self.scan_rows(), list(a)
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
        self._replay.a[layer] = inputs.a.detach()
        tokens, where = self._running.taped.within(piece)
        fed = torch.cat([inputs.dt, inputs.u, inputs.b], -1)
        self.tape.keys[layer].index_put_(where, fed[tokens])
        self.tape.values[layer].index_put_(where, x[tokens].to(self.dtype))

    @property
    def _running(self) -> MambaPassPlan:
        if self._pass is None:
            raise outside_a_pass()
        return self._pass
