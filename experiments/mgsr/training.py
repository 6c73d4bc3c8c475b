"""Trains one cell: the same `DistillConfig` for every method, stopped by a budget of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cells import BASE, LEARNING_RATES, RETNET_BASE, TEACHER, Cell, tuning
from settings import Places, Settings
from transformers import TrainerCallback

from retort.distill.config import DistillConfig
from retort.distill.data import Encoding, end_tokens, load_rows, tokenize
from retort.distill.run import run
from retort.models import zoo

SPARE_STEPS = 1.5  # the budget ends a run, not the number of steps, unless texts are very short


class TokenBudget(TrainerCallback):
    """Ends training once the student has been trained on ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count what the optimiser step read; the count is in the checkpoint."""
        if state.num_input_tokens_seen >= self.tokens:
            control.should_training_stop = True


def train(cell: Cell, settings: Settings, places: Places) -> dict[str, Any]:
    """Run (or go on with) the cell's training and return what it took."""
    config = configuration(cell, settings, places)
    run(config, [TokenBudget(budget(cell, settings))])
    return summary(places.model(cell.name))


def budget(cell: Cell, settings: Settings) -> int:
    """Student tokens of the cell."""
    stages = {
        "teacher": settings.teacher_tokens,
        "base": settings.base_tokens,
        "retnet-base": settings.base_tokens,
        "tune": settings.tuning_tokens,
    }
    return stages.get(cell.stage, settings.method_tokens)


def configuration(cell: Cell, settings: Settings, places: Places) -> DistillConfig:
    """Everything but method, seed, rate and models is one for all cells."""
    config = DistillConfig(
        output_dir=str(places.model(cell.name)),
        method=cell.method,
        learning_rate=learning_rate(cell, settings, places),
        seed=cell.seed,
        dataset_name=str(places.data / "dolly_train.jsonl"),
        max_train_rows=settings.train_rows,
        as_chat=True,
        max_length=settings.max_length,
        skip_long_prompts=True,
        max_completion_length=settings.max_completion_length,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        bf16=bool(settings.bf16),
        scrg_warmup_steps=settings.scrg_warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        max_steps=10**6,  # replaced below
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        save_steps=20,
        save_total_limit=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **models(cell, settings, places),
        **followed(cell, places),
        **cell.overrides,
    )
    config.max_steps = steps(config, budget(cell, settings), places)
    return config


def models(cell: Cell, settings: Settings, places: Places) -> dict[str, Any]:
    """Which student starts, and which teacher stands beside it."""
    teacher = str(places.model(TEACHER.name))
    if cell.stage == "teacher":
        return {"model_name_or_path": settings.model}
    if cell.stage == "base":
        return {
            "model_name_or_path": teacher,
            "student_num_hidden_layers": settings.student_layers,
        }
    if cell.stage == "retnet-base":
        return {
            "student_type": "dense_retnet",
            "student_num_hidden_layers": settings.retnet_layers,
            "teacher_model_name_or_path": teacher,
        }
    start = RETNET_BASE if cell.retnet else BASE
    return {
        "model_name_or_path": str(places.model(start.name)),
        "teacher_model_name_or_path": teacher,
    }


def followed(cell: Cell, places: Places) -> dict[str, Any]:
    """DistiLLM's scheduler follows the loss on the validation file."""
    if cell.method != "distillm":
        return {}
    return {
        "eval_dataset_name": str(places.data / "dolly_valid.jsonl"),
        "max_eval_rows": 16,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 8,
    }


def learning_rate(cell: Cell, settings: Settings, places: Places) -> float:
    """The cell's own, or the tuning cell's that wrote the best answers to the validation file."""
    if cell.learning_rate is not None:
        return cell.learning_rate
    if cell.retnet or not settings.tuning_tokens:
        return LEARNING_RATES[-1]
    found = [json.loads(places.result(c.name).read_text("utf-8")) for c in tuning(cell.method)]
    return max(found, key=lambda record: record["validation"]["mean"])["learning_rate"]


def steps(config: DistillConfig, tokens: int, places: Places) -> int:
    """Optimiser steps that read about ``tokens``, with some to spare."""
    recipe = config.recipe
    streams = 2 if recipe.sft_weight and recipe.distils and recipe.lmbda != 0 else 1
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * streams
    return math.ceil(SPARE_STEPS * tokens / (rows * _mean_tokens(config, places)))


def _mean_tokens(config: DistillConfig, places: Places, sample: int = 200) -> float:
    """Mean tokens of the first rows of the training file that fit, prompt and completion."""
    name = config.model_name_or_path or config.teacher_model_name_or_path
    tokenizer = zoo.load_tokenizer(str(name))
    encoding = Encoding(
        tokenizer, end_tokens(tokenizer), config.max_length, True, True, skip_long_prompts=True
    )
    rows = load_rows(str(places.data / "dolly_train.jsonl"))
    made = tokenize(rows.select(range(min(sample, len(rows)))), encoding)
    return sum(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in made) / len(made)


def summary(folder: Path) -> dict[str, Any]:
    """Steps, tokens, phase times and sums of the run's log."""
    lines = [json.loads(x) for x in (folder / "training.jsonl").read_text("utf-8").splitlines()]
    logged = [line for line in lines if "loss" in line]
    sums = ("time/", "rollout/", "scrg/corrected", "scrg/regenerated", "scrg/student", "scrg/teach")
    names = {key for line in logged for key in line if key.startswith(sums)}
    state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
    return {
        "steps": state["global_step"],
        "student_tokens": state["num_input_tokens_seen"],
        "sums": {n: round(sum(line.get(n, 0.0) for line in logged), 2) for n in sorted(names)},
        "last": {k: v for k, v in logged[-1].items() if isinstance(v, int | float)},
        "loss": [round(line["loss"], 4) for line in logged],
        "scrg_nll": [
            [round(line[f"scrg/nll_{when}"], 4) for when in ("before", "after")]
            for line in logged
            if "scrg/nll_before" in line
        ],
    }
