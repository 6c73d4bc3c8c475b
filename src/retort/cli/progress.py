"""A progress bar over a training run, on standard error."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Shows steps, the loss, and what revision did; a line every tenth of the run in a pipe."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(console=self.console, transient=True)
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar where the run starts."""
        self.bar.start()
        self.task = self.bar.add_task(
            "Training", total=state.max_steps, completed=state.global_step
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print the terms, ten times a run."""
        every = max(state.max_steps // 10, 1)
        if not logs or "loss" not in logs or state.global_step % every:
            return
        shown = ("loss", "sft", "dac", "span", "acceptance", "scrg/corrected")
        terms = [f"{name} {logs[name]:.3g}" for name in shown if name in logs]
        self.bar.console.print(f"      step {state.global_step}: {', '.join(terms)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away."""
        self.bar.stop()
