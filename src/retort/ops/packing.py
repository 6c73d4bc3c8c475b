"""Swap the linear layers of a Hugging Face model for packed ones, and put them back.

The module tree keeps its names; only ``nn.Linear`` and transformers' ``Conv1D`` modules change
places with a `PackedLinear`. Nothing global is patched.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retort.errors import ConfigurationError
from retort.ops import native
from retort.ops.linear import packed_linear
from retort.ops.pages import LargePages
from retort.ops.panels import pack, unpack


class PackedLinear(nn.Module):
    """A linear layer on packed weights, standing where ``source`` stood.

    ``weight`` and ``bias`` are the source's own parameters, so that names, tied weights and
    optimisers see no change; after `release` ``weight`` is an empty stand-in on the meta device.
    Where a gradient is asked for, the source computes.

    Args:
        source: an ``nn.Linear`` or a transformers ``Conv1D``.
        precision, pages: as in `retort.ops.panels.pack`.
    """

    source: Any
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, source: Any, precision: str = "auto", pages: LargePages | None = None
    ) -> None:
        super().__init__()
        self.__dict__["source"] = source  # not a child: the tree keeps its names
        self.weight, self.bias = source.weight, source.bias
        self.transposed = type(source).__name__ == "Conv1D"
        self.precision = precision
        self.trainable = self.weight.requires_grad
        self.training = source.training
        self.refresh(pages)

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.packed.k

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.packed.n

    def refresh(self, pages: LargePages | None = None) -> None:
        """Pack the present weights again, after an optimiser or a loader changed them."""
        if self.weight.is_meta:
            raise ConfigurationError("the original weights were released: nothing to pack again")
        self.packed = pack(self._matrix(), self.bias, precision=self.precision, pages=pages)

    def release(self) -> None:
        """Drop the original weight; the packed one remains and `restore` unpacks it."""
        stand_in = torch.empty_like(self.weight, device="meta")
        self.weight = nn.Parameter(stand_in, requires_grad=False)
        self.source.weight = self.weight

    def unpacked(self) -> Tensor:
        """The weight in the source's layout and dtype, from the packed one."""
        matrix = unpack(self.packed).to(self.weight.dtype)
        return matrix.t().contiguous() if self.transposed else matrix

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return self._differentiable(x)
        return packed_linear(x, self.packed)

    def _differentiable(self, x: Tensor) -> Tensor:
        if self.weight.is_meta:
            raise ConfigurationError(
                "the original weights were released: no gradient; pack with release=False to train"
            )
        return F.linear(x, self._matrix(), self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A plain layer: a copied model is one that no engine has packed."""
        copied = deepcopy(self.source, memo)
        if self.weight.is_meta:
            copied.weight = nn.Parameter(self.unpacked(), self.trainable)
        return copied

    def extra_repr(self) -> str:
        """Sizes and storage type, for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, {self.packed.data.dtype}"

    def _matrix(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight


@dataclass(eq=False)
class PackedLinears:
    """What `pack_linears` did to a model.

    Attributes:
        packed: module name → packed layer.
        skipped: module or parameter name → why it stays in PyTorch.
        places: parent, name in it and packed layer; weak, so that a model can be collected.
    """

    packed: dict[str, PackedLinear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    places: list[tuple[weakref.ref, str, PackedLinear]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        weights = {id(m): m.packed.data.nbytes for m in self.packed.values()}
        return sum(weights.values())

    def refresh(self) -> None:
        """Pack all layers again after a weight update (rollouts during training)."""
        pages = LargePages()
        for module in self.packed.values():
            module.refresh(pages)

    def restore(self) -> None:
        """Put every original module back; released weights are unpacked, ties kept."""
        unpacked: dict[int, nn.Parameter] = {}
        for place, name, module in self.places:
            if module.weight.is_meta:
                key = id(module.weight)
                if key not in unpacked:
                    unpacked[key] = nn.Parameter(module.unpacked(), module.trainable)
                module.source.weight = unpacked[key]
            module.source.train(module.training)
            if (parent := place()) is not None:
                setattr(parent, name, module.source)
        self.places.clear()


def pack_linears(
    model: nn.Module, *, precision: str = "auto", release: bool = False
) -> PackedLinears:
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
    handle, pages = PackedLinears(), LargePages()
    made: dict[int, PackedLinear] = {}
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            path = f"{prefix}.{name}" if prefix else name
            reason = "" if child is None else _objection(child)
            if reason is None:
                module = made.get(id(child)) or PackedLinear(child, precision, pages)
                made[id(child)] = module
                handle.packed[path] = module
                handle.places.append((weakref.ref(parent), name, module))
                setattr(parent, name, module)
            elif reason:
                handle.skipped[path] = reason
    handle.skipped.update(_expert_tensors(model))
    if release:
        _release(model, made.values())
    return handle


def _objection(module: nn.Module) -> str | None:
    """None: pack it; empty: not a linear layer; else why a linear layer stays."""
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if type(module) is not nn.Linear and not conv1d:
        return f"{type(module).__name__} is not packed" if isinstance(module, nn.Linear) else ""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "it has forward hooks"
    if module.weight.dtype == torch.float64:
        return "float64 is not packed"
    if not isinstance(module.weight, nn.Parameter) or hasattr(module, "parametrizations"):
        return "its weight is computed"
    return None


def _expert_tensors(model: nn.Module) -> dict[str, str]:
    return {
        name: "an expert tensor stays in PyTorch"
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name
    }


def _release(model: nn.Module, packed: Iterable[PackedLinear]) -> None:
    """Drop the weights that no module outside ``packed`` holds."""
    modules = list(packed)
    ours = {id(m) for m in modules}
    kept = {id(p) for m in model.modules() if id(m) not in ours for p in m._parameters.values()}
    stand_ins: dict[int, nn.Parameter] = {}
    for module in modules:
        key = id(module.weight)
        if key in kept:
            continue
        if key in stand_ins:
            module.weight = module.source.weight = stand_ins[key]
        else:
            module.release()
            stand_ins[key] = module.weight
