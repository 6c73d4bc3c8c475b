"""Native calls that run all layers of a model, made once for its packed weights.

A call reads weights where they lie. What it was made of is looked at again before every pass, so
that weights packed anew, changed parameters, swapped linear layers and hooks on layers are seen;
hooks inside a layer are seen when the call is made, as with fused transformer layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from retort.errors import RetortError
from retort.models.dense import RMSNorm
from retort.ops.native.elementwise import Norm
from retort.ops.packing import PackedLinear
from retort.ops.panels import PackedWeight

Call = TypeVar("Call")


class UnknownPart(RetortError):
    """A layer holds something that the core does not know."""


class _Made(Generic[Call]):
    """A call, None where the core does not know all of the model, and what it was made of."""

    def __init__(self, modules: list[nn.Module], build: Callable[[], Call]) -> None:
        self._linears: list[tuple[ref[nn.Module], str, PackedWeight]] = []
        self._parameters: list[tuple[ref[nn.Module], str, tuple[int, int]]] = []
        for module in modules:
            if isinstance(module, PackedLinear):
                continue
            for name, child in module._modules.items():
                if isinstance(child, PackedLinear):
                    self._linears.append((ref(module), name, child.packed))
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._parameters.append((ref(module), name, _mark(parameter)))
        try:
            self.call = None if any(map(_is_changed, modules)) else build()
        except UnknownPart:
            self.call = None

    def is_fresh(self) -> bool:
        """Whether the model still holds the same weights in the same places."""
        for place, name, packed in self._linears:
            parent = place()
            child: Any = None if parent is None else parent._modules.get(name)
            if getattr(child, "packed", None) is not packed:
                return False
        for place, name, mark in self._parameters:
            parent = place()
            parameter = None if parent is None else parent._parameters.get(name)
            if parameter is None or _mark(parameter) != mark:
                return False
        return True


class OneCalls(Generic[Call]):
    """The calls of all models of one kind, by the first packed layer of each.

    That layer lives as long as the packing, so an engine that is closed leaves nothing behind.

    Args:
        build: makes the call of a model, or raises `UnknownPart`.
    """

    def __init__(self, build: Callable[[Any], Call]) -> None:
        self._build = build
        self._made: WeakKeyDictionary[nn.Module, _Made[Call]] = WeakKeyDictionary()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._made)

    def of(self, model: Any, first: nn.Module, modules: Iterable[nn.Module]) -> Call | None:
        """The call of ``model``; None where it does not run as one.

        Args:
            model: given to ``build``.
            first: a linear layer that is packed where all are.
            modules: what the call stands for, each with all modules inside it.
        """
        modules = list(modules)
        if not isinstance(first, PackedLinear) or any(map(_is_watched, modules)):
            return None
        made = self._made.get(first)
        if made is None or not made.is_fresh():
            inside = [m for module in modules for m in module.modules()]
            made = self._made[first] = _Made(inside, lambda: self._build(model))
        return made.call


def packed(module: Any) -> PackedWeight:
    """The packed weight of a linear layer.

    Raises:
        UnknownPart: it is not packed.
    """
    if type(module) is not PackedLinear:
        raise UnknownPart(f"{type(module).__name__} is not packed")
    return module.packed


def norm(module: Any) -> Norm:
    """The norm of one of our models.

    Raises:
        UnknownPart: it is of another kind or type.
    """
    if type(module) is not RMSNorm or module.weight.dtype is not torch.float32:
        raise UnknownPart(f"{type(module).__name__} is no float32 norm of ours")
    return Norm(module.weight.detach(), module.eps)


def _mark(parameter: torch.Tensor) -> tuple[int, int]:
    """Where a parameter lies, and how often it was changed there."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_changed(module: nn.Module) -> bool:
    return _is_watched(module) or "forward" in vars(module)
