"""What produced the run: command, commit, versions, machine, seeds and every argument."""

from __future__ import annotations

import json
from typing import Any

from retort.report.html import Markup, details, element, missing, section, table
from retort.report.records import Provenance

_SECRET = ("hub_token", "api_key", "password", "secret")
_TEXT = (0, 0)  # no column of numbers


def provenance_section(provenance: Provenance) -> Markup:
    """Short facts first; the arguments, which are many, open on demand."""
    facts = [("command", provenance.command), ("git commit", provenance.git_commit)]
    groups = [
        ("Seeds", provenance.seeds),
        ("Versions", provenance.versions),
        ("Machine", provenance.machine),
    ]
    lacking = [name for name, value in [*facts, *groups] if not value]
    shown = [[name, element("code", value)] for name, value in facts if value]
    tables = [_values(name, values) for name, values in groups if values]
    arguments = [_values("Arguments", provenance.arguments)] if provenance.arguments else []
    return section(
        "provenance",
        "Provenance",
        table(["what", "value"], shown, "How it was started", _TEXT) if shown else None,
        element("div", tables, class_="grid-plots") if tables else None,
        [details(f"Arguments ({len(provenance.arguments)})", *arguments)] if arguments else None,
        [missing(name.capitalize()) for name in lacking],
    )


def _values(name: str, values: dict[str, Any]) -> Markup:
    rows = [[key, element("code", _shown(key, value))] for key, value in values.items()]
    return table(["name", "value"], rows, name, _TEXT)


def _shown(key: str, value: Any) -> str:
    if value and any(mark in key.lower() for mark in _SECRET):
        return "(hidden)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
