"""One self-contained HTML page out of a run's records.

``build(run_folder, out_path)`` reads the files that `retort.report.store` describes and writes
the page atomically. Nothing is fetched from anywhere, the same records always give the same
bytes, and a number that was not recorded is shown as "not measured".
"""

from retort.report.page import build
from retort.report.records import (
    Correction,
    DecodingRow,
    EvaluationRow,
    Heading,
    RunRecords,
    Sample,
)
from retort.report.store import append_training, load, save

__all__ = [
    "Correction",
    "DecodingRow",
    "EvaluationRow",
    "Heading",
    "RunRecords",
    "Sample",
    "append_training",
    "build",
    "load",
    "save",
]
