"""``retort models`` and ``retort pull``: which models are known by name, and fetch one."""

from __future__ import annotations

from typing import Annotated

import typer

from retort.cli.output import print_json, print_table, say


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("models")(models)
    app.command("pull")(pull)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list for a machine.")] = False,
) -> None:
    """List the models that Retort knows by name.

    Local folders and hub ids (owner/name) work wherever a name does.

    Example: retort models --json
    """
    from retort.models import zoo

    rows = [
        {
            "name": entry.name,
            "parameters": entry.parameters,
            "megabytes": entry.megabytes,
            "licence": entry.licence,
            "cached": zoo.is_cached(entry),
            "weights": entry.provenance,
        }
        for entry in zoo.ENTRIES.values()
    ]
    if as_json:
        print_json(rows)
        return
    header = ("name", "parameters", "size", "licence", "cached", "weights")
    print_table(header, [_cells(row) for row in rows])


def pull(
    name: Annotated[str, typer.Argument(help="A name from `retort models`, or a hub id.")],
    check: Annotated[
        bool, typer.Option("--check", help="Hash every cached file first, whatever its date.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a path.")] = False,
) -> None:
    """Fetch a model into the cache, once, and print its folder.

    Example: retort pull smollm2-135m-instruct
    """
    from retort.models import zoo

    folder = zoo.resolve(name, say, full_check=check)
    if as_json:
        print_json({"name": name, "path": str(folder)})
    else:
        print(folder)


def _cells(row: dict) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['parameters'] / 1e6:.0f}M",
        f"{row['megabytes']} MB",
        row["licence"],
        "yes" if row["cached"] else "no",
        row["weights"],
    )
