"""Put the parts together into one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path

from retort.errors import ConfigurationError
from retort.provenance import write_text
from retort.report.decoding import decoding_section
from retort.report.evaluation import evaluation_section
from retort.report.headline import headline
from retort.report.html import Markup, element, escape
from retort.report.provenance import provenance_section
from retort.report.records import RunRecords
from retort.report.samples import corrections_section, samples_section
from retort.report.store import load
from retort.report.training import training_section

DEFAULT_NAME = "report.html"
_PARTS = (
    ("decoding", "Decoding"),
    ("evaluation", "Before and after"),
    ("training", "Training"),
    ("corrections", "Corrections"),
    ("samples", "Samples"),
    ("provenance", "Provenance"),
)


def build(source: str | Path | RunRecords, out_path: str | Path | None = None) -> Path:
    """Write the report of a run folder (or of records in memory) and return its path.

    ``out_path`` is ``report.html`` in the run folder unless given. The file appears whole or not
    at all. Raises `ConfigurationError` for a folder without records, for a record that does not
    fit, and for records in memory without ``out_path``.
    """
    if out_path is None:
        if isinstance(source, RunRecords):
            raise ConfigurationError("give out_path to build a report from records in memory")
        out_path = Path(source) / DEFAULT_NAME
    records = source if isinstance(source, RunRecords) else load(source)
    write_text(Path(out_path), render(records))
    return Path(out_path)


def render(records: RunRecords) -> str:
    """The page as text. The same records give the same text."""
    return fill(records.heading.title, _body(records))


def fill(title: str, body: Markup) -> str:
    """The template around ``body``."""
    template = files("retort.report").joinpath("page.html").read_text("utf-8")
    parts = {
        "script-hash": _script_hash(template),
        "title": escape(title),
        "body": body,
    }
    # One pass, so that a run's text that looks like a placeholder stays text.
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda match: parts[match[1]], template)


def _body(records: RunRecords) -> Markup:
    description = records.heading.description
    links = [element("a", name, href=f"#{key}") for key, name in _PARTS]
    head = element(
        "header",
        element("p", "Retort run report", class_="eyebrow"),
        element("h1", records.heading.title),
        element("p", description, class_="lead") if description else None,
        headline(records),
        element("nav", links, aria_label="Parts of this report"),
    )
    main = element(
        "main",
        decoding_section(records.decoding),
        evaluation_section(records.evaluation),
        training_section(records.training),
        corrections_section(records.corrections),
        samples_section(records.samples),
        provenance_section(records.provenance),
    )
    return Markup(head + main)


def _script_hash(template: str) -> str:
    """The page's policy lets exactly this script run, so that no text of a run ever can."""
    script = template.split("<script>", 1)[1].split("</script>", 1)[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
