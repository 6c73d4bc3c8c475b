"""What every wrapper checks before it takes an address."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from retort.errors import ConfigurationError


def int64s(values: Sequence[int]) -> ctypes.Array:
    """An array for the core; keep it alive as long as its address is in use."""
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def addresses(base: Tensor, places: Sequence[int]) -> ctypes.Array:
    """Addresses of ``base[place]`` for each place, null for negative ones."""
    start, step = base.data_ptr(), base.stride(0) * base.element_size()
    return int64s([start + step * place if place >= 0 else 0 for place in places])


def require(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse all but contiguous float32 of ``shape`` on the CPU.

    Raises:
        ConfigurationError: it is something else.
    """
    good = tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
    if not good or tensor.shape != shape:
        raise ConfigurationError(
            f"{name} must be contiguous float32 {shape} on the CPU, not {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        )


def require_rows(name: str, tensor: Tensor, total: int, width: int) -> None:
    """Refuse all but float32 ``[total, width]`` on the CPU with neighbouring columns.

    Raises:
        ConfigurationError: it is something else.
    """
    good = tensor.dtype is torch.float32 and tensor.is_cpu and tensor.shape == (total, width)
    if not good or (tensor.stride(1) != 1 and width > 1):
        raise ConfigurationError(
            f"{name} must be float32 {(total, width)} on the CPU with neighbouring columns, not "
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        )


def require_counts(counts: Sequence[int], total: int) -> None:
    """Refuse token counts below 1, or that are not all tokens of a pass.

    Raises:
        ConfigurationError: they do not fit.
    """
    if min(counts, default=1) < 1 or sum(counts) != total:
        raise ConfigurationError(f"rows of {list(counts)} tokens do not make {total} packed tokens")


def require_tokens(tokens: Tensor, total: int) -> None:
    """Refuse all but ascending int64 numbers of tokens below ``total``.

    Raises:
        ConfigurationError: they are something else.
    """
    good = tokens.dtype is torch.int64 and tokens.is_cpu and tokens.dim() == 1
    if good and len(tokens):
        good = bool((tokens.diff() > 0).all()) and 0 <= int(tokens[0]) <= int(tokens[-1]) < total
    if not good or not tokens.is_contiguous():
        raise ConfigurationError(
            f"tokens are ascending int64 numbers below {total}, not {tokens.dtype} "
            f"{tuple(tokens.shape)}"
        )


def require_windows(model: str, windows: Sequence[tuple[int, bool]]) -> None:
    """Refuse a model without layers, and a layer that reads what lies before layer 0.

    Args:
        model: its name, for the message.
        windows: of each layer, how many layers before it reads, and whether it has gates for them.

    Raises:
        ConfigurationError: names the layer.
    """
    if not windows:
        raise ConfigurationError(f"a {model} has at least one layer")
    for i, (window, gated) in enumerate(windows):
        if not 0 <= window <= i or (gated and not window):
            raise ConfigurationError(f"layer {i} has a window of {window} layers before")
