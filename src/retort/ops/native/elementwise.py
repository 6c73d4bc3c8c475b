"""RMSNorm and rotary positions as single passes over memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.native import abi


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm: ``x / rms(x) * (offset + weight)``, rms² = mean(x²) + eps.

    Attributes:
        weight: ``[n]`` float32.
        eps: added to the mean square.
        offset: 0 (Llama) or 1 (Gemma).
    """

    weight: Tensor
    eps: float
    offset: float = 0.0

    @cached_property
    def address(self) -> int:
        """Where the weight lies.

        Raises:
            ConfigurationError: it is not a float32 vector on the CPU without gaps.
        """
        weight = self.weight
        if weight.dtype != torch.float32 or weight.dim() != 1 or not weight.is_contiguous():
            raise ConfigurationError(
                f"a norm weight is a float32 vector, not {weight.dtype} {tuple(weight.shape)}"
            )
        if not weight.is_cpu:
            raise ConfigurationError(f"a norm weight must be on the CPU, not on {weight.device}")
        return weight.data_ptr()


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """Normalise the last dimension of ``x`` ``[..., n]`` float32; a row's bits ignore its company.

    Raises:
        ConfigurationError: type, device or width do not fit, or there is no native core.
    """
    if torch.compiler.is_compiling():
        return _rms_norm_op(x, norm.weight, norm.eps, norm.offset)
    n = norm.weight.shape[0]
    _check(x, n)
    rows = x.reshape(-1, n)
    rows = rows if rows.stride(1) == 1 or n == 1 else rows.contiguous()
    out = torch.empty(x.shape)
    call = abi.NormCall(
        rows.data_ptr(), rows.stride(0), rows.shape[0], n, norm.address, norm.eps, norm.offset,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.library().retort_norm(call)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split form: ``x cos + rotate_half(x) sin``.

    Args:
        x: ``[total, heads, width]`` float32, any strides but the last, which is 1.
        cos, sin: ``[total, rotated]`` float32, contiguous, ``rotated`` even and at most ``width``;
            the columns after ``rotated`` are copied.

    Returns:
        ``[total, heads, width]``, contiguous.

    Raises:
        ConfigurationError: a tensor is not as above, or there is no native core.
    """
    if torch.compiler.is_compiling():
        return _rotary_op(x, cos, sin)
    if x.dim() != 3 or (x.stride(2) != 1 and x.shape[2] > 1):
        raise ConfigurationError(f"rotary takes [total, heads, width], not {tuple(x.shape)}")
    total, heads, width = x.shape
    _check(x, width)
    check_angles(cos, sin, total, width)
    out = torch.empty(x.shape)
    call = abi.RotaryCall(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), total, heads,
        width, cos.shape[1], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    native.library().retort_rotary(call)
    return out


def check_angles(cos: Tensor, sin: Tensor, total: int, width: int) -> None:
    """Refuse ``cos`` and ``sin`` that are not ``[total, rotated]`` as `rotary` wants them."""
    for angles in (cos, sin):
        good = angles.dtype is torch.float32 and angles.is_cpu and angles.is_contiguous()
        if not good or angles.shape != (total, cos.shape[-1]) or cos.shape[-1] % 2:
            raise ConfigurationError(
                f"cos and sin must be float32 [{total}, even], contiguous, on the CPU, not "
                f"{angles.dtype} {tuple(angles.shape)}"
            )
    if cos.shape[1] > width:
        raise ConfigurationError(f"{cos.shape[1]} rotated columns exceed a head of {width}")


def _check(x: Tensor, n: int) -> None:
    if x.dtype is not torch.float32 or not x.is_cpu or x.shape[-1:] != (n,):
        raise ConfigurationError(
            f"expected float32 [..., {n}] on the CPU, not {x.dtype} {tuple(x.shape)} on {x.device}"
        )


@torch.library.custom_op("retort::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return rms_norm(x, Norm(weight, eps, offset))


@torch.library.custom_op("retort::rotary", mutates_args=())
def _rotary_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary(x, cos, sin)


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x.new_empty(x.shape)


@_rotary_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)
