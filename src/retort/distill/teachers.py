"""The teacher: a frozen model, given or loaded by name, whose signal the losses read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from retort.distill.batch import Batch
from retort.distill.config import DistillConfig
from retort.distill.hidden import HeadlessModel
from retort.distill.signals import HeadSignal
from retort.errors import ConfigurationError


class Teacher:
    """A causal model in evaluation mode, without gradients.

    ``model`` is put on ``device`` and frozen. Its predictions are hidden states and a head
    (`HeadSignal`), so that the logits ``[N, V]`` never exist at once. ``seconds`` adds up the time
    of its forwards (heads, which run inside the losses, left out).
    """

    def __init__(self, model: Any, device: torch.device | str | None = None) -> None:
        fixed = device is None or getattr(model, "is_quantized", False)  # quantised weights stay
        self.model = model if fixed else model.to(device)
        self.model.eval().requires_grad_(False)
        self.headless = HeadlessModel(self.model)
        self.seconds = 0.0

    @torch.no_grad()
    def signal(self, batch: Batch, mask: Tensor) -> HeadSignal:
        """What the teacher predicts at ``mask`` (bool ``[R, T]``), in the batch's order.

        Rows without any such position are not run.
        """
        rows = mask.any(1)
        ids, attention = batch["input_ids"][rows], batch["attention_mask"][rows]
        positions = batch["position_ids"][rows] if "position_ids" in batch else None
        if not len(ids):
            return HeadSignal(self._nothing(), self.headless.head)
        started = perf_counter()
        hidden = self.headless.hidden(ids, attention, positions=positions)
        self.seconds += perf_counter() - started
        return HeadSignal(hidden[mask[rows]], self.headless.head)

    def _nothing(self) -> Tensor:
        config = self.model.config.get_text_config()
        width = config.hidden_size if self.headless.plain else config.vocab_size
        return torch.zeros(0, width, device=self.model.device, dtype=self.model.dtype)


class AdapterOffTeacher(Teacher):
    """The student's own base model: a PEFT model with its adapters switched off.

    One copy of the weights serves both. While the teacher runs, body and head, adapters are off
    and every module is in evaluation mode; the student's state comes back at once.
    """

    def __init__(self, student: Any) -> None:
        self.peft = student
        self.model = student.get_base_model()
        self.headless = HeadlessModel(self.model)
        self.seconds = 0.0

    @torch.no_grad()
    def signal(self, batch: Batch, mask: Tensor) -> HeadSignal:
        """What the base model predicts at ``mask`` (bool ``[R, T]``), in the batch's order."""
        with self._off():
            found = super().signal(batch, mask)
        return HeadSignal(found.hidden, self._head)

    def _head(self, hidden: Tensor) -> Tensor:
        with self._off():
            return self.headless.head(hidden)

    @contextmanager
    def _off(self) -> Iterator[None]:
        training = [module for module in self.peft.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            for module in training:
                module.training = True


def has_adapter(model: Any) -> bool:
    """Whether ``model`` is a PEFT model, whose base can teach it."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def load_teacher(config: DistillConfig) -> Any:
    """The model that the configuration names. Raises ConfigurationError when it names none."""
    from retort.models import zoo

    return zoo.load_model(_name(config), **_keywords(config))


def teacher_outline(config: DistillConfig) -> Any:
    """What is known of that model before its weights are read; raises as `load_teacher`."""
    from retort.models import zoo

    keywords = _keywords(config)
    keywords.pop("quantization_config", None)  # is about weights
    return zoo.load_outline(_name(config), **keywords)


def _name(config: DistillConfig) -> str:
    if config.teacher_model_name_or_path is None:
        raise ConfigurationError(
            f"method={config.method!r} needs a teacher: set teacher_model_name_or_path"
        )
    return config.teacher_model_name_or_path


def _keywords(config: DistillConfig) -> dict[str, Any]:
    keywords = dict(config.teacher_model_init_kwargs or {})  # type: ignore[arg-type]
    if config.teacher_model_revision is not None:
        keywords["revision"] = config.teacher_model_revision
    if config.teacher_quantization is not None:
        keywords |= _quantization(config.teacher_quantization)
    return {"trust_remote_code": config.trust_remote_code, **keywords}


def _quantization(bits: str) -> dict[str, Any]:
    """Keywords of from_pretrained for linears in ``bits`` ("8bit", "4bit"), by bitsandbytes."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ConfigurationError(
            f"teacher_quantization={bits!r} needs bitsandbytes: pip install bitsandbytes, or leave "
            "it out (other quantisations: quantization_config in teacher_model_init_kwargs)"
        )
    return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}": True})}
