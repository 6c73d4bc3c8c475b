"""SiLU, softplus and pairwise rotary positions as single passes; bits depend on the values alone.

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


def silu(x: Tensor, other: Tensor | None = None) -> Tensor:
    """``x / (1 + e^−x)``, times ``other`` where given.

    Args:
        x: float32 ``[..., n]`` on the CPU.
        other: like ``x``.

    Returns:
        ``[..., n]``, contiguous. No gradient flows.

    Raises:
        ConfigurationError: type, device or shape do not fit, or there is no native core.
    """
    return _activation(x, other, 0)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``, also where torch takes x for it; arguments as in `silu`."""
    return _activation(x, None, 1)


def _activation(x: Tensor, other: Tensor | None, kind: int) -> Tensor:
    rows = _rows(x)
    m, n = rows.shape
    require_rows("x", rows, m, n)
    factor = None
    if other is not None:
        if other.shape != x.shape:
            raise ConfigurationError(f"{tuple(other.shape)} does not fit {tuple(x.shape)}")
        factor = _rows(other)
        require_rows("other", factor, m, n)
    out = torch.empty(x.shape)
    call = abi.ActivationCall(
        rows.data_ptr(), rows.stride(0), m, n, None if factor is None else factor.data_ptr(),
        0 if factor is None else factor.stride(0), kind, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if m:
        native.library().retort_activation(call)
    return out


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


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
