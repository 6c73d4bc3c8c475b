"""Two processes × 4 rows are one process × 8 rows: real processes under `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distill.ddp_worker import build, cases, digest, train

ROOT = Path(__file__).resolve().parents[2]
# accelerate starts several processes of a CPU by MPI only; torchrun's launcher does it without.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0"]


def launch(module, *arguments, check=True):
    """Run ``module`` in two gloo processes."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Every case in two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch("tests.distill.ddp_worker", folder)
    return folder


def test_a_process_ends_behind_its_exit_handlers_and_before_its_interpreter(tmp_path):
    assert launch("tests.distill.leaving_worker", tmp_path).stdout.count("complete") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ended-0", "ended-1"]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Every case in this process, on demand."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def run(name):
        if name not in made:
            made[name] = folder / name, digest(train(folder / name, 8, 1, **cases()[name])[0])
        return made[name]

    return run


def steps(folder):
    """The records of optimiser steps, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "train_"))}
        for line in lines
        if "loss" in line
    ]


def ends(folder, what):
    """What each of the two processes ended with."""
    both = json.loads((folder / "ends.json").read_text())
    assert len(both) == 2
    return [each[what] for each in both]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", cases())
def test_two_processes_are_one_with_twice_the_rows(shared, single, name, accumulation):
    folder, whole = single(name)
    ours = shared / str(accumulation) / name
    one, two = steps(folder), steps(ours)
    assert len(one) == len(two) >= 2
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():  # loss, gradient norm, every term, count and share
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    if name == "full buffer":
        assert "source/student" in one[0] and "source/replay" in one[-1]
    first, second = ends(ours, "digest")
    assert first == second  # both processes hold the same weights, bands and buffer
    assert first.keys() == whole.keys()
    for key, value in whole.items():
        expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-4)
        assert first[key] == expected, key


def test_an_adapter_moves_in_both_processes_and_its_base_in_neither(shared, single):
    start = digest(build(shared / "start", 8, 1, **cases()["lora"]))
    names = {name for name in start if name.startswith(("model.", "lm_head."))}
    adapter = {name for name in names if "lora_" in name}
    for end in single("lora")[1], *ends(shared / "1" / "lora", "digest"):
        assert {name for name in names if start[name] != end[name]} == adapter != set()


def test_a_process_that_writes_nothing_does_not_hold_up_the_other(shared):
    written = list(zip(*ends(shared / "1" / "seldom", "written"), strict=True))
    assert any(min(step) == 0 < max(step) for step in written), written


def test_answers_are_shared_out_and_scored_together(shared, single):
    names = [f"eval_{name}" for name in ("rouge_l", "distinct_1", "distinct_2", "gen_len")]
    logs, samples = [], []
    for folder in single("answers")[0], shared / "1" / "answers", shared / "2" / "answers":
        lines = map(json.loads, (folder / "training.jsonl").read_text().splitlines())
        logs.append([[line[n] for n in names] for line in lines if names[0] in line])
        samples.append((folder / "samples.json").read_text())
    assert logs[0] == logs[1] == logs[2] and len(logs[0]) == 2
    assert samples[0] == samples[1] == samples[2]


def test_two_processes_go_on_exactly_from_a_checkpoint(shared):
    whole, again = shared / "whole", shared / "again"
    assert ends(whole, "digest") == ends(again, "digest")
    one, two = steps(whole)[-1], steps(again)[-1]
    assert one.keys() == two.keys() and two["step"] == 3  # a record over the checkpoint at step 2
    for key in one.keys() - {"loss"}:  # transformers averages the loss from the restart on
        assert two[key] == pytest.approx(one[key], rel=1e-12), key
