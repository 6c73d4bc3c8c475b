"""Retention rows with deferred commit: a kept state and a tape of what came after it.

Time is cut into blocks of L tokens. A token in block b reads the state at (b−1)·L and the tape
of blocks b−1 and b, so its bits depend on its position and on the tokens before it, never on
how the passes were cut or which drafts were accepted. A row's *anchor* is the block b whose
state it keeps; it moves only when the committed length enters the next block, and until then a
rewind only forgets tape. States and tapes are float32 at least, whatever the model's dtype.

[ours] `tape="completion"` keeps the prompt's tape too, so that every length can be reached: the
state is then folded again from the tape, block by block, into the bits it had before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from retort.cache.recurrent import RecurrentRowCache, TapeKind, check_tape
from retort.cache.retention_waves import Waves, placed
from retort.cache.rows import PackedRows, Spare
from retort.cache.tape import Pages, Tape, grown
from retort.cache.waves import WavePlan
from retort.ops.native.retention import (
    RetentionRows,
    RetentionTables,
    fold_states,
    ragged_retention,
)
from retort.ops.native.retnet import RetNetMemory
from retort.ops.retention import BlockDecay, block_fold, log_decay


@dataclass(frozen=True)
class RetentionShape:
    """Sizes of the states: layers, heads, key and value width of a head."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int


@dataclass
class _Pass:
    """What the layers of one pass share; made whole by whichever arithmetic needs it."""

    layout: PackedRows
    anchors: dict[int, int]  # of each row when the pass ends
    written: tuple[Tensor, Tensor, Tensor]  # tokens for the tape, their pages and offsets
    moved: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # layer, rows, states
    waves: Waves | None = None
    native: RetentionRows | None = None


