"""From the newest checkpoint to the end: what every training run does around its trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from retort.disk import writing
from retort.errors import ConfigurationError
from retort.train import checkpoint


def train_to_end(trainer: Trainer, finish: Callable[[Path], None], quiet: bool = False) -> Path:
    """Train in the run's own folder, which no other run may hold, and return it.

    A folder that has a complete checkpoint goes on from the newest one, or from the one that
    ``resume_from_checkpoint`` names. ``finish`` writes what the run is for; ``quiet`` leaves
    showing the run to the trainer's other callbacks.
    """
    folder = Path(trainer.args.output_dir or "")
    for theirs in (PrinterCallback, ProgressCallback) if quiet else ():
        trainer.remove_callback(theirs)
    with checkpoint.alone(folder) if trainer.args.should_save else nullcontext():
        start = named_start(trainer.args) or checkpoint.newest(folder)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        if not trainer.state.global_step:
            raise ConfigurationError(
                "no step was trained: the rows do not fill one batch; lower "
                "per_device_train_batch_size, or leave dataloader_drop_last out"
            )
        finish(folder)
        with writing(folder):
            trainer.save_state()
    return folder


def named_start(args: TrainingArguments) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` names; "true", our default, names none.

    Raises ConfigurationError for "false" where there is one that would be gone on from.
    """
    given, folder = args.resume_from_checkpoint, Path(args.output_dir or "")
    word = str(given).lower()
    if word == "false" and (found := checkpoint.newest(folder, full=False)) is not None:
        raise ConfigurationError(
            f"resume_from_checkpoint is false and {found} is there, from which a run on this "
            "folder goes on: choose another output_dir"
        )
    return None if given is None or word in ("true", "false") else given
