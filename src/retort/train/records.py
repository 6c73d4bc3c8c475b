"""What a training run leaves beside its weights: log, provenance, resolved arguments.

The files are those that `retort.report` reads: ``training.jsonl`` and ``provenance.json``;
the resolved arguments, as YAML, start the same run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from retort.disk import writing
from retort.provenance import Provenance, write_json, write_text

LOG = "training.jsonl"
PROVENANCE = "provenance.json"


class RunLog:
    """Writes the records of a run into ``folder``; does nothing where ``enabled`` is false.

    Args:
        folder: the run's output folder.
        config_name: name of the file that receives the resolved arguments.
        enabled: false in all processes but one.
    """

    def __init__(self, folder: str | Path, config_name: str, enabled: bool = True) -> None:
        self.folder, self.config_name, self.enabled = Path(folder), config_name, enabled

    def start(self, arguments: Mapping[str, Any], seed: int, step: int) -> None:
        """Begin or go on at optimiser step ``step``: what was logged after it is dropped."""
        if not self.enabled:
            return
        kept = [line for line in self._lines() if _step(line) <= step]
        settings = yaml.safe_dump(dict(arguments), sort_keys=True)
        provenance = Provenance.collect(arguments, {"seed": seed})
        with writing(self.folder):
            write_text(self.folder / LOG, "".join(kept if step else []))
            write_text(self.folder / self.config_name, settings)
            write_json(self.folder / PROVENANCE, provenance.to_dict())

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        if self.enabled:
            path = self.folder / LOG
            self.folder.mkdir(parents=True, exist_ok=True)
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _lines(self) -> list[str]:
        """Complete lines of the log; a killed process may have left half a line."""
        path = self.folder / LOG
        if not path.is_file():
            return []
        lines = path.read_text("utf-8", errors="replace").splitlines(True)
        return [line for line in lines if line.endswith("\n")]


def _step(line: str) -> float:
    """The optimiser step of a record; one that cannot be read belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return math.inf
