"""Where a run on a folder begins, what of a finished one it leaves, and what it refuses first."""

import shutil
import subprocess
import sys

import pytest
import torch

from retort.distill.run import run
from retort.errors import ConfigurationError
from retort.train import checkpoint
from tests.distill.runs import final, log, settings
from tests.distill.toys import llama


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
