"""The vanilla padded method of batch speculation: the baseline that EMS-SD does away with.

Rows bring different numbers of tokens, so inputs are padded to the longest draft, and rows accept
different numbers of drafts, so the key/value rectangle keeps holes (EMS-SD, arXiv 2405.07542,
section 2). Either half can be switched off, for the 2×2 ablation. Baseline only: nothing else in
the package decodes through this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retort.cache.attention import AttentionRowCache
from retort.cache.rows import PackedRows, RowCache
from retort.decode.engine import Engine
from retort.decode.packed import Feed, PackedModel
from retort.errors import ConfigurationError


class PaddedEngine(Engine):
    """An `Engine` whose passes are padded.

    Args:
        pad_input: every row brings as many tokens as the longest one.
        pad_cache: keys and values lie in one rectangle, rejected drafts and padding stay as holes.
    """

    def __init__(
        self, *args: Any, pad_input: bool = True, pad_cache: bool = True, **options: Any
    ) -> None:
        self._padding = {"pad_input": pad_input, "pad_cache": pad_cache}
        # The vanilla method reads all prompts of a batch at once, as one rectangle.
        super().__init__(*args, **{"max_prefill_tokens": 2**31, **options})

    def _build_target(self, **options: Any) -> PackedModel:
        return PaddedModel(self.model, **self._padding, **options)


class PaddedModel(PackedModel):
    """`PackedModel` with padded inputs, a padded cache, or both; attention models only."""

    def __init__(
        self, model: Any, *, pad_input: bool = True, pad_cache: bool = True, **options: Any
    ) -> None:
        self._pad_input, self._pad_cache = pad_input, pad_cache
        self.padding_tokens = 0
        if hasattr(model, "new_row_cache"):
            raise ConfigurationError("the padded baseline exists for attention models only")
        super().__init__(model, **options)

    def _new_cache(self, tape: str, max_draft: int) -> RowCache:
        if self._pad_cache:
            return RectangularCache(self._pad_input)
        return UnpaddingCache() if self._pad_input else super()._new_cache(tape, max_draft)

    def forward(self, feeds: Sequence[Feed], keep: Sequence[int], greedy: bool = False) -> Tensor:
        """As `PackedModel.forward`, with every feed padded on the left to the longest one."""
        if not self._pad_input:
            return super().forward(feeds, keep, greedy)
        width, most = max(len(t) for _, t in feeds), max(keep)
        ids = torch.tensor([[0] * (width - len(t)) + list(t) for _, t in feeds])
        layout = self.cache.begin([row for row, _ in feeds], [len(t) for _, t in feeds])
        wide = PackedRows((0,) * len(feeds), (width,) * len(feeds), (0,) * len(feeds))
        index = torch.tensor(wide.last_indices([most] * len(feeds)))
        positions = _padded_positions(layout, width)
        logits = self._guarded(ids.flatten()[None], positions, index, greedy)
        self._count(len(feeds) * width)
        self.padding_tokens += len(feeds) * width - layout.total
        wanted = [i * most + p for i, k in enumerate(keep) for p in range(most - k, most)]
        return logits[wanted]


class UnpaddingCache(AttentionRowCache):
    """Row buffers under padded inputs: the padding is dropped before keys are stored."""

    def split(self, states: Tensor) -> Tensor:
        """Real tokens of left-padded ``[1, heads, rows · width, dim]``."""
        return states[:, :, self._real(states)]

    def _append(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        """The real tokens' keys and values."""
        super()._append(self.split(keys), self.split(values), layer_idx)

    def attend(self, layer_idx: int, query: Tensor, value_dim: int, **options: Any) -> Tensor:
        """Attention of the real queries; padding gets zeros."""
        real = self._real(query)
        out = query.new_zeros(query.shape[2], query.shape[1], value_dim)
        out[real] = super().attend(layer_idx, query[:, :, real], value_dim, **options)
        return out

    def _real(self, states: Tensor) -> Tensor:
        counts = self._active().counts
        width = states.shape[2] // len(counts)
        return torch.cat(
            [torch.arange((i + 1) * width - c, (i + 1) * width) for i, c in enumerate(counts)]
        )


