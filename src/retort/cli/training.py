"""What the training verbs share: flags and YAML keys to a configuration, then the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from retort.train.leaving import leave_group

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigFile = Annotated[str | None, typer.Option(help="YAML file with defaults; flags win over it.")]
HelpAll = Annotated[
    bool, typer.Option("--help-all", help="List every flag, transformers' among them.")
]
Parts = tuple[type, Callable[..., Path]]
"""The configuration's class, and what trains by it and returns the output folder."""


def train(
    context: typer.Context, config: str | None, help_all: bool, load: Callable[[], Parts]
) -> None:
    """Train by the verb's flags and print the output folder; ``load`` imports what is heavy."""
    from retort.cli.flags import flag_parser, parse_flags
    from retort.cli.progress import TrainingProgress

    kind, run = load()
    if help_all:
        flag_parser(kind, context.command_path).print_help(sys.stdout)
        return
    file = ["--config", config] if config is not None else []
    settings: Any = parse_flags(kind, [*file, *context.args], context.command_path)
    with redirect_stdout(sys.stderr):  # what transformers prints is no part of the answer
        folder = run(settings, [TrainingProgress()])
    print(folder)
    leave_group()
