"""``retort distill``: train a student from a teacher."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("distill", context_settings=_SETTINGS)(distill)


def distill(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="YAML file with defaults; flags win over it.")
    ] = None,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="List every flag, transformers' among them.")
    ] = False,
) -> None:
    """Distil a teacher into a student; the same command goes on where a killed run stopped.

    Prints the output folder, which holds the student.

    Flags and YAML keys are the fields of DistillConfig, which extends transformers'
    TrainingArguments: --teacher_model_name_or_path, --student_type, --dataset_name, --method,
    --output_dir and many more. An unknown one is an error.

    Examples:

        retort distill --config mgsr.yaml --output_dir runs/first

        retort distill --config mgsr.yaml --method kd --max_steps 100

        accelerate launch -m retort distill --config mgsr.yaml
    """
    arguments = [*(["--config", config] if config is not None else []), *context.args]
    from retort.cli.flags import flag_parser, parse_flags
    from retort.distill.config import DistillConfig

    prog = "retort distill"
    if help_all:
        flag_parser(DistillConfig, prog).print_help(sys.stdout)
        return
    settings = parse_flags(DistillConfig, arguments, prog)
    from retort.distill.run import run

    with redirect_stdout(sys.stderr):  # what transformers prints is no part of the answer
        folder = run(settings)
    print(folder)