class RetentionRowCache(RecurrentRowCache):
    """The recurrent row cache of a retention model.

    Args:
        shape: sizes of the states.
        dtype: the model's dtype; states and tapes have it or float32, whichever is wider.
        device: where states and tapes live.
        tape: "draft" reaches back ``max_draft`` tokens at least; "completion" every token.
        max_draft: the longest rewind that "draft" must serve after a pass.
        block: L.
    """

    def __init__(
        self,
        shape: RetentionShape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tape: TapeKind = "draft",
        max_draft: int = 16,
        block: int = 16,
    ) -> None:
        super().__init__(torch.device(device))
        check_tape(tape, max_draft, block)
        self.shape, self.kind, self.max_draft, self.block = shape, tape, max_draft, block
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.decay = BlockDecay.of(log_decay(shape.heads, self.dtype, self.device), block)
        self.states = self._zeros(0, shape.key_dim, shape.value_dim)
        self.tape = Tape(
            lambda n: (self._zeros(n, block, shape.key_dim), self._zeros(n, block, shape.value_dim))
        )
        self._anchor: dict[int, int] = {}
        self._pass: _Pass | None = None

    @torch.inference_mode(False)
    def _zeros(self, count: int, *sizes: int) -> Tensor:
        layers, heads = self.shape.layers, self.shape.heads
        return torch.zeros(layers, count, heads, *sizes, dtype=self.dtype, device=self.device)

    def earliest(self, row: int) -> int:
        """The start of the anchor's block; 0 while the anchor's state is the empty one."""
        self._require(row)
        anchor = self._anchor[row]
        return 0 if anchor <= 1 or self.kind == "completion" else anchor * self.block

    # Rows

    def _open(self, row: int) -> None:
        self._anchor[row] = 0
        self.tape.open(row)
        if row >= self.states.shape[1]:
            self.states = grown(self.states, max(row + 1, 2 * self.states.shape[1]))

    def _close(self, row: int) -> None:
        del self._anchor[row]
        self.tape.close(row)

    def _rewind(self, row: int, length: int) -> None:
        if length // self.block < self._anchor[row]:
            self._anchor[row] = 0  # folded again from the tape's start when the row goes on
        self.tape.keep(row, 0, -(-length // self.block))

    @torch.inference_mode(False)
    def _copy_rows(self, order: Sequence[int]) -> None:
        self._anchor = {i: self._anchor[row] for i, row in enumerate(order)}
        self.states = self.states[:, torch.tensor(order, dtype=torch.long, device=self.device)]
        self.tape.select(order)

    def _copy_out(self, row: int) -> tuple[int, Tensor, Pages]:
        return self._anchor[row], self.states[:, row].clone(), self.tape.copy_out(row)

    @torch.inference_mode(False)
    def _copy_in(self, row: int, state: tuple[int, Tensor, Pages]) -> None:
        self._anchor[row], kept, pages = state
        self.states[:, row] = kept
        self.tape.copy_in(row, pages)

    def _faults(self) -> list[str]:
        faults = [] if set(self._anchor) == set(self._lengths) else ["anchors of other rows"]
        for row, length in self._lengths.items():
            if self._anchor.get(row, 0) * self.block > max(length, 0):
                faults.append(f"row {row} of {length} tokens keeps a state beyond its end")
        return faults + self.tape.faults(self._lengths)

    def _spare(self) -> Spare:
        free = [slot for slot in range(self.states.shape[1]) if slot not in self._lengths]
        pages = self.tape.free
        return [(self.states, free), (self.tape.keys, pages), (self.tape.values, pages)]

    # A pass: begin, one call of `retention` per layer, end

    def _reserve(self, layout: PackedRows) -> None:
        self._pass = None
        for row, start in zip(layout.rows, layout.starts, strict=True):
            while self._anchor[row] < start // self.block:
                self._fold(row)
        self._trim(layout.rows)
        if layout.rows:
            self._pass = self._planned(layout)

    def _fold(self, row: int) -> None:
        """Move the anchor of ``row`` one block on, in all layers at once."""
        anchor = self._anchor[row]
        if anchor >= 1:
            page = self.tape.reserve(row, anchor - 1)
            state = self.states[:, row]
            keys, values = self.tape.keys[:, page], self.tape.values[:, page]
            if self.on_core:
                fold_states(
                    state.unbind(), keys.unbind(), values.unbind(), self._tables, anchor < 2
                )
            else:
                if anchor < 2:
                    state.zero_()
                state.copy_(block_fold(state, keys, values, self.decay))
        self._anchor[row] = anchor + 1

    def _trim(self, rows: Iterable[int]) -> None:
        """Let go of the tape that no reachable length needs."""
        if self.kind == "draft":
            for row in rows:
                self.tape.keep(row, self._anchor[row] - 1)

    def end(self) -> None:
        """Close the pass; anchors that moved inside it are stored now."""
        super().end()
        if self._pass is None:
            return
        for layer, rows, states in self._pass.moved:
            self.states[layer].index_copy_(0, rows, states)
        self._anchor |= self._pass.anchors
        self._trim(self._pass.anchors)
        self._pass = None

    def cancel(self) -> None:
        """Drop a pass that failed: anchors stay where they were."""
        super().cancel()
        self._pass = None

    def _planned(self, layout: PackedRows) -> _Pass:
        slack = max(1, self.max_draft)
        anchors = {
            row: max(start, start + count - slack) // self.block
            for row, start, count in zip(layout.rows, layout.starts, layout.counts, strict=True)
        }
        return _Pass(layout, anchors, self._written(layout, anchors))

    def _written(
        self, layout: PackedRows, anchors: dict[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What joins the tape; its pages are reserved."""
        tokens: list[int] = []
        places: list[tuple[int, int]] = []
        parts = zip(layout.rows, layout.starts, layout.counts, layout.offsets[:-1], strict=True)
        for row, start, count, offset in parts:
            oldest = 0 if self.kind == "completion" else (anchors[row] - 1) * self.block
            first, end = max(start, oldest), start + count
            tokens += range(offset + first - start, offset + count)
            pages = {b: self.tape.reserve(row, b) for b in self._blocks_of(first, end)}
            places += [(pages[p // self.block], p % self.block) for p in range(first, end)]
        pages_of, offsets = self._index(places).view(-1, 2).unbind(1)
        return self._index(tokens), pages_of, offsets

    def _blocks_of(self, first: int, end: int) -> range:
        return range(first // self.block, (end - 1) // self.block + 1)

    def _waves(self, run: _Pass) -> Waves:
        if run.waves is not None:
            return run.waves
        layout = run.layout
        anchors = [run.anchors[row] for row in layout.rows]
        plan = WavePlan.of(layout, anchors, self.block, self.device)
        slots = min(self.block, 8 if plan.longest_piece <= 8 else self.block)
        segment, offset = plan.place
        query_place = (segment, offset % slots)
        offsets = offset.new_zeros(plan.segments, slots).index_put(query_place, offset)
        young = [span.first < 2 for span in plan.spans]
        run.waves = Waves(
            plan=plan,
            slots=slots,
            query_place=query_place,
            decay=self.decay.at(offsets),
            before=self._pages([(span.row, span.first - 1) for span in plan.spans]),
            current=self._pages([(span.row, span.first) for span in plan.spans]),
            has_state=~self._index(young).bool().view(-1, 1, 1, 1) if any(young) else None,
        )
        return run.waves

    def _pages(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        pages = [self.tape.find(row, block) for row, block in places]
        exist = [page is not None for page in pages]
        mask = None if all(exist) else self._index(exist).bool().view(-1, 1, 1, 1)
        return self._index([page or 0 for page in pages]), mask

    def _index(self, numbers: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def retention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Y of this pass's tokens, whose keys and values join the tape.

        Args:
            layer: which layer.
            q: rotated queries ``[total, H, d_k]`` in packed order.
            k: fused, normed, rotated keys ``[total, H, d_k]``.
            v: fused, normed values ``[total, H, d_v]``.

        Returns:
            ``[total, H, d_v]``, differentiable with respect to q, k and v.
        """
        run = self._pass
        if run is None:  # a rectangle of padding only
            return torch.zeros_like(v)
        if self.on_core and not _tracked(q, k, v):
            y = self._on_core(layer, run, (q.contiguous(), k.contiguous(), v.contiguous()))
        else:
            y = self._in_waves(layer, run, (q, k, v))
        tokens, pages, offsets = run.written
        for tape, x in ((self.tape.keys[layer], k), (self.tape.values[layer], v)):
            placed(tape, (pages, offsets), x.detach()[tokens])
        return y

    # The native core

    @cached_property
    def _tables(self) -> RetentionTables:
        return RetentionTables(self.decay, self.shape.key_dim, self.shape.value_dim)

    def _on_core(self, layer: int, run: _Pass, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        rows = run.native = run.native or self._native_rows(run)
        movers = [row for row, at in zip(run.layout.rows, rows.moved, strict=True) if at >= 0]
        moved = torch.empty(len(movers), *self.states.shape[2:])
        pages = (self.tape.keys[layer], self.tape.values[layer])
        y = ragged_retention(*qkv, rows, self._tables, self.states[layer], pages, moved)
        if movers:
            run.moved.append((layer, self._index(movers), moved))
        return y

    def native_memory(self, positions: Tensor) -> RetNetMemory:
        """This pass for a call that runs all layers, which writes the tape itself.

        Args:
            positions: int64 ``[total]``, each token's position in its row.
        """
        run = self._pass
        if run is None:
            raise RuntimeError("layers read and write the cache between begin() and end() only")
        rows = run.native = run.native or self._native_rows(run)
        movers = [row for row, at in zip(run.layout.rows, rows.moved, strict=True) if at >= 0]
        moved = torch.empty(self.shape.layers, len(movers), *self.states.shape[2:])
        if movers:
            index = self._index(movers)
            run.moved += [(layer, index, states) for layer, states in enumerate(moved)]
        tokens, pages, _ = run.written
        kept = pages.new_full((rows.total,), -1).index_copy_(0, tokens, pages)
        stores = self.states, self.tape.keys, self.tape.values
        return RetNetMemory(self._tables, rows, *stores, moved, positions, kept)

    def _native_rows(self, run: _Pass) -> RetentionRows:
        layout, length = run.layout, self.block
        firsts = [start // length for start in layout.starts]
        blocks = [run.anchors[row] for row in layout.rows]
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

    # Its PyTorch twin

    def _in_waves(self, layer: int, run: _Pass, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tapes = (self.tape.keys[layer], self.tape.values[layer])
        y, moved = self._waves(run).run(qkv, self.states[layer], tapes, self.decay)
        run.moved += [(layer, rows, states) for rows, states in moved]
        return y


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
