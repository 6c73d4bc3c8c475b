"""What experiments of one short distillation share: flags, configuration and record."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from retort.distill.config import DistillConfig
from retort.distill.data import load_rows
from retort.provenance import Provenance, write_json


def parser(text: str | None, output: str, **defaults: Any) -> argparse.ArgumentParser:
    """The flags; ``defaults`` are those of layers, steps, valid_rows and learning_rate."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("train", type=Path)
    made.add_argument("valid", type=Path)
    made.add_argument("--teacher", default="smollm2-135m-instruct")
    for name, value in defaults.items():
        made.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    made.add_argument("--bf16", action="store_true", help="training passes under bf16 autocast")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=Path, default=Path(output))
    return made


def configuration(given: Any, folder: str, **changes: Any) -> DistillConfig:
    """Distillation on a data set's completions, four rows a step, cosine after a warm-up."""
    values: dict[str, Any] = {
        "output_dir": folder,
        "method": "kd",
        "max_steps": given.steps,
        "per_device_train_batch_size": 4,
        "learning_rate": given.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "as_chat": True,
        "skip_long_prompts": True,
        "save_strategy": "no",
        "bf16": given.bf16,
        "seed": given.seed,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillConfig(**{**values, **changes})


def first_rows(path: Path, count: int) -> Any:
    """The first rows of a file, all where it has fewer."""
    rows = load_rows(str(path))
    return rows.select(range(min(count, len(rows))))


def write(given: Any, found: dict[str, Any]) -> None:
    """``found`` and what produced it, without the machine's paths."""
    settings = {k: Path(v).name if isinstance(v, Path) else v for k, v in vars(given).items()}
    settings["teacher"] = Path(given.teacher).name
    record = Provenance.collect(settings, {"seed": given.seed}).to_dict()
    write_json(given.output, {**found, "provenance": {**record, "command": []}})
