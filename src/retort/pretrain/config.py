"""`PretrainConfig`: every choice of a language-model training run, typed and documented once.

The same fields are keywords in Python, flags of ``retort pretrain`` and keys of its YAML recipe.
"""

# ruff: noqa: RUF009  # `say` returns a dataclass field

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from retort.errors import ConfigurationError
from retort.train.arguments import check_given, check_training, say


@dataclass
class PretrainConfig(TrainingArguments):
    """Arguments of language-model training, on top of transformers' TrainingArguments.

    Raises `ConfigurationError`, naming the key, for a value out of range and for two choices
    that contradict each other.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # transformers' list: these flags take JSON
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_config",
        "model_init_kwargs",
    ]

    # Model
    model_type: str | None = say(
        None, "Build a new model: dense_retnet, dense_mamba, or any causal model of transformers."
    )
    model_config: dict[str, Any] | str | None = say(
        None, "Configuration values of the new model, such as dense_block_layers, as JSON."
    )
    model_name_or_path: str | None = say(
        None, "Go on with this model instead: zoo name, hub id or folder."
    )
    model_init_kwargs: dict[str, Any] | str | None = say(
        None, "Keywords of from_pretrained, as JSON."
    )
    trust_remote_code: bool = say(False, "Allow models to bring code of their own.")

    # Tokenizer
    tokenizer_name_or_path: str | None = say(
        None, "Tokenizer: zoo name, hub id or folder; by default that of model_name_or_path."
    )
    tokenizer_vocab_size: int | None = say(
        None, "Train a byte-level BPE of this size on the training texts instead."
    )

    # Data
    dataset_name: str | None = say(
        None, "JSONL or Parquet file with a text column, .txt file, folder, or hub name."
    )
    dataset_config: str | None = say(None, "Configuration of a hub dataset.")
    dataset_text_field: str = say("text", "Column of the texts.")
    dataset_train_split: str = say("train", "Split to train on.")
    dataset_test_split: str | None = say(None, "Split of dataset_name to evaluate on.")
    eval_dataset_name: str | None = say(None, "Another file, folder or name to evaluate on.")
    max_train_rows: int | None = say(None, "Train on the first texts only.")
    max_eval_rows: int | None = say(None, "Evaluate on the first texts only.")
    block_size: int = say(256, "Tokens of a training sequence; texts are packed into such blocks.")

    # Other defaults than transformers'
    remove_unused_columns: bool = say(False, "Kept off: blocks are made here.")
    logging_nan_inf_filter: bool = say(False, "Kept off: a NaN loss ends the run.")
    logging_steps: float = say(10, "Optimiser steps between log records; below 1: a share.")
    lr_scheduler_type: str = say("cosine", "Schedule of the learning rate.")
    learning_rate: float = say(1e-3, "Highest learning rate.")

    def __post_init__(self) -> None:
        """Check every value that is ours; transformers checks its own."""
        check_given(self, PretrainConfig)
        check_training(self, super().__post_init__)
        for fault in self._faults():
            raise ConfigurationError(fault)

    def _faults(self) -> Iterator[str]:
        if (self.model_type is None) == (self.model_name_or_path is None):
            yield "set model_type to build a model, or model_name_or_path to go on with one"
        if self.model_config and self.model_type is None:
            yield "model_config belongs to model_type; model_name_or_path has its configuration"
        if self.tokenizer_name_or_path and self.tokenizer_vocab_size:
            yield "tokenizer_name_or_path names a tokenizer, tokenizer_vocab_size trains one"
        if self.tokenizer_vocab_size is not None and self.tokenizer_vocab_size < MIN_VOCABULARY:
            yield f"tokenizer_vocab_size must be at least {MIN_VOCABULARY}: all bytes, and the end"
        if self.tokenizer_vocab_size is not None and self.model_name_or_path is not None:
            yield "tokenizer_vocab_size would give model_name_or_path tokens that it never saw"
        if self.model_type and not (self.tokenizer_name_or_path or self.tokenizer_vocab_size):
            yield "no tokenizer: set tokenizer_name_or_path, or tokenizer_vocab_size to train one"
        if self.block_size < 2:
            yield f"block_size={self.block_size} is wrong: it must be at least 2"
        for name in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value!r} is wrong: it must be at least 1"


MIN_VOCABULARY = 257

FIXED = (
    "model_type",
    "model_config",
    "model_name_or_path",
    "block_size",
    "seed",
    "data_seed",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
)
"""Arguments that must not change between a run and its continuation."""
