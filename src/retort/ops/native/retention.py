"""Retention of packed ragged rows in one native call; its PyTorch twin is `cache.retention_waves`.

A token at offset i of block b (blocks of L tokens) reads the state at (b−1)·L and the tokens of
blocks b−1 and b up to itself: ``y = γ^(L+i+1) (q·S) + Σ_j γ^(L+i−j) (q·k_j) v_j``. Each number is
one sum in a fixed order, so that a row's bits depend on its own tokens alone: not on its company,
on how the passes were cut or on drafts that were taken back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi
from retort.ops.native.checks import addresses, int64s, require, require_counts
from retort.ops.retention import BlockDecay


class RetentionTables:
    """Sizes and decays of a retention layer, as the core reads them.

    Args:
        decay: for blocks of L tokens, float32 on the CPU.
        key_width, value_width: of a head.
    """

    def __init__(self, decay: BlockDecay, key_width: int, value_width: int) -> None:
        self.heads, self.block = decay.read.shape[:2]
        self.key_width, self.value_width = key_width, value_width
        h, length = self.heads, self.block
        shapes = {
            "read": (h, length, 1), "pair": (h, length, 2 * length), "write": (h, length, 1),
            "carry": (h, 1, 1),
        }  # fmt: skip
        self._tables = [getattr(decay, name).contiguous() for name in shapes]
        for table, (name, shape) in zip(self._tables, shapes.items(), strict=True):
            require(name, table, shape)
        self._struct = abi.Retention(
            h, key_width, value_width, length, *[t.data_ptr() for t in self._tables]
        )
        self.address = ctypes.addressof(self._struct)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one state."""
        return self.heads, self.key_width, self.value_width

    @property
    def page_shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of a page of keys and of a page of values."""
        return (self.heads, self.block, self.key_width), (self.heads, self.block, self.value_width)


@dataclass(frozen=True)
class RetentionRows:
    """Which new tokens a pass brings to which row, and where the rows keep what came before.

    Attributes:
        starts: tokens of each row before the pass.
        counts: new tokens of each row, at least 1.
        states: index of each row's state at (b−1)·L, b the block of its first new token; −1 where
            b < 2, since that state is empty.
        before, current: pages of blocks b−1 and b; −1 where a row has no token there.
        moved: where each row's state at (c−1)·L is wanted, c a later block of the pass; or −1.
        moved_blocks: c of each row.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    states: tuple[int, ...]
    before: tuple[int, ...]
    current: tuple[int, ...]
    moved: tuple[int, ...]
    moved_blocks: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        """Tokens of the pass."""
        return sum(self.counts)

    @cached_property
    def arrays(self) -> list[ctypes.Array]:
        """Starts, counts and offsets for the core."""
        offsets = list(accumulate(self.counts, initial=0))[:-1]
        return [int64s(a) for a in (self.starts, self.counts, offsets)]

    @cached_property
    def blocks(self) -> ctypes.Array:
        """`moved_blocks` for the core."""
        return int64s(self.moved_blocks)

    def check(self, block: int, states: int, pages: int, moved: int) -> None:
        """Refuse what would read or write outside.

        Raises:
            ConfigurationError: an index is too large, or something is missing that is read.
        """
        require_counts(self.counts, self.total)
        rows = zip(
            self.starts, self.counts, self.states, self.before, self.current, self.moved,
            self.moved_blocks, strict=True,
        )  # fmt: skip
        for start, count, state, before, current, moves, target in rows:
            first, last = start // block, (start + count - 1) // block
            missing = (
                (first >= 2 and state < 0)
                or (first >= 1 and before < 0)
                or (start % block and current < 0)
                or (moves >= 0 and not first < target <= last)
            )
            large = state >= states or max(before, current) >= pages or moves >= moved
            if start < 0 or missing or large:
                raise ConfigurationError(
                    f"a row of {count} tokens after {start} with state {state} of {states}, pages "
                    f"{before} and {current} of {pages}, moving to {moves} of {moved} at block "
                    f"{target}: something is missing or out of range"
                )


def ragged_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: RetentionRows,
    tables: RetentionTables,
    states: Tensor,
    pages: tuple[Tensor, Tensor],
    moved: Tensor,
) -> Tensor:
    """Y of the new tokens.

    Args:
        q, k: ``[total, heads, key_width]`` float32, contiguous.
        v: ``[total, heads, value_width]`` likewise.
        rows: the pass.
        tables: decays and sizes.
        states: ``[n, heads, key_width, value_width]``, read only.
        pages: keys ``[p, heads, L, key_width]`` and values ``[p, heads, L, value_width]``; read
            only, and only before each row's start.
        moved: ``[s, heads, key_width, value_width]``, receives the states that `rows` names.

    Returns:
        ``[total, heads, value_width]``. No gradient flows.

    Raises:
        ConfigurationError: a tensor does not fit, or there is no native core.
    """
    heads, dk, dv = tables.state_shape
    for name, x, width in (("q", q, dk), ("k", k, dk), ("v", v, dv)):
        require(name, x, (rows.total, heads, width))
    require("states", states, (len(states), heads, dk, dv))
    require("moved", moved, (len(moved), heads, dk, dv))
    for page, shape in zip(pages, tables.page_shapes, strict=True):
        require("a tape", page, (len(pages[0]), *shape))
    rows.check(tables.block, len(states), len(pages[0]), len(moved))
    out = torch.empty(rows.total, heads, dv)
    scores = torch.empty(rows.total, heads, 2 * tables.block)
    places = [addresses(p, x) for x in (rows.before, rows.current) for p in pages]
    kept = [addresses(states, rows.states), *places]
    moves = addresses(moved, rows.moved)
    call = abi.RetentionCall(
        tables.address, len(rows.counts), *map(ctypes.addressof, rows.arrays), q.data_ptr(),
        k.data_ptr(), v.data_ptr(), *map(ctypes.addressof, kept), ctypes.addressof(rows.blocks),
        ctypes.addressof(moves), None, scores.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if rows.total:
        native.library().retort_retention(call)
    return out


def fold_states(
    states: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    tables: RetentionTables,
    fresh: bool = False,
) -> None:
    """Each state one block later, in place: γ^L S + Σ_i γ^(L−1−i) k_i v_iᵀ.

    Args:
        states: ``[heads, key_width, value_width]`` each.
        keys, values: a whole page for each state.
        tables: decays and sizes.
        fresh: the states before are empty, whatever lies there.

    Raises:
        ConfigurationError: a tensor does not fit, or there is no native core.
    """
    if not len(states) == len(keys) == len(values):
        raise ConfigurationError(f"{len(states)} states, {len(keys)} and {len(values)} pages")
    shapes = (tables.state_shape, *tables.page_shapes)
    for group, shape in zip((states, keys, values), shapes, strict=True):
        for tensor in group:
            require("a state or page", tensor, shape)
    places = [int64s([t.data_ptr() for t in group]) for group in (states, keys, values)]
    call = abi.FoldCall(
        tables.address, len(states), *map(ctypes.addressof, places), int(fresh),
        torch.get_num_threads(),
    )  # fmt: skip
    if states:
        native.library().retort_fold(call)
