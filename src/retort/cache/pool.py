"""Storage that all rows share: entries lie along dim 1, and rows hold numbers of entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.inference_mode(False)
def grown(x: Tensor, size: int) -> Tensor:
    """``x`` with room for ``size`` entries in dim 1, usable in and out of inference mode."""
    larger = torch.zeros(x.shape[0], size, *x.shape[2:], dtype=x.dtype, device=x.device)
    larger[:, : x.shape[1]] = x
    return larger


def index(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers of entries as an int64 tensor that picks them."""
    return torch.tensor(numbers, dtype=torch.long, device=device)
