"""SiLU, softplus and RMSNorm of a recurrent model, on the native core inside `core_arithmetic`.

There a row's bits depend on its values alone. torch's own depend on where a row lies in the batch:
the last few elements of a tensor, and of each thread's part of it, take another formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from retort.ops.native import elementwise
from retort.ops.native.activation import activation

_on_core: ContextVar[bool] = ContextVar("on_core", default=False)


def core_arithmetic(wanted: bool) -> AbstractContextManager[None]:
    """Run the functions below on the native core for float32 tensors that need no gradient."""
    return _on_the_core() if wanted else nullcontext()  # torch.compile traces the latter


@contextmanager
def _on_the_core() -> Iterator[None]:
    token = _on_core.set(True)
    try:
        yield
    finally:
        _on_core.reset(token)


def on_core(x: Tensor) -> bool:
    """Whether the functions below run on the native core for ``x``."""
    if torch.compiler.is_compiling() or not _on_core.get():
        return False
    return x.dtype is torch.float32 and not (torch.is_grad_enabled() and x.requires_grad)


def silu(x: Tensor, other: Tensor | None = None) -> Tensor:
    """``x · sigmoid(x)``, times ``other`` where given; ``[..., n]``."""
    if on_core(x):
        return activation("silu", x, other)
    return F.silu(x) if other is None else F.silu(x) * other


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``, ``[..., n]``."""
    return activation("softplus", x) if on_core(x) else F.softplus(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) · weight`` over the last dimension; half precision is reduced in float32."""
    if on_core(x) and weight.dtype is torch.float32:
        return elementwise.rms_norm(x, elementwise.Norm(weight.detach(), eps))
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
