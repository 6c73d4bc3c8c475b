"""Linear layers on weights that PyTorch's oneDNN packed once: for machines without the core.

``F.linear`` packs a weight on every call, and with 2 to 16 rows that costs more than the product.
oneDNN takes it in the order that its kernels read, which is a permutation: unpacking is exact.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retort.ops.pages import LargePages
from retort.ops.swapped import SwappedLinear, SwappedLinears, swap_linears

_ROWS = 8  # the number of rows that oneDNN is told to expect; others take the same layout


class PrepackedLinear(SwappedLinear):
    """A float32 linear layer on oneDNN's layout.

    Args:
        source: an ``nn.Linear`` or a transformers ``Conv1D`` in float32 on the CPU.

    Raises:
        RuntimeError: oneDNN refuses the weight.
    """

    packed: Tensor

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, oneDNN's padding of odd sizes left out."""
        return self.packed.numel() * self.packed.dtype.itemsize

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}"

    def _pack(self, _pages: LargePages | None) -> None:
        self.packed = _reorder(self._matrix().detach().contiguous())

    def _unpack(self) -> Tensor:
        return self.packed.to_dense()

    def _product(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32 or x.dim() < 2 or self._traced():
            matrix = self._unpack() if self.weight.is_meta else self._matrix()
            return F.linear(x, matrix, self.bias)
        return _multiply(x, self.packed, self.bias)

    def _traced(self) -> bool:
        """A compiler brings its own packing, and cannot look into oneDNN's."""
        return torch.compiler.is_compiling() and not self.weight.is_meta


def prepack_linears(model: nn.Module, *, release: bool = False) -> SwappedLinears:
    """Replace the float32 linear layers of ``model`` by prepacked ones; see `available`.

    Args:
        model: a model on the CPU; what oneDNN does not take stays in ``F.linear``.
        release: drop original weights that only new layers use (a tied embedding keeps its own).

    Returns:
        A handle with ``restore()`` and ``refresh()``.
    """
    return swap_linears(model, _prepacked, release)


def available() -> bool:
    """Whether this PyTorch has oneDNN's packed product switched on, and it computes rightly."""
    return bool(torch.backends.mkldnn.enabled) and _works()


def _prepacked(source: Any) -> SwappedLinear | str:
    if source.weight.dtype is not torch.float32 or not source.weight.is_cpu:
        return "only float32 on the CPU is prepacked"
    try:
        return PrepackedLinear(source)
    except RuntimeError as error:
        return f"oneDNN refuses it: {str(error).splitlines()[0]}"


@cache
def _works() -> bool:
    """One small product and its weight back: these operators are not a public interface."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.rand(s, generator=generator) for s in ((3, 19), (35, 19), (35,)))
    try:
        with torch.no_grad():
            packed = _reorder(weight)
            same = torch.equal(packed.to_dense(), weight)
            return same and torch.allclose(_multiply(x, packed, bias), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
