"""A whole run from its configuration: what ``retort pretrain`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from retort.errors import ConfigurationError
from retort.models import zoo
from retort.pretrain.config import PretrainConfig
from retort.pretrain.corpus import Corpus, load_texts, pack, train_tokenizer
from retort.pretrain.model import new_model
from retort.pretrain.trainer import PretrainTrainer
from retort.train.running import train_to_end


def run(config: PretrainConfig, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train as ``config`` says and return its output folder, which holds model and tokenizer.

    A run on an ``output_dir`` that has a complete checkpoint goes on from the newest one, and
    ends in the weights of an unbroken run. Where there are evaluation texts, the end is
    evaluated too. Raises ConfigurationError, before anything is trained, for what does not fit.
    """
    return train(build_trainer(config, callbacks), quiet=bool(callbacks))


def train(trainer: PretrainTrainer, quiet: bool = False) -> Path:
    """Train to the end from the newest checkpoint, if there is one, save, and evaluate.

    ``quiet`` leaves showing the run to the trainer's other callbacks.
    """

    def finish(_: Path) -> None:
        trainer.save_model()
        if trainer.eval_dataset is not None:
            trainer.evaluate()

    return train_to_end(trainer, finish, quiet)


def build_trainer(
    config: PretrainConfig, callbacks: Sequence[TrainerCallback] = ()
) -> PretrainTrainer:
    """Load texts, tokenizer and model, and put them together."""
    set_seed(config.seed)
    training, evaluation = _training_texts(config), _evaluation_texts(config)
    tokenizer = _tokenizer(config, training)
    size = config.block_size
    return PretrainTrainer(
        model=_model(config, tokenizer),
        args=config,
        train_dataset=pack(training, tokenizer, size, whole=True),
        eval_dataset=None if evaluation is None else pack(evaluation, tokenizer, size, whole=False),
        processing_class=tokenizer,
        eval_size=None if evaluation is None else evaluation.size,
        callbacks=list(callbacks),
    )


def _training_texts(config: PretrainConfig) -> Corpus:
    if config.dataset_name is None:
        raise ConfigurationError("no data: set dataset_name to a file, folder or hub name")
    return load_texts(
        config.dataset_name,
        config.dataset_train_split,
        config.dataset_config,
        config.dataset_text_field,
        config.max_train_rows,
    )


def _evaluation_texts(config: PretrainConfig) -> Corpus | None:
    name, split = config.eval_dataset_name, config.dataset_test_split
    if name is None and split is None:
        strategy = IntervalStrategy(config.eval_strategy).value
        if strategy != "no":
            raise ConfigurationError(
                f"eval_strategy={strategy!r} has no data: set eval_dataset_name or "
                "dataset_test_split"
            )
        return None
    return load_texts(
        name or config.dataset_name or "",
        split or "train",
        config.dataset_config,
        config.dataset_text_field,
        config.max_eval_rows,
    )


def _tokenizer(config: PretrainConfig, training: Corpus) -> Any:
    if config.tokenizer_vocab_size is not None:
        return train_tokenizer(training.texts, config.tokenizer_vocab_size)
    name = config.tokenizer_name_or_path or config.model_name_or_path or ""
    return zoo.load_tokenizer(name, config.trust_remote_code)


def _model(config: PretrainConfig, tokenizer: Any) -> Any:
    set_seed(config.seed)  # the weights do not depend on what was done before
    if config.model_type is not None:
        return new_model(config.model_type, dict(config.model_config or {}), tokenizer)  # type: ignore[arg-type]
    keywords = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    return zoo.load_model(
        config.model_name_or_path or "", trust_remote_code=config.trust_remote_code, **keywords
    )
