"""Linear layers of a model on the native core's packed weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from retort.ops import native
from retort.ops.linear import packed_linear
from retort.ops.pages import LargePages
from retort.ops.panels import PackedWeight, pack, unpack
from retort.ops.swapped import SwappedLinear, SwappedLinears, swap_linears


class PackedLinear(SwappedLinear):
    """A linear layer whose weights stream once for all rows, see `retort.ops.linear`.

    Args:
        source: an ``nn.Linear`` or a transformers ``Conv1D``.
        precision, pages: as in `retort.ops.panels.pack`.
    """

    packed: PackedWeight

    def __init__(
        self, source: Any, precision: str = "auto", pages: LargePages | None = None
    ) -> None:
        super().__init__(source)
        self.precision = precision
        self.refresh(pages)

    @property
    def nbytes(self) -> int:
        """Bytes of the panels."""
        return self.packed.data.nbytes

    def extra_repr(self) -> str:
        """Sizes and storage type, for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, {self.packed.data.dtype}"

    def _pack(self, pages: LargePages | None) -> None:
        self.packed = pack(self._matrix(), self.bias, precision=self.precision, pages=pages)

    def _unpack(self) -> Tensor:
        return unpack(self.packed)

    def _product(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed)


def pack_linears(
    model: nn.Module, *, precision: str = "auto", release: bool = False
) -> SwappedLinears:
    """Replace every linear layer of ``model`` by a packed one.

    Args:
        model: a model on the CPU; expert tensors and subclasses of linear layers stay as they are.
        precision: storage, see `retort.ops.panels.pack`.
        release: drop original weights that only packed layers use (a tied embedding keeps its own).

    Returns:
        A handle with ``restore()`` and ``refresh()``.

    Raises:
        ConfigurationError: the native core is not available or a weight is not on the CPU.
    """
    native.library()
    pages = LargePages()
    return swap_linears(model, lambda child: PackedLinear(child, precision, pages), release)
