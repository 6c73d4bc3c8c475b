"""``retort demo``: the whole loop on a real model, from plain decoding to a distilled drafter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from retort.cli.output import say
from retort.errors import ConfigurationError


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("demo")(demo)


def demo(
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default retort-demo.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Everything once, in a minute or two, for CI.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again, over an earlier run in the folder.")
    ] = False,
    model: Annotated[str, typer.Option(help="The teacher.")] = "smollm2-135m-instruct",
) -> None:
    """Decode, distil a DenseRetNet student, decode with it, and write one report.

    Takes at most ten minutes on two cores. A run that was interrupted goes on where it stopped
    when the same command is given again. The last line printed is the report's path.

    Examples:

        retort demo

        retort demo --quick --output-dir /tmp/demo
    """
    folder = output_dir or Path("retort-demo-quick" if quick else "retort-demo")
    if fresh and folder.is_dir():
        _check_ours(folder)
        shutil.rmtree(folder)
    from retort.cli.demo_stages import FULL, QUICK, Demo
    from retort.cli.progress import quiet_libraries

    try:
        with quiet_libraries():
            report = Demo(folder, model, QUICK if quick else FULL).run()
    except KeyboardInterrupt:
        say(f"\nStopped. The same command goes on from what {folder} holds.")
        raise typer.Exit(130) from None
    print(report.resolve())


def _check_ours(folder: Path) -> None:
    """--fresh deletes a folder: only one that a demo has made."""
    if any(folder.iterdir()) and not (folder / "demo.json").is_file():
        raise ConfigurationError(f"{folder} holds something else than a demo: name another folder")
