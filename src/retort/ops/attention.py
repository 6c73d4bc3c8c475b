"""Causal attention of one row's new queries over all of its keys: the PyTorch twin."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def row_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend the last ``n`` positions of a row to the whole row.

    Args:
        query: ``[heads, n, head_dim]``; query ``i`` stands at position ``length - n + i``.
        keys, values: ``[kv_heads, length, head_dim]``, the ``n`` new tokens included.
        scaling: factor on the scores.
        sliding_window: a query sees itself and the ``sliding_window - 1`` positions before it.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: ``[heads]``, one extra score a head that takes probability and gives no value.

    Returns:
        ``[heads, n, value_dim]`` in the dtype of ``query``.
    """
    mask = _causal_mask(query.shape[1], keys.shape[1], sliding_window, query.device)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            query[None], keys[None], values[None], mask, scale=scaling, enable_gqa=True
        )
        return out[0]
    return _explicit_attention(query, keys, values, mask, scaling, softcap, sinks)


def _causal_mask(n: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    if n == 1 and (window is None or window >= length):
        return None
    at = torch.arange(length - n, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    mask = key <= at
    return mask if window is None else mask & (key > at - window)


def _explicit_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = query @ keys.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), -1)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return probs.to(query.dtype)[..., : keys.shape[1]] @ values
