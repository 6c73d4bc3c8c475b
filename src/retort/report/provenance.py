"""What produced the run: command, commit, versions, machine, seeds and every argument."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from retort.provenance import Provenance
from retort.report.html import Markup, details, element, missing, section, table

_SECRET = ("hub_token", "api_key", "password", "secret")
_TEXT = (0, 0)  # no column of numbers


def provenance_section(provenance: Provenance | None) -> Markup:
    """Short facts first; the arguments, which are many, open on demand."""
    if provenance is None:
        return section("provenance", "Provenance", missing("What produced this run"))
    facts = [
        ("command", shlex.join(provenance.command)),
        ("git commit", provenance.commit or "not a git checkout"),
        ("started", provenance.time),
    ]
    groups = [
        ("Machine", provenance.platform),
        ("Versions", provenance.versions),
        ("Seeds", provenance.seeds),
    ]
    shown = [[name, element("code", value)] for name, value in facts]
    tables = [_values(name, values) for name, values in groups if values]
    lacking = [missing(name) for name, values in groups if not values]
    arguments = _values("Arguments", provenance.arguments) if provenance.arguments else None
    return section(
        "provenance",
        "Provenance",
        table(["what", "value"], shown, "How it was started", _TEXT),
        element("div", tables, class_="grid-plots"),
        details(f"Arguments ({len(provenance.arguments)})", arguments) if arguments else None,
        lacking,
    )


def _values(name: str, values: Mapping[str, Any]) -> Markup:
    rows = [[key, element("code", _shown(key, value))] for key, value in values.items()]
    return table(["name", "value"], rows, name, _TEXT)


def _shown(key: str, value: Any) -> str:
    if value and any(mark in key.lower() for mark in _SECRET):
        return "(hidden)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
