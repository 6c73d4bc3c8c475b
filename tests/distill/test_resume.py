"""A killed run, started again by the same command, ends in the weights of an unbroken one.

All runs use real processes: `kill -9` reaches no Python code of ours.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from retort.distill.run import run
from retort.distill.sequences.schedule import AdaptiveShare
from retort.train import checkpoint
from retort.train.arguments import resolved
from tests.distill.runs import assert_equal_runs, log, settings

COMMAND = [sys.executable, "-c", "from retort.cli import main; main()", "distill", "--config"]

# Killed in the middle of its second save: before the files are hashed, or between the two.
IN_A_SAVE = """
import os, signal, sys
from retort.cli import main
from retort.train import checkpoint
name, calls = sys.argv.pop(1), []
original = getattr(checkpoint, name)
def killed(*arguments):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(checkpoint, name, killed)
main()
"""
# By the function whose second call it is: steps logged and saved since the checkpoint it began at,
# with one every three steps. `_sync` is called many times in each save.
IN_SAVES = {"save_state": (6, 3), "publish": (6, 3), "_sync": (3, 0)}


def write_command(made, path):
    path.write_text(yaml.safe_dump(resolved(made)))
    return str(path)


MIXES = {
    "mgsr on a cut llama with dropout": {},
    "mgsr on a DenseRetNet, two rounds": {
        "student_type": "dense_retnet",
        "student_num_hidden_layers": 2,
        "student_config": {"dropout": 0.1},
        "scrg_rounds": 2,
        "scrg_warmup_steps": 2,
    },
    "a mix with replay and adaptive choices": {
        "method": "kd",
        "lmbda": 0.6,
        "sft_weight": 0.5,
        "replay_buffer_size": 6,
        "replay_share": 0.5,
        "logging_steps": 4,
    },
    "distillm with a full buffer": {
        "method": "distillm",
        "dataset_test_split": "train",
        "eval_steps": 1,
        "replay_buffer_size": 4,
    },
    "distillm2": {"method": "distillm2"},
    "rows grouped by length": {"train_sampling_strategy": "group_by_length"},
    "speculative KD": {"method": "skd"},
    "answers while evaluating, and samples": {
        "predict_with_generate": True,
        "report_samples": 2,
        "dataset_test_split": "train",
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_run_that_stopped_anywhere_goes_on_exactly(parts, tmp_path, mix, monkeypatch):
    """Without processes: every checkpoint of an unbroken run leads to the same end."""
    if "buffer" in mix:  # ten steps are too few for φ to grow
        monkeypatch.setattr(AdaptiveShare.__init__, "__defaults__", (0.8, None))
    whole = run(settings(parts, tmp_path / "whole", **MIXES[mix]))
    for step in (3, 6):
        again = tmp_path / f"from-{step}"
        again.mkdir()
        os.symlink(whole / f"checkpoint-{step}", again / f"checkpoint-{step}")
        run(settings(parts, again, **MIXES[mix]))
        assert_equal_runs(whole, again)
        tail = [line for line in log(whole) if line["step"] > step]
        assert log(again)[-len(tail) + 1 :] == tail[1:]
    if "buffer" in mix:
        assert {f"source/{n}" for n in ("student", "replay")} <= {k for x in log(whole) for k in x}


def test_the_command_killed_in_the_middle_goes_on_exactly(parts, tmp_path):
    changes = {"max_steps": 24, "save_steps": 3, "student_type": "dense_retnet"}
    changes |= {"student_num_hidden_layers": 2, "learning_rate": 3e-4}
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = [*COMMAND, write_command(settings(parts, broken, **changes), tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: (broken / "checkpoint-6").is_dir(), process)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert not (broken / "model.safetensors").exists()
    assert checkpoint.step_of(checkpoint.newest(broken)) < 24
    subprocess.run(command, check=True, capture_output=True)
    run(settings(parts, whole, **changes))
    assert_equal_runs(whole, broken)
    assert [line for line in log(broken) if "loss" in line] == [
        line for line in log(whole) if "loss" in line
    ]


@pytest.mark.parametrize("place", ["save_state", "publish"])
def test_the_command_killed_inside_a_save_goes_on_exactly(parts, tmp_path, place):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    path = write_command(settings(parts, broken), tmp_path / "run.yaml")
    script = [sys.executable, "-c", IN_A_SAVE, place, "distill", "--config", path]
    assert subprocess.run(script, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert (broken / ".checkpoint.partial" / "checkpoint-6").is_dir()
    assert checkpoint.newest(broken).name == "checkpoint-3"
    run(settings(parts, broken))
    run(settings(parts, whole))
    assert [path.name for path in broken.glob(".*")] == [checkpoint.LOCK]
    assert_equal_runs(whole, broken)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills_at_random_points_change_nothing(parts, tmp_path):
    """T23: six at random steps, one while Python imports, three in a save; then it ends."""
    changes = {"max_steps": 54, "save_steps": 3, "save_total_limit": 2, "learning_rate": 3e-4}
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    path = write_command(settings(parts, broken, **changes), tmp_path / "run.yaml")
    draw = random.Random(23)
    places = [*["a step"] * 6, "imports", *IN_SAVES]
    draw.shuffle(places)
    for place in places:
        before = reached(broken)
        kill(broken, path, place, draw)
        check_progress(place, before, reached(broken))
    assert reached(broken)[0] < 54
    subprocess.run([*COMMAND, path], check=True, capture_output=True)
    run(settings(parts, whole, **changes))
    assert_equal_runs(whole, broken)
    assert log(broken)[-1]["step"] == log(whole)[-1]["step"] == 54


def kill(folder, path, place, draw):
    """Start the command and kill it at ``place``; a step is one that was not reached before."""
    if place in IN_SAVES:
        script = [sys.executable, "-c", IN_A_SAVE, place, "distill", "--config", path]
        done = subprocess.run(script, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        return
    step = reached(folder)[0] + draw.randint(1, 3)
    process = subprocess.Popen([*COMMAND, path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if place == "a step":
        wait_for(lambda: logged_step(folder) >= step, process, seconds=900)
    time.sleep(draw.random() / 10)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


def check_progress(place, before, after):
    """The kill met the run where it was meant to."""
    if place in IN_SAVES:
        assert after == tuple(before[1] + steps for steps in IN_SAVES[place])
    elif place == "imports":
        assert after == before
    else:
        assert after[0] > before[0] and after[1] >= before[1]


def reached(folder):
    """The last logged step, and that of the newest checkpoint (0: there is none)."""
    newest = checkpoint.newest(folder)
    return logged_step(folder), 0 if newest is None else checkpoint.step_of(newest)


def logged_step(folder):
    """The last step of the log; half a line at its end does not count."""
    path = folder / "training.jsonl"
    lines = path.read_text().splitlines(True) if path.is_file() else []
    return max([json.loads(x)["step"] for x in lines if x.endswith("\n")], default=-1)


def wait_for(done, process, seconds=280):
    ends = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(parts, tmp_path):
    whole = run(settings(parts, tmp_path / "whole"))
    again = run(settings(parts, tmp_path / "again"))
    weights = again / "checkpoint-10" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    run(settings(parts, again))
    assert_equal_runs(whole, again)
