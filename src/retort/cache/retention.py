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
from typing import NamedTuple

import torch
from torch import Tensor

from retort.cache.recurrent import RecurrentRowCache, TapeKind, check_tape
from retort.cache.rows import PackedRows, Spare
from retort.cache.tape import Pages, Tape, grown
from retort.cache.waves import WavePlan
from retort.ops.retention import BlockDecay, block_fold, block_output, log_decay


@dataclass(frozen=True)
class RetentionShape:
    """Sizes of the states: layers, heads, key and value width of a head."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class _Pass:
    """What the layers of one pass share.

    Queries lie in M slots of their segment, by position modulo M: M is 8 where no segment has
    more tokens (decoding and drafts) and L elsewhere, so that decoding multiplies few rows and
    a token's place in the product still depends on its position alone. Masks are
    ``[n, 1, 1, 1]`` over the rows of wave 0, None where everything is valid.
    """

    plan: WavePlan
    anchors: dict[int, int]  # of each row when the pass ends
    slots: int  # M
    query_place: tuple[Tensor, Tensor]  # segment and slot of each token
    decay: tuple[Tensor, Tensor]  # of reading the state and the window, per segment
    before: tuple[Tensor, Tensor | None]  # pages of the blocks before wave 0, and which exist
    current: tuple[Tensor, Tensor | None]  # pages of wave 0
    has_state: Tensor | None
    written: tuple[Tensor, Tensor, Tensor]  # tokens for the tape, their pages and offsets
    moved: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # layer, rows, states


class _Front(NamedTuple):
    """Where a wave stands: the state at (b−1)·L and the block before, of each row."""

    state: Tensor
    keys: Tensor
    values: Tensor

    def after(self, k: Tensor, v: Tensor, carry: Tensor | None, decay: BlockDecay) -> _Front:
        """The front one block on, of the rows at ``carry``; k and v are those of block b."""
        state, keys, values, k, v = (_take(x, carry) for x in (*self, k, v))
        return _Front(block_fold(state, keys, values, decay), k, v)


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
            state = self.states[:, row]
            if anchor == 1:
                state.zero_()
            page = self.tape.reserve(row, anchor - 1)
            keys, values = self.tape.keys[:, page], self.tape.values[:, page]
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
        plan = WavePlan.of(layout, list(anchors.values()), self.block, self.device)
        written = self._written(plan, anchors)  # reserves, so that the pages below exist
        slots = min(self.block, 8 if plan.longest_piece <= 8 else self.block)
        segment, offset = plan.place
        query_place = (segment, offset % slots)
        offsets = offset.new_zeros(plan.segments, slots).index_put(query_place, offset)
        young = [span.first < 2 for span in plan.spans]
        return _Pass(
            plan=plan,
            anchors=anchors,
            slots=slots,
            query_place=query_place,
            decay=self.decay.at(offsets),
            before=self._pages([(span.row, span.first - 1) for span in plan.spans]),
            current=self._pages([(span.row, span.first) for span in plan.spans]),
            has_state=~self._index(young).bool().view(-1, 1, 1, 1) if any(young) else None,
            written=written,
        )

    def _written(self, plan: WavePlan, anchors: dict[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        pages = [
            self.tape.reserve(row, block)
            if self.kind == "completion" or block >= anchors[row] - 1
            else -1
            for row, block in plan.members()
        ]
        segment, offset = plan.place
        page = self._index(pages)[segment]
        tokens = (page >= 0).nonzero()[:, 0]
        return tokens, page[tokens], offset[tokens]

    def _pages(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        pages = [self.tape.find(row, block) for row, block in places]
        exist = [page is not None for page in pages]
        mask = None if all(exist) else self._index(exist).bool().view(-1, 1, 1, 1)
        return self._index([page or 0 for page in pages]), mask

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
        run = self._pass
        if run is None:  # a rectangle of padding only
            return torch.zeros_like(v)
        queries = _placed(
            q.new_zeros(run.plan.segments, q.shape[1], run.slots, q.shape[2]), run.query_place, q
        )
        state = _only(self.states[layer, run.plan.rows], run.has_state)
        if torch.is_grad_enabled():
            state = state.clone()  # the graph keeps it, a later pass moves it
        tapes = (self.tape.keys[layer], self.tape.values[layer])
        front = _Front(state, *(_only(tape[run.before[0]], run.before[1]) for tape in tapes))
        blocks = [self._blocks(run, tape, x) for tape, x in zip(tapes, (k, v), strict=True)]
        y = self._run_waves(layer, run, (queries, *blocks), front)
        return y.transpose(1, 2)[run.query_place]

    def _blocks(self, run: _Pass, tape: Tensor, x: Tensor) -> Tensor:
        """Tokens ``[total, H, d]`` in their blocks ``[segments, H, L, d]``, after older ones.

        The tape gets the tokens that it must keep.
        """
        blocks = _only(tape[run.current[0]], run.current[1])
        if later := run.plan.segments - len(blocks):
            blocks = torch.cat([blocks, blocks.new_zeros(later, *blocks.shape[1:])])
        tokens, pages, offsets = run.written
        _placed(tape, (pages, offsets), x.detach()[tokens])
        return _placed(blocks, run.plan.place, x)

    def _run_waves(
        self, layer: int, run: _Pass, blocks: tuple[Tensor, ...], front: _Front
    ) -> Tensor:
        """Outputs of all segments ``[segments, H, M, d_v]``, wave after wave."""
        outputs: list[Tensor] = []
        q, k, v = blocks
        for wave in run.plan.waves:
            if outputs:
                front = front.after(k, v, wave.carry, self.decay)
            q, k, v, read, pair = (x[wave.segments] for x in (*blocks, *run.decay))
            before = (front.keys, front.values)
            outputs.append(block_output(q, front.state, before, (k, v), (read, pair)))
            if len(wave.kept):
                run.moved.append((layer, wave.kept_rows, front.state.detach()[wave.kept]))
        return torch.cat(outputs)


def _placed(blocks: Tensor, place: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Write ``x`` ``[n, H, d]`` into ``blocks`` ``[b, H, L, d]`` at (block, offset) places."""
    blocks.transpose(1, 2)[place] = x
    return blocks


def _only(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` where valid and 0 elsewhere, whatever lies there (NaN · 0 is NaN)."""
    return x if mask is None else torch.where(mask, x, 0)


def _take(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x[places]
