"""``retort pretrain``: train a language model on text."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("pretrain", context_settings=_SETTINGS)(pretrain)


def pretrain(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="YAML file with defaults; flags win over it.")
    ] = None,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="List every flag, transformers' among them.")
    ] = False,
) -> None:
    """Train a language model on text; the same command goes on where a killed run stopped.

    Prints the output folder, which holds model and tokenizer.

    Flags and YAML keys are the fields of PretrainConfig, which extends transformers'
    TrainingArguments: --model_type, --model_config, --dataset_name, --tokenizer_vocab_size,
    --block_size, --output_dir and many more. An unknown one is an error. recipes/ has examples.

    Examples:

        retort pretrain --config recipes/dense_retnet.yaml --dataset_name texts.jsonl

        retort pretrain --config recipes/mamba.yaml --dataset_name book.txt --max_steps 100
    """
    arguments = [*(["--config", config] if config is not None else []), *context.args]
    from retort.cli.flags import flag_parser, parse_flags
    from retort.pretrain.config import PretrainConfig

    prog = "retort pretrain"
    if help_all:
        flag_parser(PretrainConfig, prog).print_help(sys.stdout)
        return
    settings = parse_flags(PretrainConfig, arguments, prog)
    from retort.cli.progress import TrainingProgress
    from retort.pretrain.run import run

    with redirect_stdout(sys.stderr):  # what transformers prints is no part of the answer
        folder = run(settings, [TrainingProgress()])
    print(folder)
