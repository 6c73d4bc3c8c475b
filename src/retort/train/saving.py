"""transformers' Trainer with checkpoints that are complete or absent (see `checkpoint`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from retort.disk import writing
from retort.errors import ConfigurationError
from retort.train import checkpoint


class WholeCheckpointTrainer(Trainer):
    """Saves through a sibling folder and carries a subclass's own state along."""

    _staging: Path | None = None

    @abstractmethod
    def carried(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The subclass's state: JSON values and tensors; called on every process."""

    @abstractmethod
    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `carried` gave."""

    @abstractmethod
    def fixed(self) -> dict[str, Any]:
        """Choices that a run and its continuation share, by name; kept in every checkpoint."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """transformers' `train`; ``True`` takes the newest *complete* checkpoint.

        Raises ConfigurationError, before its weights are read, when the one that is named is
        damaged, there is none, or it is another run's, and when another process trains in the
        same folder.
        """
        with checkpoint.alone(self._folder) if self.args.should_save else nullcontext():
            if self.args.should_save:
                checkpoint.clean(self._folder)  # or it would be in the way of the next save
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(
        self,
        resume_from_checkpoint: str | bool | None,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
    ) -> TrainOutput:
        start: str | None = None
        if resume_from_checkpoint is True:
            newest = checkpoint.newest(self._folder)
            if newest is None:
                raise ConfigurationError(f"no complete checkpoint in {self._folder}")
            start = str(newest)
        elif resume_from_checkpoint:
            start = str(checkpoint.require(resume_from_checkpoint))
        if start is not None:
            checkpoint.check_same_run(start, self.fixed())
        if start is not None and 0 < self.args.max_steps <= checkpoint.step_of(start):
            return self._take_finished(start)
        if start is not None and not self.is_deepspeed_enabled:
            checkpoint.require_optimizer(start)
        return super().train(start, trial, ignore_keys_for_eval)

    def _take_finished(self, start: str) -> TrainOutput:
        """The end of a run that is complete; transformers would train one step too many."""
        self._load_from_checkpoint(start)
        self._restore_from(Path(start))
        self.state = TrainerState.load_from_json(str(Path(start) / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        losses = [record["loss"] for record in self.state.log_history if "loss" in record]
        return TrainOutput(self.state.global_step, losses[-1] if losses else float("nan"), {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer; in a run's own folder each file is replaced whole."""
        if _internal_call:  # a checkpoint's, which lies beside its place as yet
            super().save_model(output_dir, _internal_call)
            return
        final = Path(output_dir or self._folder)
        with writing(final):
            if self.accelerator.num_processes > 1:
                super().save_model(output_dir)
                return
            with checkpoint.staging(final) as place:
                super().save_model(str(place))
                checkpoint.replace_files(place, final)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with writing(folder / name), checkpoint.staging(folder) as place:
            with self._saving_to(place):
                super()._save_checkpoint(model, trial)
            self._finish_checkpoint(place / name, folder / name)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoint.rotate(folder, self.args.save_total_limit, best)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _finish_checkpoint(self, filled: Path, final: Path) -> None:
        self.accelerator.wait_for_everyone()
        state, tensors = self.carried()
        if self.args.should_save:
            self._name_best(filled, final.parent)
            fixed = checkpoint.plain(self.fixed())
            checkpoint.save_state(filled, {**state, "fixed": fixed}, tensors)
            checkpoint.publish(filled, final)
            filled.parent.rmdir()
        self.accelerator.wait_for_everyone()

    def _name_best(self, filled: Path, folder: Path) -> None:
        """Name the best checkpoint where it will lie; while it was saved it lay elsewhere."""
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            known = best.is_dir() or best.name == filled.name
            self.state.best_model_checkpoint = str(best) if known else None
            self.state.save_to_json(str(filled / TRAINER_STATE_NAME))

    @contextmanager
    def _saving_to(self, place: Path) -> Iterator[None]:
        push, self.args.push_to_hub = self.args.push_to_hub, False
        self._staging = place
        try:
            yield
        finally:
            self._staging, self.args.push_to_hub = None, push

    def _load_best_model(self) -> None:
        checkpoint.require(self.state.best_model_checkpoint or "")  # a checkpoint's file names it
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore_from(Path(checkpoint))

    def _restore_from(self, folder: Path) -> None:
        self.restore(*checkpoint.load_state(folder))
