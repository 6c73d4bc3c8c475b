"""Evaluation inside the trainer: every term on the dataset's completions, and answers' scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retort.distill import metrics
from retort.distill.batch import TrainingSequence
from retort.distill.data import Example
from retort.text_scores import distinct_n, rouge_l

if TYPE_CHECKING:
    from retort.distill.trainer import DistillTrainer

Numbers = dict[str, float]


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

    def answers(self, rows: Any, prefix: str) -> dict[str, float]:
        """Scores of the student's greedy answers to the prompts of ``rows`` (tokenised).

        The reference is the dataset's completion as it is trained on, cut at ``max_length``. Every
        process must call it; each answers its share.
        """
        run = self.trainer
        count, process = run.accelerator.num_processes, run.accelerator.process_index
        asked = rows.select(range(min(len(rows), run.config.max_eval_rows or len(rows))))
        mine = [Example(**row) for row in asked.select(range(process, len(asked), count))]
        written = run.rollouts.answer([e.prompt_ids for e in mine], run._bare_student())
        pairs = zip(mine, written.texts, strict=True)
        found = run._gathered([(e.index, text.tokens, e.completion_ids) for e, text in pairs])
        return {f"{prefix}_{k}": v for k, v in _text_scores(sorted(found), run.tokens).items()}


def _text_scores(answers: Sequence[tuple[int, list[int], list[int]]], tokenizer: Any) -> Numbers:
    """Means over answers given as (row, ids, ids of the reference)."""
    texts, references = (
        [tokenizer.decode(answer[which], skip_special_tokens=True) for answer in answers]
        for which in (1, 2)
    )
    scores = [rouge_l(text, ref) for text, ref in zip(texts, references, strict=True)]
    return {
        "rouge_l": sum(scores) / len(scores),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "gen_len": sum(len(ids) for _, ids, _ in answers) / len(answers),
    }


def watched(eval_dataset: Any) -> str:
    """Prefix of the evaluation that the scheduler follows: the only or the first set's."""
    several = eval_dataset if isinstance(eval_dataset, dict) else {}
    return f"eval_{next(iter(several))}" if several else "eval"
