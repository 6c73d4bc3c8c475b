"""Ragged causal attention on the CPU: all rows of a packed pass in one native call.

Each row brings any number of new tokens (a decoding step, drafts under verification, a prefill
chunk); their keys and values are appended to the row's own buffers and its whole cache is read
once for each key/value head. A query's bits depend on its row alone. The PyTorch twin is
`retort.ops.attention`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi


def _int64s(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


class RaggedLayout:
    """Which new tokens a pass brings to which row; one object serves all layers of a model.

    Args:
        starts: tokens in each row's cache before the pass.
        counts: new tokens of each row, at least 1; they are packed in this order.
        capacities: tokens for which each row's buffers have room.

    Raises:
        ConfigurationError: lengths differ, a count is below 1 or a row would outgrow its buffers.
    """

    def __init__(
        self, starts: Sequence[int], counts: Sequence[int], capacities: Sequence[int]
    ) -> None:
        if not len(starts) == len(counts) == len(capacities):
            raise ConfigurationError("starts, counts and capacities must have one entry for a row")
        for start, count, capacity in zip(starts, counts, capacities, strict=True):
            if start < 0 or count < 1 or start + count > capacity:
                raise ConfigurationError(
                    f"{count} new tokens after {start} do not fit a row buffer of {capacity}"
                )
        offsets = tuple(accumulate(counts, initial=0))
        self.starts, self.counts = tuple(starts), tuple(counts)
        self.rows, self.total, self.capacities = len(counts), offsets[-1], tuple(capacities)
        cost = [count * (start + count) for start, count in zip(starts, counts, strict=True)]
        order = sorted(range(self.rows), key=lambda row: -cost[row])
        self._arrays = [_int64s(a) for a in (starts, counts, offsets[:-1], capacities, order)]
        self._struct = abi.Rows(self.rows, *map(ctypes.addressof, self._arrays))
        self.address = ctypes.addressof(self._struct)


class RowBuffers:
    """Key and value buffers of one layer, in the row order of a layout.

    Args:
        keys: for each row ``[kv_heads, capacity, key_width]`` float32, contiguous, on the CPU.
        values: for each row ``[kv_heads, capacity, value_width]`` likewise.

    Attributes:
        addresses: where the keys of each row begin, then the values.

    Raises:
        ConfigurationError: a buffer is not as above.
    """

    addresses: list[int]

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        if len(keys) != len(values):
            raise ConfigurationError(f"{len(keys)} key buffers, {len(values)} value buffers")
        for key, value in zip(keys, values, strict=True):
            _check_buffer(key, keys[0])
            _check_buffer(value, values[0])
            if key.shape[:2] != value.shape[:2]:
                raise ConfigurationError(
                    f"key buffer {tuple(key.shape)} and value buffer {tuple(value.shape)} differ"
                )
        self._place(keys, values, [t.data_ptr() for t in (*keys, *values)])

    @classmethod
    def joined(cls, parts: Sequence[RowBuffers]) -> RowBuffers:
        """The rows of several, one after the other; nothing but their sizes is checked again.

        Raises:
            ConfigurationError: heads or widths differ, or there are none.
        """
        sizes = {(p.kv_heads, p.key_width, p.value_width) for p in parts}
        if len(sizes) != 1:
            raise ConfigurationError(f"buffers of one layer have one size, not {sorted(sizes)}")
        whole = cls.__new__(cls)
        keys, values = ([t for p in parts for t in p.tensors[i]] for i in (0, 1))
        starts = [p.addresses[: len(p.capacities)] for p in parts]
        ends = [p.addresses[len(p.capacities) :] for p in parts]
        whole._place(keys, values, [a for some in (*starts, *ends) for a in some])
        return whole

    def _place(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], addresses: list[int]
    ) -> None:
        self.tensors = tuple(keys), tuple(values)
        self.capacities = tuple(key.shape[1] for key in keys)
        self.kv_heads = keys[0].shape[0] if keys else 0
        self.key_width = keys[0].shape[2] if keys else 0
        self.value_width = values[0].shape[2] if values else 0
        self.addresses, self._pointers = addresses, _int64s(addresses)
        self.keys = ctypes.addressof(self._pointers)
        self.values = self.keys + 8 * len(keys)


def ragged_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    layout: RaggedLayout,
    buffers: RowBuffers,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append new keys and values to their rows and attend every new token to its own row.

    Args:
        query: ``[total, heads, key_width]`` float32; any strides but the last one, which is 1.
        key: new keys ``[total, kv_heads, key_width]``, or None where the buffers hold them already.
        value: new values ``[total, kv_heads, value_width]``, or None like ``key``.
        layout: the pass.
        buffers: this layer's buffers, in the layout's row order.
        scaling: factor on the scores.
        sliding_window: a query sees itself and the ``sliding_window - 1`` positions before it.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: ``[heads]`` float32, one extra score a head that takes probability and no value.

    Returns:
        ``[total, heads * value_width]`` float32. No gradient flows.

    Raises:
        ConfigurationError: a tensor does not fit the layout or the buffers, or there is no core.
    """
    if torch.compiler.is_compiling():
        return _ragged_attention_op(
            query, key, value, layout.starts, layout.counts, *map(list, buffers.tensors),
            scaling, sliding_window, softcap, sinks,
        )  # fmt: skip
    heads = _check_call(query, key, value, layout, buffers, sinks)
    if sliding_window is not None and sliding_window < 1:
        raise ConfigurationError(f"sliding_window must be at least 1, not {sliding_window}")
    out = torch.empty((layout.total, heads * buffers.value_width))
    shape = abi.Heads(
        heads, buffers.kv_heads, buffers.key_width, buffers.value_width, scaling,
        softcap or 0.0, sliding_window or 0, None if sinks is None else sinks.data_ptr(),
    )  # fmt: skip
    new_keys = (None, 0, 0) if key is None else (key.data_ptr(), key.stride(0), key.stride(1))
    new_values = (
        (None, 0, 0) if value is None else (value.data_ptr(), value.stride(0), value.stride(1))
    )
    call = abi.AttentionCall(
        layout.address, ctypes.addressof(shape), query.data_ptr(), query.stride(0),
        query.stride(1), *new_keys, *new_values, buffers.keys, buffers.values, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if layout.rows:
        native.library().retort_attention(call)
    return out


def _check_call(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    layout: RaggedLayout,
    buffers: RowBuffers,
    sinks: Tensor | None,
) -> int:
    """Number of query heads, after everything a pointer could get wrong was checked."""
    if buffers.capacities != layout.capacities:
        raise ConfigurationError(
            f"the layout speaks of capacities {layout.capacities}, the buffers have "
            f"{buffers.capacities}"
        )
    heads = query.shape[1] if query.dim() == 3 else 0
    _check_new("query", query, (layout.total, heads, buffers.key_width))
    if heads < 1 or (buffers.kv_heads and heads % buffers.kv_heads):
        raise ConfigurationError(
            f"{heads} query heads cannot share {buffers.kv_heads} key/value heads"
        )
    if (key is None) != (value is None):
        raise ConfigurationError("give new keys and new values, or neither")
    if key is not None and value is not None:
        _check_new("key", key, (layout.total, buffers.kv_heads, buffers.key_width))
        _check_new("value", value, (layout.total, buffers.kv_heads, buffers.value_width))
    if sinks is not None:
        _check_new("sinks", sinks, (heads,))
    return heads


def _check_new(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    good = tensor.dtype is torch.float32 and tensor.is_cpu and tensor.shape == shape
    if not good or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        raise ConfigurationError(
            f"{name} must be float32 {shape} on the CPU with neighbouring last elements, not "
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        )


def _check_buffer(buffer: Tensor, like: Tensor) -> None:
    good = buffer.dtype is torch.float32 and buffer.is_cpu and buffer.is_contiguous()
    shape = buffer.shape
    if not good or buffer.dim() != 3 or (shape[0], shape[2]) != (like.shape[0], like.shape[2]):
        raise ConfigurationError(
            "row buffers are float32 [kv_heads, capacity, width], contiguous, on the CPU, all of "
            f"one layer with the same heads and width; not {buffer.dtype} {tuple(shape)}"
        )


@torch.library.custom_op("retort::ragged_attention", mutates_args=("keys", "values"))
def _ragged_attention_op(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    starts: Sequence[int],
    counts: Sequence[int],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    layout = RaggedLayout(starts, counts, [k.shape[1] for k in keys])
    return ragged_attention(
        query, key, value, layout, RowBuffers(keys, values), scaling=scaling,
        sliding_window=sliding_window, softcap=softcap, sinks=sinks,
    )  # fmt: skip


@_ragged_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    starts: Sequence[int],
    counts: Sequence[int],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1] * values[0].shape[2])
