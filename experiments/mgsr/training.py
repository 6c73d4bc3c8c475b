"""Trains one cell: the same `DistillConfig` for every method, stopped by a budget of tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cells import BASE, LEARNING_RATES, RETNET_BASE, TEACHER, Cell, tuning
from pace import TokenBudget
from rows import fitting_rows, training_file
from settings import Places, Settings

from retort.distill.config import DistillConfig
from retort.distill.influence import layer_influence, most_influential
from retort.distill.presets import preset
from retort.distill.run import run
from retort.models import zoo

INFLUENCE_ROWS = 32


def train(cell: Cell, settings: Settings, places: Places) -> dict[str, Any]:
    """Run (or go on with) the cell's training and return what it took."""
    tuned, folder = tuned_model(cell, settings, places), places.model(cell.name)
    if tuned is not None and not folder.is_dir():
        tuned.rename(folder)
    config = configuration(cell, settings, places)
    if not (folder / "trainer_state.json").is_file():  # the last that a run writes
        run(config, [TokenBudget(settings.tokens(cell.stage))])
    return summary(folder)


def tuned_model(cell: Cell, settings: Settings, places: Places) -> Path | None:
    """The tuning run of the same method, seed, rate and budget, if its student is there."""
    if cell.stage not in ("main", "other") or settings.tuning_tokens != settings.method_tokens:
        return None
    rate = learning_rate(cell, settings, places)
    twin = next((c for c in tuning(cell.method) if c.learning_rate == rate), None)
    found = twin and twin.seed == cell.seed and places.model(twin.name)
    return found if found and found.is_dir() else None


def configuration(cell: Cell, settings: Settings, places: Places) -> DistillConfig:
    """Everything but method, seed, rate and models is one for all cells.

    A step reads ``settings.rows`` sequences whatever the method: those that learn the data set's
    text beside the student's take half as many prompts.
    """
    config = DistillConfig(
        output_dir=str(places.model(cell.name)),
        method=cell.method,
        learning_rate=learning_rate(cell, settings, places),
        adam_beta2=0.98,
        seed=cell.seed,
        dataset_name=training_file(cell.seed, settings, places),
        train_sampling_strategy="sequential",
        as_chat=True,
        max_length=settings.max_length,
        max_completion_length=settings.max_completion_length,
        per_device_train_batch_size=settings.rows,
        freeze_embeddings=True,
        bf16=bool(settings.bf16),
        lr_scheduler_type="constant",  # see `TokenBudget`
        max_steps=math.ceil(settings.tokens(cell.stage) / settings.least_step_tokens),
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        save_steps=20,
        save_total_limit=1,
        report_samples=0,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **models(cell, settings, places),
        **teacher_type(cell, settings),
        **followed(cell, places),
        **revised(cell, settings),
        **cell.overrides,
    )
    config.per_device_train_batch_size = max(settings.rows // streams(config), 1)
    return config


def streams(config: DistillConfig) -> int:
    """Sequences that the student reads for each prompt."""
    recipe = config.recipe
    return 2 if recipe.contrast or (recipe.sft_weight and recipe.writes) else 1


def models(cell: Cell, settings: Settings, places: Places) -> dict[str, Any]:
    """Which student starts, and which teacher stands beside it."""
    teacher = str(places.model(TEACHER.name))
    if cell.stage == "teacher":
        return {"model_name_or_path": settings.model}
    if cell.stage == "base":
        kept = influential_layers(settings, places)
        return {
            "model_name_or_path": teacher,
            "student_layer_indices": kept,
            "teacher_model_name_or_path": teacher,
        }
    if cell.stage == "retnet-base":
        return {
            "student_type": "dense_retnet",
            "warm_start": True,
            "student_num_hidden_layers": settings.retnet_layers,
            "teacher_model_name_or_path": teacher,
        }
    start = RETNET_BASE if cell.retnet else BASE
    return {
        "model_name_or_path": str(places.model(start.name)),
        "teacher_model_name_or_path": teacher,
    }


def teacher_type(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The teacher beside a student in bf16 too; one that a student is built from stays float32."""
    built = cell.stage in (TEACHER.stage, RETNET_BASE.stage)
    return (
        {} if built or not settings.bf16 else {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    )


def influential_layers(settings: Settings, places: Places) -> list[int]:
    """The teacher's layers that turn its states most on training rows; kept in a file."""
    path = places.work / "layers.json"
    if not path.is_file():
        texts = [ids for _, ids in fitting_rows(settings, places)[:INFLUENCE_ROWS]]
        found = layer_influence(zoo.load_model(places.model(TEACHER.name)), texts)
        path.write_text(json.dumps(most_influential(found, settings.student_layers)), "utf-8")
    return json.loads(path.read_text("utf-8"))


def followed(cell: Cell, places: Places) -> dict[str, Any]:
    """DistiLLM's scheduler follows the loss on the validation file."""
    if cell.method != "distillm":
        return {}
    return {
        "eval_dataset_name": str(places.data / "dolly_valid.jsonl"),
        "skip_long_prompts": True,
        "max_eval_rows": 16,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "per_device_eval_batch_size": 8,
    }


def revised(cell: Cell, settings: Settings) -> dict[str, Any]:
    """When revision begins, for the cells that revise."""
    revises = cell.overrides.get("scrg", preset(cell.method).scrg)
    return {"scrg_warmup_steps": settings.scrg_warmup_steps} if revises else {}


def learning_rate(cell: Cell, settings: Settings, places: Places) -> float:
    """The cell's own, or the tuning cell's that wrote the best answers to the validation file."""
    if cell.learning_rate is not None:
        return cell.learning_rate
    if not settings.tuning_tokens:
        return LEARNING_RATES[0]
    found = [json.loads(places.result(c.name).read_text("utf-8")) for c in tuning(cell.method)]
    return max(found, key=lambda record: record["validation"]["mean"])["learning_rate"]


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
