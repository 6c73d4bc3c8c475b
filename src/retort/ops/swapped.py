"""Linear layers of a Hugging Face model that give their place to faster ones, and get it back.

The module tree keeps its names; only ``nn.Linear`` and transformers' ``Conv1D`` modules change
places with a `SwappedLinear`. Nothing global is patched.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retort.errors import ConfigurationError
from retort.ops.pages import LargePages


class SwappedLinear(nn.Module):
    """A linear layer with weights in a layout of its own, standing where ``source`` stood.

    ``weight`` and ``bias`` are the source's own parameters, so that names, tied weights and
    optimisers see no change; after `release` ``weight`` is an empty stand-in on the meta device.
    Where a gradient is asked for, the source computes.

    Args:
        source: an ``nn.Linear`` or a transformers ``Conv1D``.
    """

    source: Any
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.__dict__["source"] = source  # not a child: the tree keeps its names
        self.weight, self.bias = source.weight, source.bias
        self.transposed = type(source).__name__ == "Conv1D"
        self.trainable = self.weight.requires_grad
        self.training = source.training

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weight in its own layout."""

    @abstractmethod
    def _pack(self, pages: LargePages | None) -> None:
        """Store the present weight in the layer's layout."""

    @abstractmethod
    def _unpack(self) -> Tensor:
        """The stored weight as ``[out_features, in_features]``."""

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, without gradient."""

    def refresh(self, pages: LargePages | None = None) -> None:
        """Pack the present weights again, after an optimiser or a loader changed them."""
        if self.weight.is_meta:
            raise ConfigurationError("the original weights were released: nothing to pack again")
        self._pack(pages)

    def release(self) -> None:
        """Drop the original weight; the packed one remains and `unpacked` gives it back."""
        stand_in = torch.empty_like(self.weight, device="meta")
        self.weight = nn.Parameter(stand_in, requires_grad=False)
        self.source.weight = self.weight

    def unpacked(self) -> Tensor:
        """The weight in the source's layout and dtype, from the packed one."""
        matrix = self._unpack().to(self.weight.dtype)
        return matrix.t().contiguous() if self.transposed else matrix

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return self._differentiable(x)
        return self._product(x)

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

    def _matrix(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight


@dataclass(eq=False)
class SwappedLinears:
    """What `swap_linears` did to a model.

    Attributes:
        packed: module name → the layer that stands there.
        skipped: module or parameter name → why it stays as it was.
        places: parent, name in it and new layer; weak, so that a model can be collected.
    """

    packed: dict[str, SwappedLinear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    places: list[tuple[weakref.ref, str, SwappedLinear]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum({id(m): m.nbytes for m in self.packed.values()}.values())

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


def swap_linears(
    model: nn.Module, make: Callable[[Any], SwappedLinear | str], release: bool
) -> SwappedLinears:
    """Replace linear layers of ``model`` by what ``make`` makes of them.

    Args:
        model: expert tensors and subclasses of linear layers stay as they are.
        make: gives the new layer, or says why there is none.
        release: drop original weights that only new layers use (a tied embedding keeps its own).
    """
    handle = SwappedLinears()
    made: dict[int, SwappedLinear | str] = {}
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is None or not _is_linear(child):
                continue
            path = f"{prefix}.{name}" if prefix else name
            if id(child) not in made:
                made[id(child)] = _objection(child) or make(child)
            new = made[id(child)]
            if isinstance(new, str):
                handle.skipped[path] = new
                continue
            handle.packed[path] = new
            handle.places.append((weakref.ref(parent), name, new))
            setattr(parent, name, new)
    handle.skipped.update(_expert_tensors(model))
    if release:
        _release(model, {id(m): m for m in handle.packed.values()}.values())
    return handle


def _is_linear(module: nn.Module) -> bool:
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return isinstance(module, nn.Linear) or conv1d


def _objection(module: nn.Module) -> str | None:
    """Why a linear layer stays; None where nothing speaks for it."""
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is not packed"
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


def _release(model: nn.Module, packed: Iterable[SwappedLinear]) -> None:
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
