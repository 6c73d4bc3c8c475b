"""Recurrent row caches as transformers' `past_key_values`: rectangles on top of rows.

A rectangular pass ``[B, T]`` feeds row b its *real* tokens and nothing for padding, so padding
anywhere costs neither position nor decay. The cache keeps the mask of the columns it has seen,
because transformers counts columns (`get_seq_length`, `crop`) where rows count tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retort.cache.rows import RowCache
from retort.errors import ConfigurationError, RewindError
from retort.ops import native


@dataclass(frozen=True)
class Feed:
    """One pass as the model sees it.

    Attributes:
        positions: int64 ``[B, T]``, each token's position in its own row.
        index: flat places ``[total]`` of the real tokens in ``B·T``; None where all are real.
    """

    positions: Tensor
    index: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` to the real tokens ``[total, ...]``, row after row."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, y: Tensor) -> Tensor:
        """Inverse of `pack`, zero at padding."""
        shape = self.positions.shape
        if self.index is not None:
            y = y.new_zeros(shape.numel(), *y.shape[1:]).index_copy(0, self.index, y)
        return y.unflatten(0, shape)


class RecurrentRowCache(RowCache):
    """A `RowCache` for recurrent mixers that also serves rectangles in plain transformers.

    ``shape`` holds the sizes of its states, by which a model knows a cache of its own, ``dtype``
    their type. With ``use_native`` unset the native core is never called.
    """

    is_compileable = False
    use_native = True
    shape: Any
    dtype: torch.dtype

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.columns = torch.ones(0, 0, dtype=torch.bool, device=device)

    @property
    def on_core(self) -> bool:
        """Whether passes without gradients run on the native core."""
        fits = self.dtype is torch.float32 and self.device.type == "cpu"
        return self.use_native and fits and not torch.compiler.is_compiling() and native.available()

    @contextmanager
    def feed(self, shape: torch.Size, attention_mask: Tensor | None) -> Iterator[Feed]:
        """One model pass over ``[B, T]`` tokens: packed inside begin/end, else rectangular.

        Args:
            shape: ``[B, T]`` of the new tokens.
            attention_mask: ``[B, T]`` or, with the past, ``[B, past + T]``; None where all are
                real. Packed passes take none.
        """
        if self.layout is not None:
            if tuple(shape) != (1, self.layout.total):
                raise ConfigurationError(
                    f"the packed pass has {self.layout.total} tokens, the input is {list(shape)}"
                )
            yield Feed(self.layout.position_ids(self.device), None)
            return
        real = self._new_columns(shape, attention_mask)
        positions = self._enter(real)
        all_real = attention_mask is None or bool(real.all())
        try:
            yield Feed(positions, None if all_real else real.flatten().nonzero()[:, 0])
        except BaseException:
            self.cancel()
            raise
        self.end()
        self.columns = torch.cat([self.columns, real], 1)

    def _new_columns(self, shape: torch.Size, mask: Tensor | None) -> Tensor:
        batch, width = shape
        if not self._lengths and batch:
            for _ in range(batch):
                self.add_row()
            self.columns = self.columns.new_ones(batch, 0)
        if self.rows != tuple(range(batch)) or len(self.columns) != batch:
            raise ConfigurationError(
                f"the cache holds {len(self._lengths)} rows, the input has {batch}: "
                "pass a cache of the same batch, or select its rows first"
            )
        if mask is None:
            return torch.ones(batch, width, dtype=torch.bool, device=self.device)
        past = self.columns.shape[1]
        if tuple(mask.shape) not in {(batch, width), (batch, past + width)}:
            raise ConfigurationError(
                f"attention_mask is {list(mask.shape)}; {batch} rows with {past} columns in the "
                f"cache and {width} new ones need [{batch}, {width}] or [{batch}, {past + width}]"
            )
        return mask[:, -width:].to(self.device, torch.bool)

    def _enter(self, real: Tensor) -> Tensor:
        counts = real.sum(1).tolist()
        starts = torch.tensor([self._lengths[row] for row in self.rows], device=self.device)
        fed = [(row, count) for row, count in zip(self.rows, counts, strict=True) if count]
        self.begin([row for row, _ in fed], [count for _, count in fed])
        return (starts[:, None] + real.long().cumsum(1) - 1).clamp_min(0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included (transformers' meaning); in packed use the longest row."""
        if len(self.columns):
            return self.columns.shape[1]
        return max(self._lengths.values(), default=0)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the end of every row, without a model forward.

        Args:
            tokens_to_remove: an int with transformers' meaning (−n removes the last n columns,
                0 nothing), or int64 ``[B]``: the number of real tokens each row keeps.

        Raises:
            RewindError: a row cannot go back that far; no row has changed then.
            ConfigurationError: a positive int, or a tensor of another size than the rows.
        """
        if isinstance(tokens_to_remove, Tensor):
            self._rewind_all(tokens_to_remove.tolist())
            return
        if tokens_to_remove > 0:
            raise ConfigurationError(
                f"crop({tokens_to_remove}): give a negative number of columns to remove, or a "
                "tensor with the length that each row keeps"
            )
        keep = self.columns.shape[1] + tokens_to_remove
        if keep < 0:
            raise RewindError(
                f"crop({tokens_to_remove}) goes beyond the past: the cache holds "
                f"{self.columns.shape[1]} columns"
            )
        lost = self.columns[:, keep:].sum(1).tolist()
        self._rewind_all([self._lengths[r] - n for r, n in zip(self.rows, lost, strict=True)])
        self.columns = self.columns[:, :keep]

    def _rewind_all(self, lengths: Sequence[int]) -> None:
        if len(lengths) != len(self._lengths):
            raise ConfigurationError(f"{len(lengths)} lengths for {len(self._lengths)} rows")
        for row, length in zip(self.rows, lengths, strict=True):
            self._check_reach(row, length)
        for row, length in zip(self.rows, lengths, strict=True):
            self.rewind(row, length)
        kept = self.columns.long().cumsum(1) <= torch.tensor(lengths, device=self.device)[:, None]
        self.columns = self.columns & kept

    def _check_reach(self, row: int, length: int) -> None:
        if not self.earliest(row) <= length <= self._lengths[row]:
            raise RewindError(
                f"row {row} cannot be cropped to length {length}: it holds {self._lengths[row]} "
                f"tokens and its earliest reachable length is {self.earliest(row)}"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row ``beam_idx[i]`` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` neighbouring rows."""
        self.batch_select_indices(torch.arange(len(self._lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows become copies of the rows at ``indices`` ``[n]`` (ids or a bool mask)."""
        places = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        order = [self.rows[i] for i in places.tolist()]
        self.select(order)
        if len(self.columns):
            self.columns = self.columns[places.to(self.device)]
