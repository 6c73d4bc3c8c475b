"""Activations and pairwise rotary positions as single passes; bits depend on the values alone.

torch computes the last few elements of a tensor, and of each thread's part of it, by another
formula than the others, so that a row's bits would depend on where it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi
from retort.ops.native.checks import require, require_rows

# In the order of the header's enumeration.
ACTIVATIONS = ("tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "cos", "sin", "softplus")


def activation(name: str, x: Tensor, other: Tensor | None = None) -> Tensor:
    """A function of each element of ``x``, times ``other`` where given.

    Softplus is ``log(1 + e^x)`` also where torch takes x for it.

    Args:
        name: one of `ACTIVATIONS`.
        x: float32 ``[..., n]`` on the CPU.
        other: like ``x``.

    Returns:
        ``[..., n]``, contiguous. No gradient flows.

    Raises:
        ConfigurationError: name, type, device or shape do not fit, or there is no native core.
    """
    if torch.compiler.is_compiling():
        return _activation_op(name, x, other)
    if name not in ACTIVATIONS:
        raise ConfigurationError(f"{name!r} is none of the activations {ACTIVATIONS}")
    if other is not None and other.shape != x.shape:
        raise ConfigurationError(f"{tuple(other.shape)} does not fit {tuple(x.shape)}")
    rows, factor = _rows("x", x), None if other is None else _rows("other", other)
    out = torch.empty(x.shape)
    call = abi.ActivationCall(
        rows.data_ptr(), rows.stride(0), *rows.shape, None if factor is None else factor.data_ptr(),
        0 if factor is None else factor.stride(0), ACTIVATIONS.index(name), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if out.numel():
        native.library().retort_activation(call)
    return out


def _rows(name: str, x: Tensor) -> Tensor:
    """``x`` as ``[rows, n]`` with neighbouring columns; a copy where strides forbid it."""
    rows = x.reshape(-1, x.shape[-1] if x.dim() and x.numel() else 1)
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    require_rows(name, rows, *rows.shape)
    return rows


@torch.library.custom_op("retort::activation", mutates_args=())
def _activation_op(name: str, x: Tensor, other: Tensor | None) -> Tensor:
    return activation(name, x, other)


@_activation_op.register_fake
def _(name: str, x: Tensor, other: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1) of every head by angle i of its token.

    Args:
        x: ``[total, heads, width]`` float32, any strides but the last, which is 1; width even.
        cos, sin: ``[total, width / 2]`` float32, contiguous.

    Returns:
        ``[total, heads, width]``, contiguous.

    Raises:
        ConfigurationError: a tensor is not as above, or there is no native core.
    """
    good = x.dim() == 3 and x.dtype is torch.float32 and x.is_cpu and x.shape[2] % 2 == 0
    if not good or x.stride(2) != 1:
        raise ConfigurationError(
            f"pairs lie in float32 [total, heads, even width] on the CPU with neighbouring last "
            f"elements, not {x.dtype} {tuple(x.shape)}, strides {x.stride()}"
        )
    total, heads, width = x.shape
    require("cos", cos, (total, width // 2))
    require("sin", sin, (total, width // 2))
    out = torch.empty(x.shape)
    call = abi.RotaryCall(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), total, heads,
        width, width, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if total:
        native.library().retort_rotate_pairs(call)
    return out
