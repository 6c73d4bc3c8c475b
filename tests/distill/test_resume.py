"""A killed run, started again by the same command, ends in the weights of an unbroken one.

All runs use real processes: `kill -9` reaches no Python code of ours.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from retort.distill.run import run
from retort.distill.sequences.schedule import AdaptiveShare
from retort.errors import ConfigurationError
from retort.train import checkpoint
from retort.train.arguments import resolved
from tests.distill.toys import ROWS, config, llama, record_accepted, record_texts, tokenizer

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


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A saved teacher, a larger student-to-be and data."""
    folder = tmp_path_factory.mktemp("parts")
    for name, seed in (("teacher", 1), ("student", 2)):
        llama(seed, layers=3).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


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


def write_command(made, path):
    path.write_text(yaml.safe_dump(resolved(made)))
    return str(path)


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


def test_a_finished_run_is_left_as_it_is(parts, tmp_path):
    folder = run(settings(parts, tmp_path, method="sft", max_steps=3))
    before, lines = final(folder), log(folder)
    run(settings(parts, tmp_path, method="sft", max_steps=3))
    for name, value in final(folder).items():
        assert torch.equal(value, before[name])
    assert [line for line in log(folder) if "loss" in line] == [x for x in lines if "loss" in x]


def test_a_finished_run_keeps_its_best_weights(parts, tmp_path):
    """The worst acceptance is the "best" here, so that it is not the last checkpoint's."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_acceptance"}
    best |= {"greater_is_better": False, "dataset_test_split": "train"}
    best |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    folder = run(settings(parts, tmp_path, method="kd", **best))
    before = final(folder)
    assert any((final(folder / "checkpoint-3")[n] != v).any() for n, v in before.items())
    run(settings(parts, tmp_path, method="kd", **best))
    for name, value in final(folder).items():
        assert torch.equal(value, before[name])


def test_weights_alone_are_not_gone_on_from(parts, tmp_path):
    values = {"method": "sft", "save_steps": 2, "max_steps": 4, "save_only_model": True}
    folder = run(settings(parts, tmp_path, **values))
    run(settings(parts, tmp_path, **values))  # it is finished
    shutil.rmtree(folder / "checkpoint-4")
    with pytest.raises(ConfigurationError, match="checkpoint-2 holds no optimiser"):
        run(settings(parts, tmp_path, **values))


def test_a_run_without_a_batch_leaves_no_student(parts, tmp_path):
    values = {"per_device_train_batch_size": 64, "dataloader_drop_last": True}
    with pytest.raises(ConfigurationError, match="no step was trained"):
        run(settings(parts, tmp_path, method="sft", **values))
    assert not (tmp_path / "model.safetensors").exists()


def test_resuming_may_be_said_and_forbidden(parts, tmp_path):
    values = {"method": "sft", "save_steps": 1, "max_steps": 1}
    folder = run(settings(parts, tmp_path, **values, resume_from_checkpoint="False"))
    assert run(settings(parts, tmp_path, **values, resume_from_checkpoint="true")) == folder
    with pytest.raises(ConfigurationError, match=r"checkpoint-1 is there.*another output_dir"):
        run(settings(parts, tmp_path, **values, resume_from_checkpoint="False"))


@pytest.mark.parametrize("damage", [b'{"x": 1}\n', b"\xff\xfe\n", b"\0\0\n[3]\n"])
def test_a_damaged_log_does_not_end_a_run(parts, tmp_path, damage):
    values = {"method": "sft", "save_steps": 2, "max_steps": 4}
    folder = run(settings(parts, tmp_path, **values))
    whole = log(folder)
    shutil.rmtree(folder / "checkpoint-4")
    path = folder / "training.jsonl"
    path.write_bytes(path.read_bytes() + damage)
    run(settings(parts, tmp_path, **values))
    steps = [[x["loss"] for x in lines if "loss" in x] for lines in (whole, log(folder))]
    assert steps[0] == steps[1] and len(steps[0]) == 4


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(parts, tmp_path):
    whole = run(settings(parts, tmp_path / "whole"))
    again = run(settings(parts, tmp_path / "again"))
    weights = again / "checkpoint-10" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    run(settings(parts, again))
    assert_equal_runs(whole, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "dataset_name"),
        ({"teacher_model_name_or_path": None}, "teacher_model_name_or_path"),
        ({"model_name_or_path": None}, "no student"),
        ({"dataset_name": "none.jsonl"}, "no file none.jsonl"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(parts, tmp_path, changes, message):
    folder = tmp_path / "run"
    with pytest.raises(ConfigurationError, match=message):
        run(settings(parts, folder, **changes))
    assert not folder.exists()


def test_tokenizers_that_differ_are_refused(parts, tmp_path):
    from tests.distill.tokenizers import byte_level

    llama(2).save_pretrained(tmp_path / "other")
    byte_level().save_pretrained(tmp_path / "other")
    made = settings(parts, tmp_path / "run", model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ConfigurationError, match="tokenizers differ at id"):
        run(made)


HOLD = """
import sys, time
from pathlib import Path
from retort.train import checkpoint
with checkpoint.alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_frees_it(parts, tmp_path):
    folder, made = tmp_path / "run", settings(parts, tmp_path / "run", max_steps=1)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigurationError, match="another run is writing to") as caught:
            run(made)
        assert "\n" not in str(caught.value)
        assert [path.name for path in folder.iterdir()] == [checkpoint.LOCK]
    finally:
        other.kill()
        other.communicate()
    assert (run(made) / "model.safetensors").is_file()


def test_a_drafter_with_another_vocabulary_is_refused_before_the_first_step(parts, tmp_path):
    llama(3, vocab_size=264).save_pretrained(tmp_path / "other")
    made = settings(parts, tmp_path / "run", rollout_drafter=str(tmp_path / "other"))
    with pytest.raises(ConfigurationError, match="vocabulary of 264") as caught:
        run(made)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "training.jsonl").exists()


def test_an_earlier_checkpoint_of_the_student_drafts_and_changes_no_text(
    parts, tmp_path, monkeypatch
):
    """Every token of every step, and so every weight, to the bit."""
    texts, accepted = record_texts(monkeypatch), record_accepted(monkeypatch)
    plain = run(settings(parts, tmp_path / "plain", method="rkl", rollout_drafter="none"))
    assert len(texts) == 10 and all(map(len, texts)) and not accepted
    earlier = str(plain / "checkpoint-3")
    drafted = run(settings(parts, tmp_path / "drafted", method="rkl", rollout_drafter=earlier))
    assert texts[10:] == texts[:10] and sum(accepted) > 0
    for name, value in final(plain).items():
        assert torch.equal(value, final(drafted)[name]), name
