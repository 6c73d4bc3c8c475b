"""What goes to the terminal: answers to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def say(line: str) -> None:
    """Tell the user what is going on."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """An answer for a machine: one line of JSON."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An answer for a person: columns aligned by spaces, the same in a pipe."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())
