"""What DAC-KL carries between optimiser steps: its sub-network, an optimiser, a dual variable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retort.distill.losses import BandNetwork, DacSettings, DacState, DacTerm


class Bands:
    """Owns the DAC term and moves its state once an optimiser step.

    The sub-network starts from ``seed`` alone and has an AdamW of its own [ours], so that the
    student's schedule and clipping leave the band alone.
    """

    def __init__(
        self,
        settings: DacSettings,
        learning_rate: float,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.state = settings, DacState()
        self.network: BandNetwork | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if settings.mode != "fixed":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.network = BandNetwork(tau=settings.tau).to(device)
            self.optimizer = torch.optim.AdamW(
                self.network.parameters(), lr=learning_rate, weight_decay=0.0
            )
        self.term = DacTerm(settings, self.network, self.state)

    def step(self, accelerator: Any) -> None:
        """Apply the gradients of the accumulation window, averaged over all processes.

        A process whose rows gave none takes part with zeros; the others would wait for it.
        """
        if self.network is None or self.optimizer is None:
            return
        for parameter in self.network.parameters():
            if parameter.grad is None and accelerator.num_processes > 1:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self, coverage: float | None) -> None:
        """Move the dual variable by the step's mean coverage (None: no token counted)."""
        if coverage is not None and self.settings.mode == "learned":
            self.state.update(coverage, self.settings)

    def numbers(self) -> dict[str, float]:
        """The state's plain numbers, for JSON."""
        return self.state.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors, for safetensors: the network's, then its optimiser's."""
        if self.network is None or self.optimizer is None:
            return {}
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def load(self, numbers: dict[str, float], tensors: dict[str, Tensor]) -> None:
        """Restore what `numbers` and `tensors` gave."""
        self.state.load_state_dict(numbers)
        if self.network is None or self.optimizer is None:
            return
        groups = _grouped(tensors)
        self.network.load_state_dict(groups["network"])
        whole = self.optimizer.state_dict()
        whole["state"] = {
            int(name.split(".")[1]): values
            for name, values in groups.items()
            if name.startswith("optimizer.")
        }
        self.optimizer.load_state_dict(whole)


def _grouped(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Names "network.a.b" and "optimizer.3.key" to {"network": {"a.b": …}, "optimizer.3": …}."""
    groups: dict[str, dict[str, Tensor]] = {"network": {}}
    for name, value in tensors.items():
        parts = name.split(".")
        size = 2 if parts[0] == "optimizer" else 1
        groups.setdefault(".".join(parts[:size]), {})[".".join(parts[size:])] = value
    return groups
