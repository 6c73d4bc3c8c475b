"""Checkpoints are complete or absent, and carry the trainer's whole state."""

import errno
import json
import os
import shutil
from dataclasses import fields

import pytest
import torch

from retort.distill.bands import Bands
from retort.distill.config import FREE, DistillConfig, fixed_choices
from retort.distill.losses import DacSettings
from retort.distill.parts import Models
from retort.distill.presets import KEYS
from retort.distill.sequences.replay import ReplayBuffer
from retort.distill.trainer import DistillTrainer
from retort.errors import ConfigurationError, RetortError
from retort.train import checkpoint
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer


def publish(folder, step, content="x"):
    with checkpoint.staging(folder) as place:
        filled = place / f"checkpoint-{step}"
        filled.mkdir()
        (filled / "weights").write_text(content)
        checkpoint.publish(filled, folder / filled.name)
        place.rmdir()
    return folder / filled.name


def test_the_newest_is_by_number_and_not_by_name(tmp_path):
    for step in (9, 100, 20):
        publish(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "checkpoint-100"
    assert checkpoint.newest(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "no manifest"])
def test_a_damaged_one_is_passed_over(tmp_path, damage, caplog):
    publish(tmp_path, 1)
    path = publish(tmp_path, 2, "weights of step two")
    stat = (path / "weights").stat()
    if damage == "flip":  # same size and time
        (path / "weights").write_text("weightS of step two")
        os.utime(path / "weights", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif damage == "cut":
        (path / "weights").write_text("weights")
    elif damage == "lose":
        (path / "weights").unlink()
    else:
        (path / "retort_manifest.json").unlink()
    assert checkpoint.newest(tmp_path).name == "checkpoint-1"
    assert "checkpoint-2" in caplog.text
    with pytest.raises(ConfigurationError, match="cannot resume"):
        checkpoint.require(path)


def test_a_failed_save_leaves_nothing_and_the_older_one(tmp_path):
    publish(tmp_path, 1)

    def failing():
        with checkpoint.staging(tmp_path) as place:
            (place / "checkpoint-2").mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_a_killed_save_left_is_cleaned(tmp_path):
    (tmp_path / ".checkpoint.partial" / "checkpoint-2").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None
    checkpoint.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_python_saves_where_a_killed_save_left_files(tmp_path):
    for name in "model.safetensors", "checkpoint-9/model.safetensors":
        path = tmp_path / ".checkpoint.partial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    made = trainer(tmp_path, method="sft", save_strategy="steps", save_steps=1, max_steps=1)
    made.train()
    assert checkpoint.newest(tmp_path).name == "checkpoint-1"
    assert not (tmp_path / ".checkpoint.partial").exists()


def test_publishing_over_a_broken_one_replaces_it(tmp_path):
    path = publish(tmp_path, 1, "old")
    (path / "weights").write_text("broken")
    publish(tmp_path, 1, "new")
    assert (path / "weights").read_text() == "new" and checkpoint.newest(tmp_path) == path


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        publish(tmp_path, step)
    checkpoint.rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    checkpoint.rotate(tmp_path, None, None)
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_a_finished_model_are_replaced_one_by_one(tmp_path):
    (tmp_path / "config.json").write_text("old")
    with checkpoint.staging(tmp_path) as place:
        (place / "config.json").write_text("new")
        checkpoint.replace_files(place, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "new"


def moved_bands(steps, seed=1):
    bands = Bands(DacSettings(), 1e-2, seed)
    for step in range(steps):
        move(bands, step)
    return bands


def move(bands, step):
    generator = torch.Generator().manual_seed(step)
    pair = [torch.randn(5, 40, generator=generator).log_softmax(-1) for _ in range(2)]
    lower, upper = bands.network(*pair)
    (upper - lower).sum().backward()
    bands.optimizer.step()
    bands.optimizer.zero_grad()
    bands.update(0.9)


def test_a_restored_band_goes_on_bit_for_bit(tmp_path):
    unbroken, first = moved_bands(6), moved_bands(3)
    checkpoint.save_state(tmp_path, {"bands": first.numbers()}, first.tensors())
    state, tensors = checkpoint.load_state(tmp_path)
    second = Bands(DacSettings(), 1e-2, seed=99)
    second.load(state["bands"], tensors)
    for step in range(3, 6):
        move(second, step)
    assert second.numbers() == unbroken.numbers()
    for name, value in unbroken.tensors().items():
        assert torch.equal(second.tensors()[name], value), name


def test_a_restored_buffer_holds_the_same_pairs_in_order():
    buffer, again = ReplayBuffer(2), ReplayBuffer(2)
    for n in range(3):
        buffer.add([n], [n, n])
    again.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert again.state_dict() == buffer.state_dict() == {"pairs": [[[1], [1, 1]], [[2], [2, 2]]]}


REPLAY = {"replay_buffer_size": 5, "replay_share": 0.1}


def test_a_trainers_checkpoint_holds_everything_and_loads_as_a_model(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, **REPLAY)
    run.train()
    folder = checkpoint.newest(tmp_path)
    assert folder.name == "checkpoint-4"
    state, tensors = checkpoint.load_state(folder)
    assert state["bands"]["updates"] == 4 and len(state["sources"]["buffer"]["pairs"]) == 5
    assert state["corrections"] and state["fixed"]["method"] == "mgsr"
    assert {name.partition(".")[0] for name in tensors} == {"network", "optimizer"}
    from retort.models import zoo

    assert torch.equal(zoo.load_model(folder).lm_head.weight, run.model.lm_head.weight)
    assert not list(tmp_path.glob(".*partial*"))


def test_the_best_checkpoint_is_named_where_it_lies(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 4
    run = trainer(
        tmp_path,
        rows=rows,
        eval_dataset=rows,
        method="sft",
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{run.state.best_global_step}")
    saved = json.loads((tmp_path / best / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_the_older_checkpoint(
    tmp_path, monkeypatch, fault
):
    run = trainer(tmp_path, method="sft", save_strategy="steps", save_steps=2)
    original, saves = checkpoint.save_state, []

    def full(*arguments):
        saves.append(1)
        if len(saves) == 2:
            raise OSError(fault, os.strerror(fault))
        original(*arguments)

    monkeypatch.setattr(checkpoint, "save_state", full)
    with pytest.raises(RetortError, match="checkpoint-4 could not be written") as caught:
        run.train()
    assert os.strerror(fault) in str(caught.value) and "\n" not in str(caught.value)
    assert checkpoint.newest(tmp_path).name == "checkpoint-2"
    assert not (tmp_path / ".checkpoint.partial").exists()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folder of a run of mgsr with a checkpoint of its first step."""
    folder = tmp_path_factory.mktemp("begun")
    trainer(folder, save_strategy="steps", save_steps=1, max_steps=1).train()
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "kd"}, "method='mgsr', this run has 'kd'"),
        ({"seed": 7}, "seed=42, this run has 7"),
        ({"lmbda": 0.5}, "lmbda=1.0, this run has 0.5"),
        ({"divergence": "forward_kl"}, "divergence='dac', this run has 'forward_kl'"),
        ({"dac_mode": "fixed"}, "dac_mode='learned', this run has 'fixed'"),
        ({"dac_top_k": 9}, "dac_top_k=64, this run has 9"),
        ({"span_distance": "kl"}, "span_distance='l2', this run has 'kl'"),
        ({"max_length": 40}, "max_length=64, this run has 40"),
        ({"max_completion_length": 5}, "max_completion_length=8, this run has 5"),
        ({"learning_rate": 0.1}, "learning_rate=0.001, this run has 0.1"),
        ({"optim": "sgd"}, "optim='adamw_torch_fused', this run has 'sgd'"),
        ({"weight_decay": 0.5}, "weight_decay=0.0, this run has 0.5"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='linear', this run has 'cosine'"),
        ({"max_train_rows": 4}, "max_train_rows=None, this run has 4"),
        ({"rows": ROWS[::-1]}, "train_rows='8 rows of hash "),
        ({"rows": ROWS[:7]}, "this run has '7 rows of hash "),
    ],
)
def test_another_run_is_not_continued(begun, changes, said, monkeypatch):
    """Before the checkpoint's weights are read, and before a model's where it is named at once."""
    monkeypatch.setattr(DistillTrainer, "_load_from_checkpoint", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError) as caught:
        trainer(begun, **changes).train(resume_from_checkpoint=True)
    assert said in str(caught.value) and "another output_dir" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(Models, "load", lambda _: pytest.fail("loaded"))
    rows = changes.pop("rows", ROWS)
    given = (llama(2), config(begun, **changes), llama(1), rows)
    with pytest.raises(ConfigurationError) as at_once:
        DistillTrainer(
            *given, processing_class=tokenizer(), resume_from=checkpoint.newest(begun, full=False)
        )
    assert str(at_once.value) == str(caught.value)


def test_an_option_is_fixed_unless_it_is_free(tmp_path):
    """What is new is compared from the start; what changes no weight may change."""
    made = fixed_choices(config(tmp_path))
    assert not {*FREE} & made.keys() and {*FREE} <= {f.name for f in fields(DistillConfig)}
    assert {*KEYS, "dac_lower", "span_chunker", "teacher_signal", "scrg_rounds"} <= made.keys()
    for changes in {"rollout_batch_size": 2}, {"loss_chunk_size": 0}, {"max_steps": 9}:
        assert fixed_choices(config(tmp_path, **changes)) == made


def test_a_choice_that_json_does_not_know_is_kept_by_its_name(tmp_path):
    now = {"model_init_kwargs": {"dtype": torch.bfloat16}}
    checkpoint.save_state(tmp_path, {"fixed": checkpoint.plain(now)}, {})
    checkpoint.check_same_run(tmp_path, {**now, "new": 3})
    now["model_init_kwargs"] = {"dtype": torch.float16}
    with pytest.raises(ConfigurationError, match=r"torch\.bfloat16.* has .*torch\.float16"):
        checkpoint.check_same_run(tmp_path, now)


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    run = trainer(tmp_path, method="sft")
    with pytest.raises(ConfigurationError, match="no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    publish(tmp_path, 3)
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(ConfigurationError, match="cannot resume"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
