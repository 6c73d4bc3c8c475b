"""The trainer's own hooks into transformers' loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from retort.distill.trainer import DistillTrainer


class StepCallback(TrainerCallback):
    """Calls the trainer where a run starts and ends, and where an optimiser step is complete."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Open the run's log at the step where training goes on."""
        self.trainer.begin_run()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The student is as it will be saved, the best checkpoint's where that was asked for."""
        self.trainer.end_run()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The window's gradients are complete: move what has no place in the optimiser."""
        self.trainer.finish_step()
