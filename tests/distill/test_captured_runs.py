"""Training from a capture in place of a live teacher."""

import shutil

import pytest
import torch

from retort.distill.capture import capture
from retort.distill.capture_facts import CaptureSettings
from retort.distill.captured import CapturedTeacher
from retort.distill.config import DistillConfig
from retort.errors import ConfigurationError
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer


def captured_rows(folder, teacher, **changes):
    """A capture of `ROWS` as the trainer encodes them."""
    encoded = trainer(folder / "t", method="kd", **changes).train_dataset
    return capture(teacher, tokenizer(), encoded, folder / "capture", CaptureSettings(258))


def test_a_run_from_a_whole_capture_follows_the_live_run(tmp_path):
    """With every id kept only the float16 rounding is left between the two."""
    folder = captured_rows(tmp_path, llama(1))
    logs = []
    for name, changes in ("live", {}), ("captured", {"teacher_signal": str(folder)}):
        run = trainer(tmp_path / name, llama(2), llama(1), method="kd", **changes)
        assert isinstance(run.teacher, CapturedTeacher) == (name == "captured")
        run.train()
        logs.append([r["loss"] for r in run.state.log_history if "loss" in r])
    torch.testing.assert_close(*map(torch.tensor, logs), rtol=2e-3, atol=0)
    assert logs[0] != logs[1]


def test_a_captured_run_needs_no_teacher_and_refuses_other_rows(tmp_path):
    from retort.distill.trainer import DistillTrainer

    folder = captured_rows(tmp_path, llama(1))
    settings = config(tmp_path / "run", method="kd", teacher_signal=str(folder))

    def build(data, evaluation=None):
        return DistillTrainer(
            llama(2), settings, None, data, evaluation, processing_class=tokenizer()
        )

    run = build(ROWS, ROWS[:2])
    run.train()
    assert run.evaluate()["eval_forward_kl"] > 0
    with pytest.raises(ConfigurationError, match="row 9 of the training data"):
        build([*ROWS, {"prompt": "new", "completion": "row"}])
    with pytest.raises(ConfigurationError, match="name a teacher"):
        build(ROWS, [{"prompt": "new", "completion": "row"}])


def test_a_configuration_that_contradicts_a_capture_is_refused(tmp_path):
    for method, message in ("sft", "contradicts"), ("mgsr", "others written"):
        with pytest.raises(ConfigurationError, match=message):
            DistillConfig(output_dir=str(tmp_path), use_cpu=True, method=method, teacher_signal="x")


def test_another_teachers_capture_in_the_same_place_is_another_run(tmp_path):
    folder, values = captured_rows(tmp_path, llama(1)), {"method": "kd", "max_steps": 1}
    values |= {"teacher_signal": str(folder), "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "run", **values).train()
    shutil.rmtree(folder)
    captured_rows(tmp_path, llama(3))
    with pytest.raises(ConfigurationError, match=r"captured='hash .*this run has 'hash "):
        trainer(tmp_path / "run", **values).train(resume_from_checkpoint=True)
