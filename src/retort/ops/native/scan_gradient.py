"""The selective scan with gradients on the native core; its PyTorch twin is `selective_scan`.

Kept are the states after every 16th token; the backward pass scans each such chunk again, so that
memory is that of the inputs. Sums over channels and rows have one order whatever the threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.ops import native
from retort.ops.native import abi
from retort.ops.native.checks import int64s, require, require_counts, require_rows
from retort.ops.native.scan import ScanRows, ragged_scan
from retort.ops.selective_scan import ScanInputs

CHUNK = 16  # tokens scanned again at a time: their states and decays fit the first cache
PART = 128  # channels whose gradients of B and C are summed by one thread


@dataclass(frozen=True)
class TrainedRows:
    """Rows of a training pass, each of which starts from nothing.

    Attributes:
        counts: tokens of each row, at least 1; they are packed in this order.
    """

    counts: tuple[int, ...]

    @cached_property
    def scan(self) -> ScanRows:
        """The rows with a kept state after each chunk but a row's last."""
        offsets = list(accumulate(self.counts, initial=0))
        ends = [
            offset + end - 1
            for offset, count in zip(offsets, self.counts, strict=False)
            for end in range(CHUNK, count, CHUNK)
        ]
        kept = tuple((token, i) for i, token in enumerate(ends))
        return ScanRows(self.counts, (-1,) * len(self.counts), kept)

    @cached_property
    def first_kept(self) -> ctypes.Array:
        """Of each row, the number of its first kept state."""
        return int64s(list(accumulate(((n - 1) // CHUNK for n in self.counts), initial=0)))


def trained_scan(inputs: ScanInputs, c: Tensor, rows: TrainedRows) -> Tensor:
    """y ``[total, D]`` without the D·u term, differentiable in all of its inputs.

    Args:
        inputs: A ``[N, D]`` contiguous, Δ and u ``[total, D]``, B ``[total, N]``; float32 on the
            CPU with neighbouring columns.
        c: C ``[total, N]``; it may be another layer's.
        rows: where rows begin and end.

    Raises:
        ConfigurationError: a tensor does not fit, or there is no native core.
    """
    return _TrainedScan.apply(*inputs, c, rows)


class _TrainedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, dt: Tensor, b: Tensor, u: Tensor, c: Tensor, rows: TrainedRows
    ) -> Tensor:
        require_counts(rows.counts, len(u))
        kept = a.new_empty(len(rows.scan.kept), *a.shape)
        y = ragged_scan(ScanInputs(a, dt, b, u), c, rows.scan, kept[:0], kept)
        assert y is not None
        ctx.rows = rows
        ctx.save_for_backward(a, dt, b, u, c, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, c, kept = ctx.saved_tensors
        return (*scan_gradient(ScanInputs(*tensors), c, ctx.rows, kept, grad), None)


def scan_gradient(
    inputs: ScanInputs, c: Tensor, rows: TrainedRows, kept: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A, Δ, B, u and C, shaped as these.

    Args:
        inputs: as in `trained_scan`.
        c: C ``[total, N]``.
        rows: the rows.
        kept: their kept states ``[k, N, D]``.
        grad: the gradient of y ``[total, D]``.

    Raises:
        ConfigurationError: a tensor does not fit, or there is no native core.
    """
    (states, channels), total, grad = inputs.a.shape, len(inputs.u), grad.contiguous()
    require_counts(rows.counts, total)
    require("A", inputs.a, (states, channels))
    require("kept", kept, (len(rows.scan.kept), states, channels))
    wide = {"dt": inputs.dt, "u": inputs.u, "grad": grad}
    for name, x in (wide | {"B": inputs.b, "C": c}).items():
        require_rows(name, x, total, channels if name in wide else states)
    grad_a = grad.new_empty(len(rows.counts), states, channels)
    grad_dt, grad_u = torch.empty_like(grad), torch.empty_like(grad)
    grad_bc = grad.new_empty(-(-channels // PART), total, 2, states)
    counts, offsets = (ctypes.addressof(array) for array in rows.scan.arrays[:2])
    call = abi.ScanGradientCall(
        len(rows.counts), channels, states, total, CHUNK, PART, counts, offsets,
        ctypes.addressof(rows.first_kept),
        *(x.data_ptr() for x in (inputs.a, inputs.dt, inputs.u, inputs.b, c)),
        *(x.stride(0) for x in (inputs.dt, inputs.u, inputs.b, c)),
        *(x.data_ptr() for x in (kept, grad, grad_a, grad_dt, grad_u, grad_bc)),
        torch.get_num_threads(),
    )  # fmt: skip
    if total:
        native.library().retort_scan_gradient(call)
    grad_b, grad_c = grad_bc.sum(0).unbind(1)
    return grad_a.sum(0), grad_dt, grad_b, grad_u, grad_c
