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
) -> None:
    """Print versions, devices and the CPU backend in use.

    Example: retort env --json
    """
    facts = environment()
    if as_json:
        print_json(facts)
        return
    flat = {k: v for k, v in facts.items() if k != "versions"} | facts["versions"]
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


def _cpu_backend() -> dict[str, Any]:
    native = importlib.import_module("retort.ops.native")
    found = native.available()
    facts = {"cpu_backend": "native" if found else "torch", "cpu_isa": native.isa()}
    return facts if found else {**facts, "cpu_backend_reason": native.why_not()}
