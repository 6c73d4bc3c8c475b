"""What a run leaves beside its weights: log, corrections, provenance, resolved arguments.

The files are those that `retort.report` reads: ``training.jsonl``, ``corrections.json`` and
``provenance.json``; ``distill_config.yaml`` starts the same run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from retort.distill.config import DistillConfig, resolved
from retort.distill.sequences.scrg import Correction
from retort.provenance import Provenance, write_json, write_text

LOG = "training.jsonl"
CORRECTIONS = "corrections.json"
PROVENANCE = "provenance.json"
CONFIG = "distill_config.yaml"


class RunLog:
    """Writes the records of a run into ``folder``; does nothing where ``enabled`` is false."""

    def __init__(self, folder: str | Path, enabled: bool = True) -> None:
        self.folder, self.enabled = Path(folder), enabled

    def start(self, config: DistillConfig, step: int) -> None:
        """Begin or go on at optimiser step ``step``: what was logged after it is dropped."""
        if not self.enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_text(self.folder / LOG, "".join(kept if step else []))
        arguments = resolved(config)
        write_text(self.folder / CONFIG, yaml.safe_dump(arguments, sort_keys=True))
        provenance = Provenance.collect(arguments, {"seed": config.seed})
        write_json(self.folder / PROVENANCE, provenance.to_dict())

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def corrections(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace the list of corrections."""
        if self.enabled and records:
            write_json(self.folder / CORRECTIONS, list(records))

    def _lines(self) -> list[str]:
        """Complete lines of the log; a killed process may have left half a line."""
        path = self.folder / LOG
        if not path.is_file():
            return []
        return [line for line in path.read_text("utf-8").splitlines(True) if line.endswith("\n")]


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
