"""``retort report``: one HTML page out of a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; by default RUN/report.html.")
    ] = None,
) -> None:
    """Write the report of a run and print its path.

    Examples:

        retort report runs/first
    """
    from retort.report import build

    print(build(run, output).resolve())
