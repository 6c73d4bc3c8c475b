"""The budget of tokens: it ends a run, and the learning rate follows it."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

WARM_UP = 0.05
FLOOR = 0.05


class TokenBudget(TrainerCallback):
    """Trains on ``tokens`` student tokens, with a warm-up and a cosine over them.

    Methods read different numbers of tokens a step, so a schedule over steps would end at another
    rate for each. The count is in the checkpoint, a run that goes on takes the same rates.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Set the step's rate; the trainer's own schedule is constant."""
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate(state.num_input_tokens_seen / self.tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End once the student was trained on so many tokens."""
        if state.num_input_tokens_seen >= self.tokens:
            control.should_training_stop = True


def rate(done: float) -> float:
    """Share of the peak rate after a share ``done`` of the budget."""
    warm = min(1.0, (done + 0.2 * WARM_UP) / WARM_UP)
    return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
