"""Progress on standard error: bars for a person at a terminal, a few lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn
from transformers import TrainerCallback


def bar() -> Progress:
    """A bar that vanishes when it is done and shows nothing in a pipe."""
    console = Console(stderr=True, soft_wrap=True)
    return Progress(
        SpinnerColumn(),
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


SHOWN = (
    *("loss", "sft", "dac", "span", "acceptance", "scrg/corrected"),
    *("eval_perplexity", "eval_bits_per_byte", "tokens_per_second", "eta_seconds"),
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars and notices of other libraries between our own lines."""
    import datasets
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        datasets.enable_progress_bars()


class TrainingProgress(TrainerCallback):
    """Shows steps, the loss, and what revision did; a line every tenth of the run in a pipe."""

    def __init__(self) -> None:
        self.bar = bar()
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
        evaluated = "eval_perplexity" in (logs or {})
        if not logs or not (evaluated or ("loss" in logs and not state.global_step % every)):
            return
        terms = [f"{name} {logs[name]:.3g}" for name in SHOWN if name in logs]
        self.bar.console.print(
            f"      step {state.global_step}: {', '.join(terms)}", highlight=False
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away."""
        self.bar.stop()
