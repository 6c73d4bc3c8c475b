"""``retort distill``: train a student from a teacher."""

from __future__ import annotations

import typer

from retort.cli.training import SETTINGS, ConfigFile, HelpAll, Parts, train


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("distill", context_settings=SETTINGS)(distill)


def distill(context: typer.Context, config: ConfigFile = None, help_all: HelpAll = False) -> None:
    """Distil a teacher into a student; the same command goes on where a killed run stopped.

    Prints the output folder, which holds the student.

    Flags and YAML keys are the fields of DistillConfig, which extends transformers'
    TrainingArguments: --teacher_model_name_or_path, --student_type, --dataset_name, --method,
    --output_dir and many more. An unknown one is an error.

    Examples:

        retort distill --config mgsr.yaml --output_dir runs/first

        retort distill --config mgsr.yaml --method kd --max_steps 100

        retort distill --config run.yaml --method seqkd --teacher_url http://localhost:8000/v1

        accelerate launch -m retort distill --config mgsr.yaml
    """
    train(context, config, help_all, _parts)


def _parts() -> Parts:
    from retort.distill.config import DistillConfig
    from retort.distill.run import run

    return DistillConfig, run
