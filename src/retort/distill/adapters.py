"""LoRA students (Hu et al. 2021, arXiv 2106.09685) through PEFT: made, and merged when they end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.distill.config import DistillConfig
from retort.errors import ConfigurationError

if TYPE_CHECKING:
    from retort.distill.trainer import DistillTrainer

_NAME = re.compile(r"(?!all-linear)[\w.]+")  # what is more than a module's name PEFT takes alone

FOLDER = "adapter"
"""Where in a run's folder the adapter alone is kept."""


def with_adapter(model: Any, config: DistillConfig) -> Any:
    """``model`` frozen, with a fresh LoRA adapter as the ``lora_`` arguments say.

    Raises ConfigurationError where PEFT is not installed or no such module is there.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigurationError(
            "use_peft needs PEFT: pip install 'retort-lm[peft]', or leave use_peft out"
        ) from None
    targets: Any = config.lora_target_modules
    pattern = targets is not None and len(targets) == 1 and not _NAME.fullmatch(targets[0])
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if pattern else targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"lora_target_modules={targets}: {reason}") from error


def save_merged(trainer: DistillTrainer, folder: Path) -> None:
    """Write the adapter into ``folder/adapter``, and the student with it merged into ``folder``.

    The adapter is gone from the trainer's model afterwards.
    """
    trainer.save_model(str(folder / FOLDER))
    student = trainer.accelerator.unwrap_model(trainer.model)
    trainer.model = student.merge_and_unload()
    trainer.save_model()
