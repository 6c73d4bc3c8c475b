"""Students: loaded, cut out of a larger model, or built around a teacher's embedding and head."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from retort.distill.config import DistillConfig
from retort.errors import ConfigurationError

NORM_SCALE = 0.1
"""[ours] A new student's states are nearly its token's own embedding, for which a trained head is
sure of the wrong token (loss 49 on SmolLM2 instead of 10.8 for a guess). Scaled down, training
starts from a guess: 7.5 instead of 9.4 after 40 steps; 0.03 and 0.3 are no better [measured]."""


def build_student(config: DistillConfig, teacher: Any = None) -> Any:
    """The student that the configuration describes.

    `student_type` builds one around ``teacher``; otherwise `model_name_or_path` is loaded, and
    cut to `student_num_hidden_layers` where that is given. Raises ConfigurationError when neither
    is named, or both.
    """
    if config.student_type is not None:
        model = _built(config, teacher)
    else:
        model = _loaded(config)
    if config.freeze_embeddings:
        freeze_embeddings(model)
    return model


def cut_layers(model: Any, count: int) -> Any:
    """A copy of ``model`` with ``count`` of its decoder layers, evenly spaced, ends included.

    Embedding, final norm and head are copied; weights that were tied stay tied. Raises
    ConfigurationError when it has fewer layers, or keeps them in no list of that length.
    """
    config = model.config.get_text_config()
    total = config.num_hidden_layers
    if not 1 <= count <= total:
        raise ConfigurationError(
            f"student_num_hidden_layers={count}: the model has {total} layers to choose from"
        )
    prefix = _layer_list(model, total)
    kept = evenly_spaced(total, count)
    student = type(model)(_shortened(model.config, kept))
    student.load_state_dict(_renumbered(model.state_dict(), prefix, kept))
    student.tie_weights()
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(model.dtype).eval()


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` indices below ``total``, first and last included; a single one is the first."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def dense_retnet_student(teacher: Any, layers: int, **overrides: Any) -> Any:
    """A DenseRetNet of the teacher's width with its embedding, head and final norm.

    Retention layers start at random (torch's global generator). Embedding and head are tied
    where the teacher's are. [ours] The final norm is copied too, because the head was trained
    behind it, and scaled by `NORM_SCALE`. ``overrides`` are values of `DenseRetNetConfig`. Raises
    ConfigurationError when one of them is unknown or changes the width.
    """
    from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM

    values = _dense_retnet_values(teacher.config.get_text_config(), layers)
    _check_known(overrides, DenseRetNetConfig())
    student = DenseRetNetForCausalLM(DenseRetNetConfig(**{**values, **overrides}))
    student.to(teacher.dtype)
    student.generation_config.eos_token_id = teacher.generation_config.eos_token_id
    copy_embeddings(teacher, student)
    norm = getattr(getattr(teacher.base_model, "norm", None), "weight", None)
    if isinstance(norm, torch.Tensor):
        _copy(norm * NORM_SCALE, student.model.norm.weight, "final norm")
    return student.eval()


def copy_embeddings(teacher: Any, student: Any) -> None:
    """Copy the teacher's input embedding and head. Raises ConfigurationError if widths differ."""
    source, target = teacher.get_input_embeddings(), student.get_input_embeddings()
    _copy(source.weight, target.weight, "embedding")
    source, target = teacher.get_output_embeddings(), student.get_output_embeddings()
    _copy(source.weight, target.weight, "head")


def freeze_embeddings(model: Any) -> None:
    """Take embedding and head out of training."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: modules, and the rates that attention layers hold."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _loaded(config: DistillConfig) -> Any:
    from retort.models import zoo

    if config.model_name_or_path is None:
        raise ConfigurationError("no student: set model_name_or_path, or student_type")
    keywords = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    remote = config.trust_remote_code
    model = zoo.load_model(config.model_name_or_path, trust_remote_code=remote, **keywords)
    layers = config.student_num_hidden_layers
    return model if layers is None else cut_layers(model, layers)


def _built(config: DistillConfig, teacher: Any) -> Any:
    if config.model_name_or_path is not None:
        raise ConfigurationError(
            f"student_type={config.student_type!r} builds a student and model_name_or_path names "
            "one: leave one of them out"
        )
    if teacher is None:
        raise ConfigurationError(
            f"student_type={config.student_type!r} is built around a teacher: set "
            "teacher_model_name_or_path"
        )
    overrides = dict(config.student_config or {})  # type: ignore[arg-type]
    return dense_retnet_student(teacher, config.student_num_hidden_layers or 4, **overrides)


def _dense_retnet_values(teacher: Any, layers: int) -> dict[str, Any]:
    keys = teacher.hidden_size // 2
    heads = next(h for h in (4, 2, 1) if keys % (2 * h) == 0 or h == 1)
    return {
        "vocab_size": teacher.vocab_size,
        "hidden_size": teacher.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_v_select_scale": min(32, teacher.hidden_size),
        "tie_word_embeddings": bool(teacher.tie_word_embeddings),
        "bos_token_id": teacher.bos_token_id,
        "eos_token_id": teacher.eos_token_id,
        "pad_token_id": None,
    }


def _check_known(overrides: dict[str, Any], config: Any) -> None:
    unknown = sorted(name for name in overrides if not hasattr(config, name))
    if unknown:
        raise ConfigurationError(f"student_config: DenseRetNet has no {unknown[0]!r}")


@torch.no_grad()
def _copy(source: torch.Tensor, target: torch.Tensor, what: str) -> None:
    if source.shape != target.shape:
        raise ConfigurationError(
            f"the teacher's {what} is {list(source.shape)} and the student's {list(target.shape)}: "
            "leave hidden_size and vocab_size as they are"
        )
    target.copy_(source)


def _layer_list(model: nn.Module, total: int) -> str:
    """Name of the module list that holds the decoder layers."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if len(lists) != 1:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be cut: its {total} layers are in {len(lists)} lists"
        )
    return lists[0]


def _shortened(config: Any, kept: list[int]) -> Any:
    """The configuration with the kept layers; lists with one entry a layer are cut alike."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    return config


def _renumbered(state: dict[str, Any], prefix: str, kept: list[int]) -> dict[str, Any]:
    places = {old: new for new, old in enumerate(kept)}
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.(.*)$")
    result = {}
    for name, value in state.items():
        found = pattern.match(name)
        if found is None:
            result[name] = value
        elif int(found[1]) in places:
            result[f"{prefix}.{places[int(found[1])]}.{found[2]}"] = value
    return result
