"""A pass of retention in PyTorch, wave after wave (`waves.py`): the twin of the native core.

Shapes: H heads, L tokens a block; q, k and v are ``[total, H, d]`` in packed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from retort.cache.waves import WavePlan
from retort.ops.retention import BlockDecay, block_fold, block_output

Moved = list[tuple[Tensor, Tensor]]


class Front(NamedTuple):
    """Where a wave stands: the state at (b−1)·L and the block before, of each row."""

    state: Tensor
    keys: Tensor
    values: Tensor

    def after(self, k: Tensor, v: Tensor, carry: Tensor | None, decay: BlockDecay) -> Front:
        """The front one block on, of the rows at ``carry``; k and v are those of block b."""
        state, keys, values, k, v = (_take(x, carry) for x in (*self, k, v))
        return Front(block_fold(state, keys, values, decay), k, v)


@dataclass(frozen=True)
class Waves:
    """What the layers of one pass share.

    Queries lie in M slots of their segment, by position modulo M: M is 8 where no segment has
    more tokens (decoding and drafts) and L elsewhere, so that decoding multiplies few rows and
    a token's place in the product still depends on its position alone. Masks are
    ``[n, 1, 1, 1]`` over the rows of wave 0, None where everything is valid.
    """

    plan: WavePlan
    slots: int  # M
    query_place: tuple[Tensor, Tensor]  # segment and slot of each token
    decay: tuple[Tensor, Tensor]  # of reading the state and the window, per segment
    before: tuple[Tensor, Tensor | None]  # pages of the blocks before wave 0, and which exist
    current: tuple[Tensor, Tensor | None]  # pages of wave 0
    has_state: Tensor | None

    def run(
        self, qkv: tuple[Tensor, Tensor, Tensor], states: Tensor, tapes: tuple[Tensor, Tensor],
        decay: BlockDecay,
    ) -> tuple[Tensor, Moved]:  # fmt: skip
        """Outputs ``[total, H, d_v]`` of one layer, and (rows, states) of anchors that move.

        Args:
            qkv: rotated queries, fused keys and values of the pass.
            states: ``[rows, H, d_k, d_v]`` of the layer.
            tapes: its pages of keys and of values ``[p, H, L, d]``.
            decay: of a block.
        """
        q, *kv = qkv
        queries = q.new_zeros(self.plan.segments, q.shape[1], self.slots, q.shape[2])
        state = _only(states[self.plan.rows], self.has_state)
        if torch.is_grad_enabled():
            state = state.clone()  # the graph keeps it, a later pass moves it
        front = Front(state, *(_only(tape[self.before[0]], self.before[1]) for tape in tapes))
        blocks = [self._blocks(tape, x) for tape, x in zip(tapes, kv, strict=True)]
        y, moved = self._outputs((placed(queries, self.query_place, q), *blocks), front, decay)
        return y.transpose(1, 2)[self.query_place], moved

    def _outputs(
        self, blocks: tuple[Tensor, ...], front: Front, decay: BlockDecay
    ) -> tuple[Tensor, Moved]:
        """Of all segments ``[segments, H, M, d_v]``, wave after wave."""
        outputs: list[Tensor] = []
        moved: Moved = []
        q, k, v = blocks
        for wave in self.plan.waves:
            if outputs:
                front = front.after(k, v, wave.carry, decay)
            q, k, v, read, pair = (x[wave.segments] for x in (*blocks, *self.decay))
            before = (front.keys, front.values)
            outputs.append(block_output(q, front.state, before, (k, v), (read, pair)))
            if len(wave.kept):
                moved.append((wave.kept_rows, front.state.detach()[wave.kept]))
        return torch.cat(outputs), moved

    def _blocks(self, tape: Tensor, x: Tensor) -> Tensor:
        """Tokens ``[total, H, d]`` in their blocks ``[segments, H, L, d]``, after older ones."""
        blocks = _only(tape[self.current[0]], self.current[1])
        if later := self.plan.segments - len(blocks):
            blocks = torch.cat([blocks, blocks.new_zeros(later, *blocks.shape[1:])])
        return placed(blocks, self.plan.place, x)


def placed(blocks: Tensor, place: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Write ``x`` ``[n, H, d]`` into ``blocks`` ``[b, H, L, d]`` at (block, offset) places."""
    blocks.transpose(1, 2)[place] = x
    return blocks


def _only(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` where valid and 0 elsewhere, whatever lies there (NaN · 0 is NaN)."""
    return x if mask is None else torch.where(mask, x, 0)


def _take(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x[places]
