"""How far the plan is: seconds that each cell should take, corrected by what those before took.

Seconds per 1,000 student tokens were measured on two idle cores (AMD EPYC with AVX-512 bf16).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from cells import Cell
from settings import Places, Settings

START = 25.0  # imports, models, tokenising
PER_1000 = {"sft": 2.8, "seqkd": 4.0, "kd": 4.2, "jsd": 4.2, "abkd": 4.2, "mgsr": 8.0, "skd": 8.0}
TEACHER_PER_1000 = 5.5
WRITING = 6.0  # per 1,000 tokens of other methods whose student writes
PER_PROMPT = 0.15  # writing an answer
JOINT = 300.0


def expected(cell: Cell, settings: Settings) -> float:
    """Seconds of a cell."""
    if cell.stage == "joint":
        return JOINT
    tests = 5 * settings.prompts
    prompts = settings.validation_prompts if cell.stage == "tune" else tests
    speed = PER_1000.get(cell.method, WRITING)
    if cell.stage == "teacher":
        speed = TEACHER_PER_1000
    return START + settings.tokens(cell.stage) / 1000 * speed + PER_PROMPT * prompts


class Progress:
    """Says before and after each cell where the plan stands."""

    def __init__(
        self, cells: Sequence[Cell], settings: Settings, places: Places, jobs: int = 1
    ) -> None:
        self.cells, self.settings, self.places, self.jobs = cells, settings, places, jobs

    def __str__(self) -> str:
        """Cells done, and about how many minutes are left."""
        done = [c for c in self.cells if self.places.result(c.name).is_file()]
        left = [c for c in self.cells if c not in done]
        seconds = self.pace(done) * sum(expected(c, self.settings) for c in left)
        seconds /= self.jobs
        return f"{len(done)} of {len(self.cells)} cells done, about {seconds / 60:.0f} min left"

    def pace(self, done: Sequence[Cell]) -> float:
        """Seconds that finished cells took, in those that were expected."""
        took = [json.loads(self.places.result(c.name).read_text("utf-8"))["seconds"] for c in done]
        hoped = sum(expected(c, self.settings) for c in done)
        return sum(took) / hoped if hoped else 1.0
