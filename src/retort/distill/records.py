"""Records of a distillation run that other training has not: corrections of rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retort.disk import writing
from retort.distill.sequences.scrg import Correction
from retort.provenance import write_json
from retort.train.records import RunLog

CORRECTIONS = "corrections.json"
CONFIG = "distill_config.yaml"


class DistillLog(RunLog):
    """A run's log that also keeps the newest corrections (see `retort.report`)."""

    def __init__(self, folder: str | Path, enabled: bool = True) -> None:
        super().__init__(folder, CONFIG, enabled)

    def corrections(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace the list of corrections."""
        if self.enabled and records:
            path = self.folder / CORRECTIONS
            with writing(path):
                write_json(path, list(records))


def correction_record(correction: Correction, step: int, tokenizer: Any) -> dict[str, Any]:
    """A correction as the report shows it: texts instead of ids."""
    decode = tokenizer.decode
    return {
        "prompt": decode(correction.prompt, skip_special_tokens=True),
        "tokens": [decode([token]) for token in correction.tokens],
        "position": correction.position,
        "replacement": decode([correction.replacement]),
        "regenerated": decode(correction.regenerated),
        "step": step,
        "divergence": correction.divergence,
    }
