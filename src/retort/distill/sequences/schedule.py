"""DistiLLM's adaptive scheduler: when the student writes (arXiv 2402.03898, section 3.2).

φ is the chance of learning from student text. It starts at 0 and grows by 0.1 whenever a
validation loss is at least 0.1 above the loss at its last rise (at the first evaluation, where
there is none [ours]): the student then errs on what it has not seen. A number r, drawn once an
optimiser step, decides for the whole step; t of T steps are done:

    r < φ (1 − t / T), or r < φ and the buffer is not full   the student writes
    r < φ otherwise                                          a sequence of the replay buffer
    else                                                     offline text
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

RISE = 0.1
"""By how much φ grows, and how much worse the validation loss must be for it."""


@dataclass
class AdaptiveShare:
    """φ, and the validation loss that the next one is compared with."""

    phi: float = 0.0
    previous: float | None = None

    def observe(self, loss: float) -> None:
        """A validation loss was measured."""
        if self.previous is None:
            self.previous = loss
        elif loss >= self.previous + RISE:
            self.phi, self.previous = min(self.phi + RISE, 1.0), loss

    def choose(self, r: float, progress: float, buffer_is_full: bool) -> str:
        """Source of a step's sequences: "student", "replay" or "dataset".

        r: in [0, 1), drawn once a step. progress: t / T. A full buffer is never empty.
        """
        if r < self.phi * (1 - progress) or (r < self.phi and not buffer_is_full):
            return "student"
        return "replay" if r < self.phi else "dataset"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.phi, self.previous = float(state["phi"]), state["previous"]
