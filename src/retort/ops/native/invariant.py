"""Inside `row_invariant` PyTorch's activations and angles run on the native core.

PyTorch computes the last elements of a block with other code than the rest, so that the bits of
``torch.tanh`` depend on where a row lies in its batch. Linears and attention are swapped modules;
these functions are called in the middle of foreign forwards, hence a mode of the calling thread.
Nothing global is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from retort.ops.native.activation import activation

_FUNCTIONS: dict[Callable, str] = {
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
    torch.cos: "cos",
    Tensor.cos: "cos",
    torch.sin: "sin",
    Tensor.sin: "sin",
}


_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class row_invariant(TorchFunctionMode):
    """Run the functions above natively for float32 tensors on the CPU without gradients.

    Outer products of rotary angles become element products: no matrix product is left in a pass.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _FUNCTIONS.get(func)
        if name is not None and len(args) == 1 and not torch.is_grad_enabled():
            name = _variant(name, kwargs or {})
            if name is not None and _fits(args[0]):
                return activation(name, args[0])
        if func in _PRODUCTS and len(args) == 2 and args[0].shape[-1:] == (1,):
            return args[0] * args[1]  # an outer product (rotary angles): one term, the same bits
        return func(*args, **(kwargs or {}))


def _variant(name: str, kwargs: dict[str, Any]) -> str | None:
    """The core's name for a call with these keywords, None where it has no such function."""
    if name == "gelu":
        kwargs = dict(kwargs)
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(kwargs.pop("approximate", "none"), "")
    return name if name and not any(kwargs.values()) else None


def _fits(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype is torch.float32 and x.is_cpu
