"""Weights of packed linear layers: in panels of 32 outputs, in bf16 where that is exact.

Panels are ``[ceil(n / 32), k, 32]``. Weights that bf16 holds exactly are stored in bf16 and
multiplied in fp32: half the traffic and the same numbers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from retort.errors import ConfigurationError
from retort.ops.native import abi
from retort.ops.pages import LargePages

PANEL = 32
PRECISIONS = ("auto", "float32", "bfloat16")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in panels, with the bias that belongs to it.

    Attributes:
        data: ``[panels, k, 32]`` float32 or bfloat16, contiguous.
        n: outputs of the layer.
        bias: ``[n]`` float32 or None.
        up: see `gated`.
    """

    data: Tensor
    n: int
    bias: Tensor | None = None
    up: PackedWeight | None = None

    @cached_property
    def k(self) -> int:
        """Inputs of the layer."""
        return self.data.shape[1]

    @cached_property
    def layer(self) -> abi.Linear:
        """What the native core reads."""
        bias = None if self.bias is None else self.bias.data_ptr()
        up = None if self.up is None else self.up.address
        bf16 = self.data.dtype == torch.bfloat16
        return abi.Linear(self.data.data_ptr(), bias, self.k, self.n, bf16, up)

    @cached_property
    def address(self) -> int:
        """Where `layer` lies."""
        return ctypes.addressof(self.layer)


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: str = "auto",
    pages: LargePages | None = None,
) -> PackedWeight:
    """Pack ``weight`` ``[n, k]``.

    Args:
        weight: float32 or a half type, on the CPU.
        bias: ``[n]`` or None.
        precision: ``"float32"``, ``"bfloat16"`` (rounds), or ``"auto"``: bf16 where it is exact.
        pages: where the packed weight goes; memory of its own if None.

    Raises:
        ConfigurationError: shapes, types, device or precision are not as above.
    """
    _check_weight(weight, bias, precision)
    rows = weight.detach()
    half = precision == "bfloat16" or (precision == "auto" and _is_bf16(rows))
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous().clone()
    panels = _to_panels(rows.to(torch.bfloat16 if half else torch.float32), pages)
    return PackedWeight(panels, weight.shape[0], bias)


def gated(gate: PackedWeight, up: PackedWeight) -> PackedWeight:
    """The layer ``silu(gate(x)) * up(x)`` on the two layers' own panels, in one pass.

    Raises:
        ConfigurationError: the layers differ in inputs or outputs, or are gated already.
    """
    if (gate.n, gate.k) != (up.n, up.k) or gate.up or up.up:
        raise ConfigurationError(
            f"gate and up must be plain layers of one shape, not {gate.n} × {gate.k} and "
            f"{up.n} × {up.k}"
        )
    return replace(gate, up=up)


def unpack(packed: PackedWeight) -> Tensor:
    """The weight ``[n, k]`` as it was packed, float32 (of a gated layer, the gate's)."""
    data = packed.data
    if data.dtype == torch.bfloat16:
        data = data.unflatten(2, (16, 2)).transpose(2, 3).flatten(2)
    rows = data.transpose(1, 2).reshape(-1, packed.k).float()
    return rows[: packed.n].contiguous()


def _is_bf16(rows: Tensor) -> bool:
    """Whether bf16 holds every value; the first row tells of most weights that it does not."""
    parts = [rows] if rows.dtype == torch.bfloat16 else [rows[:1], rows]
    return all(bool((part.to(torch.bfloat16).to(part.dtype) == part).all()) for part in parts)


def _to_panels(rows: Tensor, pages: LargePages | None) -> Tensor:
    n, k = rows.shape
    panels = -(-n // PANEL)
    missing = panels * PANEL - n
    rows = (F.pad(rows, (0, 0, 0, missing)) if missing else rows).reshape(panels, PANEL, k)
    if rows.dtype == torch.bfloat16:
        rows = rows.view(panels, 2, 16, k).transpose(1, 2).reshape(panels, PANEL, k)
    columns = rows.transpose(1, 2)
    if pages is None:
        return columns.contiguous()
    return pages.take(columns.shape, rows.dtype).copy_(columns)


def _check_weight(weight: Tensor, bias: Tensor | None, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigurationError(f"precision must be one of {PRECISIONS}, not {precision!r}")
    if weight.dim() != 2 or weight.dtype not in TYPES or weight.device.type != "cpu":
        raise ConfigurationError(
            f"a packed weight is a float32 or half matrix on the CPU, not {weight.dtype} "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigurationError(f"bias {tuple(bias.shape)} does not fit {tuple(weight.shape)}")
