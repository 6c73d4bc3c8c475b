"""Evaluation inside the trainer: every term on the dataset's completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retort.distill import metrics
from retort.distill.batch import TrainingSequence
from retort.distill.data import Example

if TYPE_CHECKING:
    from retort.distill.trainer import DistillTrainer


class HeldOut:
    """Sums of every term over an evaluation, from which means over tokens (not batches) come."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer, self.meter = trainer, metrics.Meter()

    def loss(self, model: Any, examples: Sequence[Example]) -> Tensor:
        """The loss of one batch of dataset completions, without gradient."""
        run = self.trainer
        taught, supervised = run.teacher is not None, run.recipe.sft_weight > 0
        sequences = [
            TrainingSequence(e.prompt_ids, e.completion_ids, supervised, taught) for e in examples
        ]
        batch = run._prepare_inputs(run._batch(sequences))
        with torch.no_grad(), run.compute_loss_context_manager():
            streams = run.objective.measured if taught else run.objective.streams
            sums = run.objective.sums(run.student, run.teacher, batch, model, streams)
            loss = run.objective.combine(sums, run.objective.counts(batch))
        self.meter.add(metrics.term_sums(sums))
        return loss.detach()

    def numbers(self, prefix: str) -> dict[str, float]:
        """Means since the last call, over all processes, and the weighted loss of them."""
        means = metrics.term_means(self.trainer._summed(self.meter.take()))
        weights = self.trainer.objective.weights
        found = {f"{prefix}_{name}": value for name, value in means.items()}
        loss = sum(weight * means.get(name, 0.0) for name, weight in weights.items())
        return {**found, f"{prefix}_loss": loss}


def watched(eval_dataset: Any) -> str:
    """Prefix of the evaluation that the scheduler follows: the only or the first set's."""
    several = eval_dataset if isinstance(eval_dataset, dict) else {}
    return f"eval_{next(iter(several))}" if several else "eval"
