"""Our model classes join transformers' Auto classes, whoever is imported first.

`install_hooks` runs at ``import retort`` and loads neither torch nor transformers. It leaves
post-import hooks on transformers' two Auto modules, on our own model modules, and on PEFT's
defaults, which then know the linears of ours.

No hook imports a model. transformers loads its Auto modules in the middle of loading others (its
quantizers, for one), and a model module imported at that moment would find ``PreTrainedModel``
half defined. So ``AutoConfig`` first gets a proxy that loads our module when a checkpoint with
our ``model_type`` is met; the module's own hook then registers the real classes.

To add an architecture, add a line to `ARCHITECTURES`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from wrapt import lazy_import, register_post_import_hook

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_ADAPTERS = "peft.utils.constants"
_RETNET_LORA = ("q_proj", "k_proj", "vg_proj", "o_proj")


@dataclass(frozen=True)
class Architecture:
    """Where the classes of one ``model_type`` live; a class name of ``None`` is not registered.

    ``lora`` names the linears that PEFT's LoRA adapts where its user names none.
    """

    model_type: str
    module: str
    config: str
    causal_lm: str
    model: str | None = None
    lora: tuple[str, ...] = ()


ARCHITECTURES = (
    Architecture(
        model_type="dense_retnet",
        module="retort.models.dense_retnet",
        config="DenseRetNetConfig",
        causal_lm="DenseRetNetForCausalLM",
        model="DenseRetNetModel",
        lora=_RETNET_LORA,
    ),
    Architecture(
        model_type="dense_mamba",
        module="retort.models.dense_mamba",
        config="DenseMambaConfig",
        causal_lm="DenseMambaForCausalLM",
        model="DenseMambaModel",
        lora=("in_proj", "x_proj", "out_proj"),
    ),
    Architecture(
        model_type="DenseGauRetNet",
        module="retort.models.conversion",
        config="DenseGauRetNetConfig",
        causal_lm="DenseGauRetNetForCausalLM",
        lora=_RETNET_LORA,
    ),
)


def install_hooks() -> None:
    """Register every architecture now or as soon as both sides have loaded."""
    register_post_import_hook(_on_configurations, _CONFIGURATIONS)
    register_post_import_hook(_on_models, _MODELS)
    register_post_import_hook(_on_adapters, _ADAPTERS)
    for module in {architecture.module for architecture in ARCHITECTURES}:
        register_post_import_hook(_on_own_module, module)


def _on_configurations(auto: ModuleType) -> None:
    for architecture in ARCHITECTURES:
        if not _register_config(architecture):
            proxy = lazy_import(architecture.module, architecture.config)
            auto.CONFIG_MAPPING.register(architecture.model_type, proxy, exist_ok=True)


def _on_models(_: ModuleType) -> None:
    for architecture in ARCHITECTURES:
        _register_models(architecture)


def _on_adapters(constants: ModuleType) -> None:
    known = getattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {})
    for architecture in ARCHITECTURES:
        known.setdefault(architecture.model_type, list(architecture.lora))


def _on_own_module(module: ModuleType) -> None:
    for architecture in ARCHITECTURES:
        if architecture.module == module.__name__:
            _register_config(architecture)
            _register_models(architecture)


def _register_config(architecture: Architecture) -> bool:
    """Register the configuration class; ``False`` while either side has yet to load."""
    auto = _loaded(_CONFIGURATIONS, "AutoConfig")
    config = _loaded(architecture.module, architecture.config)
    if auto is None or config is None:
        return False
    auto.register(architecture.model_type, config, exist_ok=True)
    return True


def _register_models(architecture: Architecture) -> None:
    """Register the model classes; nothing while either side has yet to load."""
    config = _loaded(architecture.module, architecture.config)
    pairs = {"AutoModelForCausalLM": architecture.causal_lm, "AutoModel": architecture.model}
    for auto_name, own_name in pairs.items():
        auto = _loaded(_MODELS, auto_name)
        model = _loaded(architecture.module, own_name) if own_name is not None else None
        if auto is not None and config is not None and model is not None:
            auto.register(config, model, exist_ok=True)


def _loaded(module: str, name: str) -> Any:
    """``module.name``, ``None`` while its import has not come as far as defining it."""
    return getattr(sys.modules.get(module), name, None)
