"""Retention rows with deferred commit: a kept state and a tape of what came after it.

Time is cut into blocks of L tokens. A token in block b reads the state at (b−1)·L and the tape
of blocks b−1 and b, so its bits depend on its position and on the tokens before it, never on
how the passes were cut or which drafts were accepted. A row's *anchor* is the block b whose
state it keeps; it moves only when the committed length enters the next block, and until then a
rewind only forgets tape. States and tapes are float32 at least, whatever the model's dtype.

[ours] `tape="completion"` keeps the prompt's tape too, so that every length can be reached: the
state is then folded again from the tape, block by block, into the bits it had before.

What a pass reads and writes is planned in `retention_pass`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retort.cache.pool import grown
from retort.cache.retention_pass import RetentionPass
from retort.cache.retention_waves import placed
from retort.cache.rows import PackedRows, Spare
from retort.cache.tape import Pages, Tape
from retort.cache.taped import TapedRowCache, TapeKind, outside_a_pass
from retort.ops.native.retention import RetentionTables, fold_states, ragged_retention
from retort.ops.native.retnet import RetNetMemory
from retort.ops.retention import BlockDecay, block_fold, log_decay


@dataclass(frozen=True)
class RetentionShape:
    """Sizes of the states: layers, heads, key and value width of a head."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int


class RetentionRowCache(TapedRowCache):
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
        super().__init__(dtype, device, tape, max_draft, block)
        self.shape, self.block = shape, block
        self.decay = BlockDecay.of(log_decay(shape.heads, self.dtype, self.device), block)
        self.states = self._zeros(0, shape.key_dim, shape.value_dim)
        self.tape = Tape(
            lambda n: (self._zeros(n, block, shape.key_dim), self._zeros(n, block, shape.value_dim))
        )
        self._anchor: dict[int, int] = {}
        self._pass: RetentionPass | None = None

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
        self.states = self.states[:, self._index(order)]
        self.tape.select(order)

    def _copy_out(self, row: int) -> tuple[int, Tensor, Pages]:
        return self._anchor[row], self.states[:, row].clone(), self.tape.copy_out(row)

    @torch.inference_mode(False)
    def _copy_in(self, row: int, state: tuple[int, Tensor, Pages]) -> None:
        self._anchor[row], kept, pages = state
        self.states[:, row] = kept
        self.tape.copy_in(row, pages)

    def _faults(self) -> list[str]:
        faults = self._anchor_faults({row: b * self.block for row, b in self._anchor.items()})
        return faults + self.tape.faults(self._lengths)

    def _spare(self) -> Spare:
        free = [slot for slot in range(self.states.shape[1]) if slot not in self._lengths]
        return self._spare_of(self.states, free)

    # A pass: begin, one call of `retention` per layer, end

    def _reserve(self, layout: PackedRows) -> None:
        self._pass = None
        for row, start in zip(layout.rows, layout.starts, strict=True):
            while self._anchor[row] < start // self.block:
                self._fold(row)
        self._trim(layout.rows)
        if layout.rows:
            self._pass = RetentionPass.of(
                layout, self.tape, self.decay, self.block, self.kind, self.max_draft
            )

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

    def _on_core(
        self, layer: int, run: RetentionPass, qkv: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        movers = run.movers
        moved = torch.empty(len(movers), *self.states.shape[2:])
        pages = (self.tape.keys[layer], self.tape.values[layer])
        y = ragged_retention(*qkv, run.native, self._tables, self.states[layer], pages, moved)
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
            raise outside_a_pass()
        movers = run.movers
        moved = torch.empty(self.shape.layers, len(movers), *self.states.shape[2:])
        if movers:
            index = self._index(movers)
            run.moved += [(layer, index, states) for layer, states in enumerate(moved)]
        tokens, pages, _ = run.written
        kept = pages.new_full((run.native.total,), -1).index_copy_(0, tokens, pages)
        stores = self.states, self.tape.keys, self.tape.values
        return RetNetMemory(self._tables, run.native, *stores, moved, positions, kept)

    # Its PyTorch twin

    def _in_waves(
        self, layer: int, run: RetentionPass, qkv: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        tapes = (self.tape.keys[layer], self.tape.values[layer])
        y, moved = run.waves.run(qkv, self.states[layer], tapes, self.decay)
        run.moved += [(layer, rows, states) for rows, states in moved]
        return y


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
