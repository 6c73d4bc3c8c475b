"""Attention key/value storage in which every row has a buffer of its own, and a rewind is a number.

Storage follows Σ(length + draft): a row's buffer grows geometrically with that row alone and never
with the longest one; it is at most twice what its tokens need. While a prompt is read in slices,
the tokens that count are those of the whole prompt: its room is taken at the first slice. Growing
with the slices would hold less for that time, but copy the row at 1.5, 2.25 ... times its length
(in all about twice its bytes), in passes for which the other rows wait; and on a CPU memory that
no token was written to is not the process's yet. Layer buffers are
``[2, kv_heads, capacity, head_dim]`` (keys, then values), made when a layer first appends, since
only then its shape is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retort.cache.rows import PackedRows, RowCache
from retort.ops.attention import row_attention

_GRANULE = 16
_ROOM = 1.25  # for what a row will read, and a little of what it will write
_GROWTH = 1.5  # of a row that is full; storage stays below twice the tokens


class AttentionRowCache(RowCache):
    """Keys and values of every row, addressed by the row's own positions.

    It stands in for a transformers ``Cache``: models call `update` and `get_seq_length`, the
    attention function reads `keys_values`.

    Args:
        poison: value written into new buffers (tests pass NaN to prove that spare capacity is
            never read); None leaves the memory as it comes.
    """

    is_compileable = False
    is_sliding = (False,)
    divisible = True

    def __init__(self, poison: float | None = None) -> None:
        super().__init__()
        self._poison = poison
        self._buffers: dict[int, dict[int, Tensor]] = {}
        self._capacity: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._given: tuple[Tensor, Tensor] | None = None

    # What transformers' decoders call
    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple:
        """Append packed keys and values, each ``[1, kv_heads, total, head_dim]``, to their rows."""
        self._given = keys, values
        self._append(keys, values, layer_idx)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: rows have lengths of their own, and positions are given explicitly."""
        return 0

    def newest(self, keys: Tensor, values: Tensor) -> bool:
        """Whether `update` was given these very tensors last, so that `attend` reads them.

        What a model makes of them later, e.g. copies for more heads, is nowhere in the cache.
        """
        return self._given is not None and self._given[0] is keys and self._given[1] is values

    def keys_values(self, row: int, layer_idx: int, length: int) -> tuple[Tensor, Tensor]:
        """Views ``[kv_heads, length, head_dim]`` of the first ``length`` keys and values."""
        keys, values = self._buffers[row][layer_idx][:, :, :length]
        return keys, values

    def attend(self, layer_idx: int, query: Tensor, value_dim: int, **options: Any) -> Tensor:
        """Attention of packed queries, each row over its own keys.

        Args:
            query: ``[1, heads, total, head_dim]``.
            options: see `retort.ops.attention.row_attention`.

        Returns:
            ``[total, heads, value_dim]``.
        """
        out = query.new_empty(query.shape[2], query.shape[1], value_dim)
        for row, start, lo, hi in spans(self._active()):
            keys, values = self.keys_values(row, layer_idx, start + hi - lo)
            attended = row_attention(query[0, :, lo:hi], keys, values, **options)
            out[lo:hi] = attended.transpose(0, 1)
        return out

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers, spare capacity included."""
        return sum(b.nbytes for layers in self._buffers.values() for b in layers.values())

    def capacity(self, row: int) -> int:
        """Tokens for which ``row`` has room."""
        return self._capacity[row]

    # The contract
    def _open(self, row: int) -> None:
        self._buffers[row], self._capacity[row] = {}, 0

    def _close(self, row: int) -> None:
        del self._buffers[row], self._capacity[row]
        self._expected.pop(row, None)

    def _expect(self, row: int, tokens: int) -> None:
        self._expected[row] = tokens

    def _reserve(self, layout: PackedRows) -> None:
        for row, start, lo, hi in spans(layout):
            need = start + hi - lo
            if need > self._capacity[row]:
                room = int(self._expected.pop(row, 0) * _ROOM)
                grown = int(self._capacity[row] * _GROWTH)
                self._grow(row, start, _round_up(max(need, room, grown)))

    def _rewind(self, row: int, length: int) -> None:
        """Nothing to do: positions from ``length`` on are overwritten before they are read."""

    def _copy_rows(self, order: Sequence[int]) -> None:
        buffers, capacity = dict(self._buffers), dict(self._capacity)
        for row in tuple(buffers):
            self._close(row)
        seen: set[int] = set()
        for i, row in enumerate(order):
            self._open(i)
            own = {n: b.clone() for n, b in buffers[row].items()} if row in seen else buffers[row]
            self._buffers[i], self._capacity[i] = own, capacity[row]
            seen.add(row)

    def _copy_piece(self, row: int, start: int, stop: int) -> dict[int, Tensor]:
        return {n: b[:, :, start:stop].clone() for n, b in self._buffers[row].items()}

    def _copy_in(self, row: int, state: Sequence[dict[int, Tensor]]) -> None:
        for layer in state[0]:
            whole = torch.cat([piece[layer] for piece in state], 2)
            known = max(whole.shape[2], self._expected.get(row, 0))
            self._capacity[row] = _round_up(int(known * _ROOM) + 1)
            self._buffers[row][layer] = self._new_buffer(whole, self._capacity[row])
            self._buffers[row][layer][:, :, : whole.shape[2]] = whole

    def _faults(self) -> list[str]:
        faults = [] if set(self._buffers) == set(self._lengths) else ["buffers of other rows"]
        for row, length in self._lengths.items():
            if length > self._capacity.get(row, 0):
                faults.append(f"row {row} has {length} tokens and room for less")
            sizes = {buffer.shape[2] for buffer in self._buffers.get(row, {}).values()}
            if sizes - {self._capacity.get(row)}:
                faults.append(f"row {row} has buffers of {sorted(sizes)} tokens")
        return faults

    def _append(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        pair = torch.cat((keys, values))
        for row, start, lo, hi in spans(self._active()):
            self._buffer(row, layer_idx, pair)[:, :, start : start + hi - lo] = pair[:, :, lo:hi]

    def _grow(self, row: int, used: int, capacity: int) -> None:
        self._capacity[row] = capacity
        for layer, old in self._buffers[row].items():
            new = self._new_buffer(old, capacity)
            new[:, :, :used] = old[:, :, :used]
            self._buffers[row][layer] = new

    def _buffer(self, row: int, layer: int, like: Tensor) -> Tensor:
        layers = self._buffers[row]
        if layer not in layers:
            layers[layer] = self._new_buffer(like, self._capacity[row])
        return layers[layer]

    def _new_buffer(self, like: Tensor, capacity: int) -> Tensor:
        new = like.new_empty(2, like.shape[1], capacity, like.shape[3])
        return new if self._poison is None else new.fill_(self._poison)

    def _active(self) -> PackedRows:
        if self.layout is None:
            raise RuntimeError("the cache is used outside a pass: call begin() first")
        return self.layout


def spans(layout: PackedRows) -> list[tuple[int, int, int, int]]:
    """``(row, start, lo, hi)`` of each row: its length before the pass, its packed token range."""
    return list(
        zip(layout.rows, layout.starts, layout.offsets[:-1], layout.offsets[1:], strict=True)
    )


def _round_up(tokens: int) -> int:
    return -(-tokens // _GRANULE) * _GRANULE
