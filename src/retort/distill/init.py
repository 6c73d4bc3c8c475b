"""Students: loaded, cut out of a larger model, or built around a teacher (see `builders`)."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from retort.distill.adapters import with_adapter
from retort.distill.config import DistillConfig
from retort.errors import ConfigurationError


def build_student(config: DistillConfig, teacher: Any = None) -> Any:
    """The student that the configuration describes.

    `student_type` builds one around ``teacher``; otherwise `model_name_or_path` is loaded, and
    cut to `student_num_hidden_layers` or `student_layer_indices` where one is given. With
    `use_peft` it gets an adapter. Raises ConfigurationError when neither is named, or both.
    """
    _check_named(config, teacher)
    model = _loaded(config) if config.student_type is None else _built(config, teacher)
    if config.freeze_embeddings:
        freeze_embeddings(model)
    return with_adapter(model, config) if config.use_peft else model


def student_outline(config: DistillConfig, teacher: Any = None) -> Any:
    """What is known of `build_student`'s student before ``teacher``, an outline too, is loaded.

    One that is built ends its texts as its teacher does, and no longer sequence fits it. Raises
    ConfigurationError as `build_student`.
    """
    from retort.models import zoo

    _check_named(config, teacher)
    if config.student_type is not None:
        return teacher
    keywords = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    name = config.model_name_or_path or ""
    found = zoo.load_outline(name, config.trust_remote_code, **keywords)
    if config.student_layer_indices is not None:
        _check_kept(config.student_layer_indices, found.config)
    elif config.student_num_hidden_layers is not None:
        _check_count(config.student_num_hidden_layers, found.config)
    return found


def cut_layers(model: Any, count: int) -> Any:
    """A copy of ``model`` with ``count`` of its decoder layers, evenly spaced, ends included.

    Raises ConfigurationError when it has fewer layers; see `keep_layers`.
    """
    return keep_layers(model, evenly_spaced(_check_count(count, model.config), count))


def keep_layers(model: Any, kept: list[int]) -> Any:
    """A copy of ``model`` with the decoder layers ``kept``, counted from 0, in their order.

    Embedding, final norm and head are copied; weights that were tied stay tied. Raises
    ConfigurationError for layers that it lacks or that are named twice or out of order, and when
    it keeps its layers in no list of that length.
    """
    prefix = _layer_list(model, _check_kept(kept, model.config))
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

    keywords = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    name, remote = config.model_name_or_path or "", config.trust_remote_code
    model = zoo.load_model(name, trust_remote_code=remote, **keywords)
    if config.student_layer_indices is not None:
        return keep_layers(model, config.student_layer_indices)
    layers = config.student_num_hidden_layers
    return model if layers is None else cut_layers(model, layers)


def _check_named(config: DistillConfig, teacher: Any) -> None:
    if config.student_type is None:
        if config.model_name_or_path is None:
            raise ConfigurationError("no student: set model_name_or_path, or student_type")
        return
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


def _built(config: DistillConfig, teacher: Any) -> Any:
    from retort.distill import builders

    build = getattr(builders, f"{config.student_type}_student")
    overrides = dict(config.student_config or {})  # type: ignore[arg-type]
    layers = config.student_num_hidden_layers or 4
    return build(teacher, layers, warm_start=config.warm_start, **overrides)


def _check_count(count: int, config: Any) -> int:
    """The number of layers of a model, which must have ``count`` of them."""
    total: int = config.get_text_config().num_hidden_layers
    if not 1 <= count <= total:
        raise ConfigurationError(
            f"student_num_hidden_layers={count}: the model has {total} layers to choose from"
        )
    return total


def _check_kept(kept: list[int], config: Any) -> int:
    """The number of layers of a model, which must have those that are ``kept``."""
    total: int = config.get_text_config().num_hidden_layers
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < total:
        raise ConfigurationError(
            f"student_layer_indices={kept}: use rising numbers from 0 to {total - 1}"
        )
    return total


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
