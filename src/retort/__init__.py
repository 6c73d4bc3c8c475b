"""Retort: distil a language model into a small student, and serve either one faster.

Importing this package is cheap: public names load on first use, and the model classes register
with transformers' Auto classes when transformers loads those (see `retort.registry`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from retort import registry

if TYPE_CHECKING:
    from retort.decode.engine import Engine
    from retort.decode.hf import speculative
    from retort.decode.params import SamplingParams
    from retort.decode.request import RequestOutput
    from retort.distill.config import DistillConfig
    from retort.distill.trainer import DistillTrainer
    from retort.models.dense_mamba import (
        DenseMambaConfig,
        DenseMambaForCausalLM,
        DenseMambaModel,
    )
    from retort.models.dense_retnet import (
        DenseRetNetConfig,
        DenseRetNetForCausalLM,
        DenseRetNetModel,
    )

_EXPORTS = {
    "DenseMambaConfig": "retort.models.dense_mamba",
    "DenseMambaForCausalLM": "retort.models.dense_mamba",
    "DenseMambaModel": "retort.models.dense_mamba",
    "DenseRetNetConfig": "retort.models.dense_retnet",
    "DenseRetNetForCausalLM": "retort.models.dense_retnet",
    "DenseRetNetModel": "retort.models.dense_retnet",
    "DistillConfig": "retort.distill.config",
    "DistillTrainer": "retort.distill.trainer",
    "Engine": "retort.decode.engine",
    "RequestOutput": "retort.decode.request",
    "SamplingParams": "retort.decode.params",
    "speculative": "retort.decode.hf",
}

__all__ = [
    "DenseMambaConfig",
    "DenseMambaForCausalLM",
    "DenseMambaModel",
    "DenseRetNetConfig",
    "DenseRetNetForCausalLM",
    "DenseRetNetModel",
    "DistillConfig",
    "DistillTrainer",
    "Engine",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "speculative",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version("retort-lm")
    elif name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module 'retort' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})


registry.install_hooks()
