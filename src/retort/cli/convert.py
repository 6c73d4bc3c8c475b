"""``retort convert``: a checkpoint of another format as one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retort.cli.output import print_json, say


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("convert")(convert)


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint.")],
    target: Annotated[Path, typer.Argument(help="New folder; written whole or not at all.")],
    dense_block_layers: Annotated[
        int | None, typer.Option(min=0, help="Mamba: the window m of the DenseMamba (default 2).")
    ] = None,
    intermediate_select_scale: Annotated[
        int | None, typer.Option(min=1, help="Mamba: its gates are hidden_size // this wide.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the written weights; auto keeps the checkpoint's.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a path.")] = False,
) -> None:
    """Turn a checkpoint into one of ours, and print its folder.

    The authors' DenseRetNets ("DenseGauRetNet") become dense_retnet. Mamba checkpoints become
    DenseMamba whose gates are zero: the same logits until it is trained.

    Examples:

        retort convert ./DenseRetNet-350M ./dense-retnet-350m

        retort convert state-spaces/mamba-130m-hf ./dense-mamba --dense-block-layers 2
    """
    from retort.models import zoo
    from retort.models.conversion import convert as run

    given = {
        "dense_block_layers": dense_block_layers,
        "intermediate_select_scale": intermediate_select_scale,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    facts = run(zoo.resolve(source), target, dtype, **changes)
    if as_json:
        print_json(facts)
        return
    say(f"{facts['model_type']}, {facts['parameters']:,} parameters")
    print(facts["path"])
