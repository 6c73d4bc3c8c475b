"""``retort env``: versions and devices, for a bug report."""

from __future__ import annotations

import importlib
import os
import platform
from typing import Annotated, Any

import typer

from retort.cli.output import print_json, print_table

_PACKAGES = (
    *("retort-lm", "torch", "transformers", "accelerate", "datasets", "safetensors"),
    *("tokenizers", "gguf", "peft", "numpy"),
)


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("env")(env)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for a machine.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Also say what of this model runs natively, and which modules do not."),
    ] = None,
) -> None:
    """Print versions, devices and the CPU backend in use.

    Example: retort env --json
    """
    facts = environment()
    if model is not None:
        facts["model"] = inspect_model(model)
    if as_json:
        print_json(facts)
        return
    flat = {k: v for k, v in facts.items() if k not in ("versions", "model")} | facts["versions"]
    flat |= {f"model: {k}": v for k, v in facts.get("model", {}).items()}
    rows = [(k, ", ".join(v) if isinstance(v, list) else str(v)) for k, v in flat.items()]
    print_table(("what", "value"), rows)


def environment() -> dict[str, Any]:
    """Everything that `env` prints; ``cpu_backend`` is ``native`` or ``torch``."""
    import torch

    from retort.models.zoo import cache_root
    from retort.provenance import versions

    cuda = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *cuda],
        **_cpu_backend(),
        "cache": str(cache_root()),
        "versions": versions(_PACKAGES),
    }


def inspect_model(name: str) -> dict[str, Any]:
    """What of a model runs natively, and ``variant_modules``: whose bits depend on the batch."""
    from retort.decode.invariance import variant_modules
    from retort.decode.packed import PackedModel
    from retort.models.zoo import load_model

    packed = PackedModel(load_model(name, "float32"), release_weights=True)
    try:
        return packed.backend.facts() | {"variant_modules": variant_modules(packed)}
    finally:
        packed.close()


def _cpu_backend() -> dict[str, Any]:
    native = importlib.import_module("retort.ops.native")
    found = native.available()
    facts = {"cpu_backend": "native" if found else "torch", "cpu_isa": native.isa()}
    return facts if found else {**facts, "cpu_backend_reason": native.why_not()}
