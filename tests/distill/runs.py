"""Whole runs of `retort.distill.run` on a folder of tiny models, and what they leave."""

import json

import torch
from safetensors.torch import load_file

from retort.train import checkpoint
from tests.distill.toys import config


def settings(parts, folder, **changes):
    student = {"model_name_or_path": str(parts / "student"), "student_num_hidden_layers": 2}
    values = {
        "teacher_model_name_or_path": str(parts / "teacher"),
        "dataset_name": str(parts / "rows.jsonl"),
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 10,
        "disable_dropout": False,
    }
    if changes.get("student_type") is None:
        values |= student
    return config(folder, **{**values, **changes})


def final(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_runs(left, right):
    ours, theirs = final(left), final(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    a, b = (checkpoint.load_state(checkpoint.newest(folder)) for folder in (left, right))
    times = {key for key in a[0]["meter"] if key.startswith("time/")}
    for key in a[0].keys() - {"meter"}:
        assert a[0][key] == b[0][key], key
    for key in a[0]["meter"].keys() - times:
        assert a[0]["meter"][key] == b[0]["meter"][key], key
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name]), name


def log(folder):
    """Every logged number but times."""
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    skipped = ("time/", "train_", "eval_runtime", "eval_samples", "eval_steps")
    return [{k: v for k, v in line.items() if not k.startswith(skipped)} for line in lines]
