"""From the newest checkpoint to the end: what every training run does around its trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, Trainer

from retort.disk import writing
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
        start = trainer.args.resume_from_checkpoint or checkpoint.newest(folder)
        if trainer.args.should_save:
            checkpoint.clean(folder)  # under the lock: it may be another run's that is being filled
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        finish(folder)
        with writing(folder):
            trainer.save_state()
    return folder
