"""Retention rows with deferred commit: a kept state and a tape of what came after it.

Time is cut into blocks of L tokens. A token in block b reads the state at (b−1)·L and the tape
of blocks b−1 and b, so its bits depend on its position and on the tokens before it, never on
how the passes were cut or which drafts were accepted. The state of a row (its *anchor*) moves
only when the committed length enters the next block; until then a rewind only forgets tape.

The tape lies in pages of one block, in one pool for all rows; a row owns the pages from the
block before its anchor on (`tape="draft"`) or all of them (`tape="completion"`). States and
tapes are float32 at least.

[ours] "completion" keeps the prompt's tape too, so every length can be reached: the state is
then folded again from the tape, block by block, with the bits it had before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retort.cache.recurrent import RecurrentRowCache
from retort.cache.rows import PackedRows
from retort.cache.waves import WavePlan
from retort.errors import ConfigurationError
from retort.ops.retention import BlockDecay, block_fold, block_output, block_read, log_decay

Tape = Literal["draft", "completion"]


@dataclass(frozen=True)
class RetentionShape:
    """Sizes of the states: layers, heads, key and value width of a head."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class _Entry:
    """Where wave 0 reads and which segments the tape keeps.

    Masks are ``[n, 1, L or 1, 1]``; None where everything is valid.
    """

    has_state: Tensor | None
    before: Tensor
    has_before: Tensor | None
    current: Tensor
    old: Tensor
    written: Tensor
    pages: Tensor


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
        tape: Tape = "draft",
        max_draft: int = 16,
        block: int = 16,
    ) -> None:
        super().__init__(torch.device(device))
        if tape not in ("draft", "completion") or max_draft < 0 or block < 1:
            raise ConfigurationError(
                f"a tape is 'draft' or 'completion', max_draft at least 0 and block at least 1: "
                f"{tape=}, {max_draft=}, {block=}"
            )
        self.shape, self.tape, self.max_draft, self.block = shape, tape, max_draft, block
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.tables = BlockDecay.of(log_decay(shape.heads, self.dtype, self.device), block)
        self._anchor: dict[int, int] = {}
        self._tables: dict[int, dict[int, int]] = {}
        self._allocate(rows=0, pages=0)
        self._discard()

    @torch.inference_mode(False)
    def _allocate(self, rows: int, pages: int) -> None:
        s = self.shape
        size = {"dtype": self.dtype, "device": self.device}
        self.states = torch.zeros(s.layers, rows, s.heads, s.key_dim, s.value_dim, **size)
        self.keys = torch.zeros(s.layers, pages, s.heads, self.block, s.key_dim, **size)
        self.values = torch.zeros(s.layers, pages, s.heads, self.block, s.value_dim, **size)
        self._free_pages = list(range(pages))[::-1]

    # --- rows -------------------------------------------------------------------------------

    def earliest(self, row: int) -> int:
        """The start of the anchor's block; 0 while the anchor is the empty state."""
        self._require(row)
        anchor = self._anchor[row]
        return 0 if anchor <= 1 or self.tape == "completion" else anchor * self.block

    def _open(self, row: int) -> None:
        self._anchor[row], self._tables[row] = 0, {}
        if row >= self.states.shape[1]:
            self.states = _grown(self.states, max(row + 1, 2 * self.states.shape[1]))

    def _close(self, row: int) -> None:
        self._free_pages += self._tables.pop(row).values()
        del self._anchor[row]

    def _rewind(self, row: int, length: int) -> None:
        block = length // self.block
        if block < self._anchor[row]:  # fold again from the start, when the row goes on
            self._anchor[row] = 0
        self._drop_pages(row, [b for b in self._tables[row] if b * self.block >= length])

    def _drop_pages(self, row: int, blocks: Sequence[int]) -> None:
        self._free_pages += [self._tables[row].pop(b) for b in blocks]

    def _page(self, row: int, block: int) -> int:
        table = self._tables[row]
        if block not in table:
            if not self._free_pages:
                self._grow_pages()
            table[block] = self._free_pages.pop()
        return table[block]

    def _grow_pages(self) -> None:
        old = self.keys.shape[1]
        new = max(4, 2 * old)
        self.keys, self.values = _grown(self.keys, new), _grown(self.values, new)
        self._free_pages += range(old, new)

    @torch.inference_mode(False)
    def _copy_rows(self, order: Sequence[int]) -> None:
        tables = [self._tables[row] for row in order]
        pages = torch.tensor([p for t in tables for p in t.values()], dtype=torch.long)
        states, keys, values = self.states, self.keys, self.values
        self._anchor = {i: self._anchor[row] for i, row in enumerate(order)}
        self._allocate(rows=0, pages=0)
        self.states = states[:, torch.tensor(order, dtype=torch.long, device=self.device)]
        self.keys, self.values = (t[:, pages.to(self.device)] for t in (keys, values))
        numbers = iter(range(len(pages)))
        self._tables = {i: {b: next(numbers) for b in t} for i, t in enumerate(tables)}

    # --- a pass -----------------------------------------------------------------------------

    def _reserve(self, layout: PackedRows) -> None:
        self._discard()
        self._commit(layout)
        if not layout.rows:
            return
        ends = zip(layout.rows, layout.starts, layout.counts, strict=True)
        slack = max(1, self.max_draft)
        self._next_anchor = {r: max(s, s + c - slack) // self.block for r, s, c in ends}
        anchors = list(self._next_anchor.values())
        self._plan = WavePlan.of(layout, anchors, self.block, self.device)
        self._read = self._entry(self._plan)

    def _discard(self) -> None:
        self._plan: WavePlan | None = None
        self._read: _Entry | None = None
        self._next_anchor: dict[int, int] = {}
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def end(self) -> None:
        """Close the pass; anchors that moved inside it are stored now."""
        super().end()
        for layer, rows, states in self._pending:
            self.states[layer].index_copy_(0, rows, states)
        self._anchor |= self._next_anchor
        self._trim(self._next_anchor)
        self._discard()

    def cancel(self) -> None:
        """Drop a pass that failed: anchors stay where they were."""
        super().cancel()
        self._discard()

    def _trim(self, rows: Iterable[int]) -> None:
        """Let go of the tape that no reachable length needs."""
        if self.tape == "completion":
            return
        for row in rows:
            first = self._anchor[row] - 1
            self._drop_pages(row, [b for b in self._tables[row] if b < first])

    def _commit(self, layout: PackedRows) -> None:
        """Move each row's anchor to the block that its committed length has entered."""
        for row, start in zip(layout.rows, layout.starts, strict=True):
            while self._anchor[row] < start // self.block:
                self._fold(row)
        self._trim(layout.rows)

    def _fold(self, row: int) -> None:
        """Move the anchor of ``row`` one block on, in all layers at once."""
        anchor = self._anchor[row]
        if anchor >= 1:
            state = self.states[:, row]
            if anchor == 1:
                state.zero_()
            page = self._tables[row][anchor - 1]
            state.copy_(block_fold(state, self.keys[:, page], self.values[:, page], self.tables))
        self._anchor[row] = anchor + 1

    def _entry(self, plan: WavePlan) -> _Entry:
        kept = [
            (i, row, block)
            for i, (row, block) in enumerate(plan.members())
            if self.tape == "completion" or block >= self._next_anchor[row] - 1
        ]
        pages = [self._page(row, block) for _, row, block in kept]
        spans, size = plan.spans, (-1, 1, 1, 1)
        held = [span.start % self.block for span in spans]
        first = torch.tensor([span.first for span in spans], device=self.device).view(size)
        offsets = torch.arange(self.block, device=self.device).view(1, 1, -1, 1)
        young = min(span.first for span in spans)
        return _Entry(
            has_state=first >= 2 if young < 2 else None,
            before=self._index([self._tables[s.row].get(s.first - 1, 0) for s in spans]),
            has_before=first >= 1 if young < 1 else None,
            current=self._index([self._tables[s.row].get(s.first, 0) for s in spans]),
            old=offsets < self._index(held).view(size),
            written=self._index([i for i, _, _ in kept]),
            pages=self._index(pages),
        )

    def _index(self, numbers: Sequence[int]) -> Tensor:
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
        if self._plan is None or self._read is None:
            return torch.zeros_like(v)
        plan, entry = self._plan, self._read
        queries, keys, values = (self._blocks(x, plan) for x in (q, k, v))
        before = []
        for tape, blocks in ((self.keys[layer], keys), (self.values[layer], values)):
            blocks[plan.waves[0].segments] += _only(tape[entry.current], entry.old)
            before.append(_only(tape[entry.before], entry.has_before))
            tape.index_copy_(0, entry.pages, blocks.detach()[entry.written])
        state = _only(self.states[layer, plan.rows], entry.has_state)
        if torch.is_grad_enabled():
            state = state.clone()  # the graph keeps it, a later pass moves it
        outputs = self._run(layer, queries, [keys, values], before, state)
        return outputs.transpose(1, 2)[plan.place]

    def _blocks(self, x: Tensor, plan: WavePlan) -> Tensor:
        """Packed tokens ``[total, H, d]`` at their places in blocks ``[segments, H, L, d]``."""
        blocks = x.new_zeros(plan.segments, x.shape[1], self.block, x.shape[2])
        blocks.transpose(1, 2)[plan.place] = x
        return blocks

    def _run(
        self, layer: int, q: Tensor, blocks: list[Tensor], before: list[Tensor], state: Tensor
    ) -> Tensor:
        """Outputs of all segments ``[segments, H, L, d_v]``, wave after wave."""
        outputs, current = [], before
        for depth, wave in enumerate(self._plan.waves if self._plan else ()):
            if depth:
                state, *before = (_take(x, wave.carry) for x in (state, *before))
                state = block_fold(state, *before, self.tables)
                before = [_take(x, wave.carry) for x in current]
            current = [x[wave.segments] for x in blocks]
            window = [torch.cat(pair, 2) for pair in zip(before, current, strict=True)]
            queries = q[wave.segments]
            outputs.append(
                block_output(queries, window[0], window[1], self.tables)
                + block_read(queries, state, self.tables)
            )
            if len(wave.kept):
                self._pending.append((layer, wave.kept_rows, state.detach()[wave.kept]))
        return torch.cat(outputs)


def _only(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` where valid and 0 elsewhere, whatever lies there (NaN · 0 is NaN)."""
    return x if mask is None else torch.where(mask, x, 0)


def _take(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x[places]


@torch.inference_mode(False)
def _grown(x: Tensor, size: int) -> Tensor:
    """``x`` with room for ``size`` entries in dim 1."""
    larger = x.new_zeros(x.shape[0], size, *x.shape[2:])
    larger[:, : x.shape[1]] = x
    return larger
