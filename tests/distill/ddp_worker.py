"""What each process of a distributed test runs, started by ``accelerate launch``.

Every method trains a few optimiser steps in float64; the main process' logs and weights, and
whether all processes ended alike, are what the test reads.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model

from retort.distill.presets import PRESETS
from retort.train.leaving import leave_group
from tests.distill.toys import FULL_BUFFER, ROWS, llama, trainer

REPLAY = {"method": "kd", "lmbda": 0.6, "sft_weight": 0.5, "max_steps": 4}
REPLAY |= {"replay_buffer_size": 6, "replay_share": 0.5}
LORA = {"method": "mgsr", "adapted_student": True}
SELDOM = {"method": "kd", "lmbda": 0.15, "max_steps": 4}  # some steps, one process writes nothing
ANSWERS = {"method": "sft", "predict_with_generate": True, "eval_dataset": ROWS[:5]}
ANSWERS |= {"eval_strategy": "steps", "eval_steps": 1, "report_samples": 2}
RESUMED = {**REPLAY, "method": "mgsr", "save_strategy": "steps", "save_steps": 2}
RESUMED |= {"logging_steps": 3, "dac_mode": "learned", "lmbda": 0.8}


def cases():
    """Arguments of each run by name: every preset, mixes, a LoRA student, and evaluation."""
    mixes = {"replay": REPLAY, "seldom": SELDOM, "lora": LORA, "answers": ANSWERS}
    mixes["full buffer"] = FULL_BUFFER
    return {name: {"method": name} for name in PRESETS} | mixes


def adapted(model):
    """``model`` with a LoRA adapter in float64 that already changes what it says."""
    torch.manual_seed(0)
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, value in made.named_parameters():
        if "lora_" in name:
            value.data = torch.nn.init.normal_(torch.empty_like(value), std=0.2).double()
    return made


def build(folder, batch_size, accumulation, adapted_student=False, **changes):
    """A trainer over `ROWS` in float64."""
    student, teacher = llama(2, dtype=torch.float64), llama(1, dtype=torch.float64)
    student = adapted(student) if adapted_student else student
    values = {"per_device_train_batch_size": batch_size, "max_steps": 2}
    values |= {"gradient_accumulation_steps": accumulation}
    return trainer(folder, student, teacher, **{**values, **changes})


def train(folder, batch_size, accumulation, start=None, **changes):
    """A run, and how many texts this process wrote in each step."""
    made = build(folder, batch_size, accumulation, **changes)
    draw, written = made.rollouts.sources.draw, []

    def counted(*arguments):
        sequences, writing = draw(*arguments)
        written.append(len(writing.texts))
        return sequences, writing

    made.rollouts.sources.draw = counted
    made.train(resume_from_checkpoint=start)
    return made, written


def digest(made):
    """Sums of weights, of the band's state and of the buffer, to be compared between processes."""
    bands = made.objective.bands
    parts = {
        name: float(p.detach().double().sum())
        for name, p in made._bare_student().named_parameters()
    }
    if bands is not None:
        parts |= {f"bands.{n}": float(v.double().sum()) for n, v in bands.tensors().items()}
        parts |= {f"bands.{n}": v for n, v in bands.numbers().items()}
    return parts | {"buffer": json.dumps(made.rollouts.sources.buffer.state_dict())}


def record(folder, made, written):
    """What every process ended with, for the test to read."""
    both = gather_object([{"digest": digest(made), "written": written}])
    if made.is_world_process_zero():
        (folder / "ends.json").write_text(json.dumps(both))


def resume(root):
    """An unbroken run, and one that goes on from its checkpoint in the middle."""
    whole, again = root / "whole", root / "again"
    record(whole, *train(whole, 2, 2, **RESUMED))
    made = build(again, 2, 2, **RESUMED)  # only to ask which process this is
    if made.is_world_process_zero():
        again.mkdir(exist_ok=True)
        os.symlink(whole / "checkpoint-2", again / "checkpoint-2")
    made.accelerator.wait_for_everyone()
    record(again, *train(again, 2, 2, start=str(again / "checkpoint-2"), **RESUMED))


def main(root):
    for accumulation in (1, 2):
        for name, changes in cases().items():
            folder = root / str(accumulation) / name
            record(folder, *train(folder, 4 // accumulation, accumulation, **changes))
    resume(root)
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