class RectangularCache(AttentionRowCache):
    """One rectangle ``[rows, kv_heads, columns, head_dim]`` a layer, as long as its longest row.

    Every pass appends the same columns to all rows; ``_columns[row]`` lists those that count.
    """

    shares_prefixes = False

    def __init__(self, padded_input: bool) -> None:
        super().__init__()
        self._padded_input = padded_input
        self._columns: dict[int, list[int]] = {}
        self._layers: dict[int, Tensor] = {}
        self._end = self._width = 0
        self._mask: Tensor | None = None

    def _append(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        """Every row's new columns, padding included."""
        pair = torch.stack([self._fold(keys), self._fold(values)])
        store = self._store(layer_idx, pair)
        rows = torch.tensor(self._active().rows)
        store[:, rows, :, self._end : self._end + self._width] = pair

    def attend(self, layer_idx: int, query: Tensor, value_dim: int, **options: Any) -> Tensor:
        """Attention over the whole rectangle, holes masked."""
        rows = torch.tensor(self._active().rows)
        keys, values = self._layers[layer_idx][:, rows, :, : self._end + self._width]
        out = F.scaled_dot_product_attention(
            self._fold(query), keys, values, self._mask, scale=options["scaling"], enable_gqa=True
        )
        flat = out.transpose(1, 2)
        return flat.flatten(0, 1) if self._padded_input else flat[self._place()]

    # The contract
    def _open(self, row: int) -> None:
        self._columns[row] = []

    def _close(self, row: int) -> None:
        del self._columns[row]

    def _rewind(self, row: int, length: int) -> None:
        del self._columns[row][length:]

    def _copy_rows(self, order: Sequence[int]) -> None:
        columns = dict(self._columns)
        self._columns = {i: list(columns[row]) for i, row in enumerate(order)}
        self._layers = {n: store[:, torch.tensor(order)] for n, store in self._layers.items()}

    def _faults(self) -> list[str]:
        rows = self._lengths.items()
        return [f"row {r} has {n} tokens" for r, n in rows if n != len(self._columns[r])]

    def _reserve(self, layout: PackedRows) -> None:
        self._end = 1 + max((c[-1] for c in self._columns.values() if c), default=-1)
        self._width = max(layout.counts)
        self._mask = self._causal_mask(layout)
        end = self._end + self._width
        for row, count in zip(layout.rows, layout.counts, strict=True):
            self._columns[row] += range(end - count, end)

    def cancel(self) -> None:
        """Drop a pass that failed, its columns too."""
        for row, start in zip(self._active().rows, self._active().starts, strict=True):
            del self._columns[row][start:]
        super().cancel()

    def _causal_mask(self, layout: PackedRows) -> Tensor:
        """Bool ``[rows, 1, width, end + width]``; padding sees itself, so that it stays finite."""
        past = torch.zeros(len(layout.rows), self._end, dtype=torch.bool)
        for i, row in enumerate(layout.rows):
            past[i, self._columns[row]] = True
        at = torch.arange(self._width)
        first = self._width - torch.tensor(layout.counts)[:, None, None]
        new = (at[None, None] <= at[None, :, None]) & (at[None, None] >= first)
        new |= torch.eye(self._width, dtype=torch.bool)
        past = past[:, None].expand(-1, self._width, -1)
        return torch.cat((past, new), -1)[:, None]

    def _store(self, layer_idx: int, pair: Tensor) -> Tensor:
        """The layer's rectangle, with room for the new columns."""
        rows, need = max(self._columns) + 1, self._end + self._width
        old = self._layers.get(layer_idx)
        if old is None or old.shape[1] < rows or old.shape[3] < need:
            room = max(rows, 0 if old is None else old.shape[1]), int(need * 1.25) + 16
            new = pair.new_zeros(2, room[0], pair.shape[2], room[1], pair.shape[4])
            if old is not None:
                new[:, : old.shape[1], :, : old.shape[3]] = old[:, :, :, : room[1]]
            self._layers[layer_idx] = new
        return self._layers[layer_idx]

    def _fold(self, states: Tensor) -> Tensor:
        """``[1, heads, tokens, dim]`` as ``[rows, heads, width, dim]``, real tokens rightmost."""
        rows = len(self._active().rows)
        if self._padded_input:
            return states[0].unflatten(1, (rows, self._width)).transpose(0, 1)
        out = states.new_zeros(rows, self._width, states.shape[1], states.shape[3])
        out[self._place()] = states[0].transpose(0, 1)
        return out.transpose(1, 2)

    def _place(self) -> tuple[Tensor, Tensor]:
        """Row and column in the rectangle of each packed token."""
        counts = self._active().counts
        row = torch.tensor([i for i, c in enumerate(counts) for _ in range(c)])
        return row, torch.tensor([self._width - c + j for c in counts for j in range(c)])


def _padded_positions(layout: PackedRows, width: int) -> Tensor:
    """Positions of left-padded tokens, ``[1, rows · width]``; padding stands at 0."""
    rows = [
        [0] * (width - count) + list(range(start, start + count))
        for start, count in zip(layout.starts, layout.counts, strict=True)
    ]
    return torch.tensor([rows]).flatten(1)
