"""The attention cache on a CUDA device: one variable-length attention call for all rows.

Keys and values of the rows in a pass are laid end to end and torch's `varlen_attn` attends them,
with the split over keys switched off, so that a row's result does not depend on its company.
Unmeasured: this path has not run on a GPU yet; its layout is tested against a naive twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retort.cache.attention import AttentionRowCache, spans

HALVES = (torch.float16, torch.bfloat16)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has variable-length attention for such tensors."""
    return device.type == "cuda" and dtype in HALVES


class VarlenAttentionRowCache(AttentionRowCache):
    """Rows as in `AttentionRowCache`, attended in one call; what varlen lacks goes row by row."""

    def attend(self, layer_idx: int, query: Tensor, value_dim: int, **options: Any) -> Tensor:
        """See `AttentionRowCache.attend`; softcap, sinks and unequal widths go row by row."""
        special = options.get("softcap") is not None or options.get("sinks") is not None
        if special or value_dim != query.shape[-1]:
            return super().attend(layer_idx, query, value_dim, **options)
        rows = spans(self._active())
        lengths = [start + hi - lo for _, start, lo, hi in rows]
        pairs = [self.keys_values(r[0], layer_idx, n) for r, n in zip(rows, lengths, strict=True)]
        keys, values = (torch.cat(parts, 1).transpose(0, 1) for parts in zip(*pairs, strict=True))
        counts = [hi - lo for _, _, lo, hi in rows]
        window = options.get("sliding_window")
        return _varlen_attn(
            query[0].transpose(0, 1),
            keys,
            values,
            _starts(counts, query.device),
            _starts(lengths, query.device),
            max(counts),
            max(lengths),
            scale=options["scaling"],
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
            num_splits=1,
        )


def _varlen_attn(*tensors: Any, **options: Any) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*tensors, **options)  # type: ignore[return-value]


def _starts(counts: list[int], device: torch.device) -> Tensor:
    """Where each row begins, and the end: int32 ``[rows + 1]``."""
    return torch.tensor([0, *counts], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
