"""Sharded students (FSDP2): a whole copy of the weights to write with, gathered once a step.

Decoding a sharded model would gather every layer for every token, and would need all processes to
decode equally many. Instead each process holds a copy of the student that is not sharded: `refresh`
gathers the weights once an optimiser step, and decoding makes no collective call.
"""

from __future__ import annotations

import copy
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from retort.errors import ConfigurationError

_WRAPPER = "_checkpoint_wrapped_module."  # what activation checkpointing adds to names


class RolloutCopy:
    """The student as the engine needs it, beside a sharded one.

    Args:
        student: the model *before* it is sharded.
        device: where the copy lies; by default the student's device.

    Attributes:
        model: the copy, in evaluation mode and without gradients.

    Raises:
        ConfigurationError: the copy does not fit in the device's free memory; the sizes are named.
    """

    def __init__(self, student: Any, device: torch.device | str | None = None) -> None:
        place = torch.device(device if device is not None else student.device)
        require_room(student, place)
        self.model = copy.deepcopy(student).to(place).eval().requires_grad_(False)

    @torch.no_grad()
    def refresh(self, student: nn.Module) -> None:
        """Gather the student's weights, one tensor at a time; every process must call it."""
        ours = dict(self.model.named_parameters())
        for name, parameter in student.named_parameters():
            ours[name.replace(_WRAPPER, "")].copy_(whole(parameter))


def whole(tensor: Tensor) -> Tensor:
    """The tensor that shards make together; a plain one as it is. Collective for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_own(model: Any) -> None:
    """Gather what a sharded model's outermost group holds, e.g. its head, until the backward pass.

    Losses call the head outside of the model's own forward, after which FSDP2 may have let it go.
    Nothing happens for a model that is not sharded.
    """
    if isinstance(model, FSDPModule):
        model.unshard()


def require_room(model: nn.Module, device: torch.device) -> None:
    """Raise ConfigurationError, naming the sizes, where a copy of ``model`` does not fit."""
    needed, free = size(model), free_memory(device)
    if needed > free:
        raise ConfigurationError(
            f"sharded training writes with a whole copy of the student in each process: it needs "
            f"{needed / 1e9:.2f} GB on {device} and {free / 1e9:.2f} GB are free. Use a smaller "
            "student or dtype, fewer processes a machine, or a method that writes nothing (lmbda=0)"
        )


def size(model: nn.Module) -> int:
    """Bytes of parameters and buffers; tied weights count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
