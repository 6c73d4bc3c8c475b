"""Packed linear layers: weights stream once for all rows, and a row's bits ignore its company.

Every output is one sum in order of k whatever the number of rows. Without the native core the twin
multiplies unpacked weights in PyTorch, whose bits may depend on the number of rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi
from retort.ops.panels import TYPES, PackedWeight, unpack


def packed_linear(x: Tensor, weight: PackedWeight, residual: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` (+ ``residual``), or ``silu(gate) * up`` of a gated layer.

    Args:
        x: ``[..., k]`` on the CPU; half types are computed in float32 and rounded at the end.
        weight: of `pack`.
        residual: ``[..., n]`` like the result, for layers that are not gated.

    Returns:
        ``[..., outputs]`` in the dtype of ``x``. No gradient flows.

    Raises:
        ConfigurationError: shape, type or device are not as above.
    """
    if torch.compiler.is_compiling():
        up = (None, None) if weight.up is None else (weight.up.data, weight.up.bias)
        return _packed_linear_op(x, weight.data, weight.bias, weight.n, *up, residual)
    if residual is not None:
        _check_residual(x, weight, residual)
    dense = _dense(x, weight.k) and (residual is None or residual.is_contiguous())
    if not dense or not native.available():
        return packed_linears(x, (weight,), residual)[0]
    out = torch.empty((*x.shape[:-1], weight.n))
    add = None if residual is None else residual.data_ptr()
    native.library().retort_linear_dense(
        weight.address, x.data_ptr(), x.numel() // weight.k, out.data_ptr(), add,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _dense(x: Tensor, k: int) -> bool:
    """Whether ``x`` is what the shortest way to the core takes: float32 rows without gaps."""
    return bool(
        x.dtype is torch.float32
        and x.is_contiguous()
        and x.is_cpu
        and x.shape[-1:] == (k,)
        and x.numel()
    )


def packed_linears(
    x: Tensor, weights: Sequence[PackedWeight], residual: Tensor | None = None
) -> list[Tensor]:
    """Several packed layers of one input in one native call; ``residual`` goes to the first."""
    _check_input(x, weights)
    if residual is not None:
        _check_residual(x, weights[0], residual)
    if not native.available():
        return _twin(x, weights, residual)
    if x.dtype != torch.float32:
        wide = None if residual is None else residual.float()
        return [out.to(x.dtype) for out in packed_linears(x.float(), weights, wide)]
    return _native(x, weights, residual)


def packed_argmax(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Index and value of the largest output of each row, without storing the outputs.

    The first of equal outputs wins, as in ``torch.argmax``.

    Args:
        x: ``[..., k]`` on the CPU.
        weight: of `pack`, not gated.

    Returns:
        int64 ``[...]`` and float32 ``[...]``.
    """
    if torch.compiler.is_compiling():
        return _packed_argmax_op(x, weight.data, weight.bias, weight.n)
    _check_input(x, (weight,))
    if weight.up:
        raise ConfigurationError("packed_argmax() takes a plain layer, this one is gated")
    if not native.available():
        value, index = _twin(x.float(), (weight,), None)[0].max(-1)
        return index, value
    address, stride, m, _alive = _address(x.float())
    index = torch.empty(x.shape[:-1], dtype=torch.int64)
    value = torch.empty(x.shape[:-1])
    call = abi.ArgmaxCall(
        ctypes.addressof(weight.layer), address, stride, m,
        index.data_ptr(), value.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if m:
        native.library().retort_argmax(call)
    return index, value


def _twin(x: Tensor, weights: Sequence[PackedWeight], residual: Tensor | None) -> list[Tensor]:
    outs = []
    for weight in weights:
        out = _unpacked_linear(x, weight)
        outs.append(F.silu(out) * _unpacked_linear(x, weight.up) if weight.up else out)
    if residual is not None:
        outs[0] = outs[0] + residual
    return outs


def _unpacked_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return F.linear(x, unpack(weight).to(x.dtype), bias)


def _native(x: Tensor, weights: Sequence[PackedWeight], residual: Tensor | None) -> list[Tensor]:
    address, stride, m, _alive = _address(x)
    lead = x.shape[:-1]
    outs = [torch.empty((*lead, w.n)) for w in weights]
    count = len(weights)
    layers = weights[0].layer if count == 1 else (abi.Linear * count)(*[w.layer for w in weights])
    ends = (ctypes.c_int64 * (2 * count))(
        *[out.data_ptr() for out in outs], *[w.n for w in weights]
    )
    out_at = ctypes.addressof(ends)
    add, add_stride, _, _alive_too = (None, 0, 0, None) if residual is None else _address(residual)
    call = abi.LinearCall(
        ctypes.addressof(layers), count, address, stride, m, out_at, out_at + 8 * count,
        add, add_stride, torch.get_num_threads(),
    )  # fmt: skip
    if m:
        native.library().retort_linear(call)
    return outs


def _address(x: Tensor) -> tuple[int, int, int, Tensor]:
    """Address, row stride and number of rows of ``x`` as ``[rows, k]``, and who owns the memory."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x.data_ptr(), width, x.numel() // width, x
    rows = _rows(x)
    return rows.data_ptr(), rows.stride(0), rows.shape[0], rows


def _rows(x: Tensor) -> Tensor:
    """``x`` as ``[rows, k]`` with neighbouring columns; a copy where strides forbid it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _check_input(x: Tensor, weights: Sequence[PackedWeight]) -> None:
    if not x.is_cpu or x.dtype not in TYPES:
        raise ConfigurationError(
            f"a packed linear takes float32 or half types on the CPU, not {x.dtype} on {x.device}"
        )
    for weight in weights:
        if x.shape[-1:] != (weight.k,):
            raise ConfigurationError(
                f"input {tuple(x.shape)} does not fit a packed linear with {weight.k} inputs"
            )


def _check_residual(x: Tensor, weight: PackedWeight, residual: Tensor) -> None:
    shape = (*x.shape[:-1], weight.n)
    if weight.up or residual.shape != shape or residual.dtype != x.dtype or not residual.is_cpu:
        raise ConfigurationError(
            f"a residual is {x.dtype} {shape} for a layer without gate, "
            f"not {residual.dtype} {tuple(residual.shape)}"
        )


@torch.library.custom_op("retort::packed_linear", mutates_args=())
def _packed_linear_op(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    n: int,
    up: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    other = None if up is None else PackedWeight(up, n, up_bias)
    return packed_linears(x, (PackedWeight(data, n, bias, other),), residual)[0]


@_packed_linear_op.register_fake
def _(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    n: int,
    up: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("retort::packed_argmax", mutates_args=())
def _packed_argmax_op(
    x: Tensor, data: Tensor, bias: Tensor | None, n: int
) -> tuple[Tensor, Tensor]:
    return packed_argmax(x, PackedWeight(data, n, bias))


@_packed_argmax_op.register_fake
def _(x: Tensor, data: Tensor, bias: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    lead = x.shape[:-1]
    return x.new_empty(lead, dtype=torch.int64), x.new_empty(lead, dtype=torch.float32)
