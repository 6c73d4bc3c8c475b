"""``retort pretrain``: train a language model on text."""

from __future__ import annotations

import typer

from retort.cli.training import SETTINGS, ConfigFile, HelpAll, Parts, train


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("pretrain", context_settings=SETTINGS)(pretrain)


def pretrain(context: typer.Context, config: ConfigFile = None, help_all: HelpAll = False) -> None:
    """Train a language model on text; the same command goes on where a killed run stopped.

    Prints the output folder, which holds model and tokenizer.

    Flags and YAML keys are the fields of PretrainConfig, which extends transformers'
    TrainingArguments: --model_type, --model_config, --dataset_name, --tokenizer_vocab_size,
    --block_size, --output_dir and many more. An unknown one is an error. recipes/ has examples.

    Examples:

        retort pretrain --config recipes/dense_retnet.yaml --dataset_name texts.jsonl

        retort pretrain --config recipes/mamba.yaml --dataset_name book.txt --max_steps 100
    """
    train(context, config, help_all, _parts)


def _parts() -> Parts:
    from retort.pretrain.config import PretrainConfig
    from retort.pretrain.run import run

    return PretrainConfig, run
