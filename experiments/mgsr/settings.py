"""What all cells share: budgets, lengths and files."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SETS = ("dolly_test", "self_instruct", "vicuna", "s_ni", "unnatural_short")
VALIDATION = "dolly_valid"


@dataclass(frozen=True)
class Settings:
    """Budgets are *student tokens*: prompt and completion tokens that training passes of the
    student read, padding left out, all streams together. What it writes comes on top."""

    model: str = "smollm2-135m-instruct"
    student_layers: int = 15
    retnet_layers: int = 6
    teacher_tokens: int = 80_000
    base_tokens: int = 160_000
    retnet_tokens: int = 120_000
    method_tokens: int = 48_000
    tuning_tokens: int = 48_000  # 0: no tuning, every method takes the grid's first rate
    train_rows: int = 6_000
    max_length: int = 192
    max_completion_length: int = 64  # of what the student writes and of the rows that are kept
    rows: int = 8  # sequences that the student reads in a step, all streams together
    least_step_tokens: int = 450  # a bound of a run's steps, which its tokens end before
    bf16: int = 1  # training passes under bf16 autocast, weights and writing stay float32
    scrg_warmup_steps: int = 4
    prompts: int = 60
    validation_prompts: int = 240
    prompt_tokens: int = 256
    max_new_tokens: int = 64
    joint_prompts: int = 40
    joint_timed: int = 12  # of them, the first, for decoding speed
    joint_draft: int = 2  # drafts a row and step

    def tokens(self, stage: str) -> int:
        """Student tokens of a cell of the stage."""
        stages = {
            "teacher": self.teacher_tokens,
            "base": self.base_tokens,
            "retnet-base": self.retnet_tokens,
            "tune": self.tuning_tokens,
        }
        return stages.get(stage, self.method_tokens)

    def record(self) -> dict[str, Any]:
        """Plain values; a model's folder by its name."""
        return {**asdict(self), "model": Path(self.model).name}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting."""
    for each in fields(Settings):
        kind = str if each.name == "model" else int
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=each.default, help="default: %(default)s")


def from_options(options: argparse.Namespace) -> Settings:
    """The settings of a command line."""
    return Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})


@dataclass(frozen=True)
class Places:
    """Folders: ``data`` is read, ``work`` holds models and checkpoints, ``results`` is kept."""

    data: Path
    work: Path
    results: Path

    def result(self, name: str) -> Path:
        """A cell's record."""
        return self.results / f"{name}.json"

    def model(self, name: str) -> Path:
        """A cell's trained student."""
        return self.work / name
