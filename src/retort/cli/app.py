"""The list of verbs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from retort.cli import (
    bench,
    capture,
    convert,
    demo,
    distill,
    env,
    evaluate,
    generate,
    models,
    pretrain,
    report,
    serve,
)

_HELP = "Distil a language model into a small student, and serve either one faster, losslessly."


def command() -> Any:
    """The command of ``retort``, ready for its ``main``."""
    app = typer.Typer(
        name="retort",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for module in (
        demo,
        models,
        generate,
        serve,
        bench,
        capture,
        distill,
        pretrain,
        evaluate,
        convert,
        report,
        env,
    ):
        module.add_to(app)
    return typer.main.get_command(app)


def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any verb).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=lambda v: _version(v), is_eager=True
        ),
    ] = False,
) -> None:
    """Options before the verb; ``--debug`` is taken out before parsing and listed for the help."""


def _version(wanted: bool) -> None:
    if wanted:
        import retort

        typer.echo(retort.__version__)
        raise typer.Exit
