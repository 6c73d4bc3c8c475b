"""`DistillTrainer`: transformers' Trainer with a teacher, student rollouts and exact resume.

A step: `get_batch_samples` takes the accumulation window, lets `Sources` write (and revise) its
sequences once and counts tokens over all processes; `compute_loss` evaluates the `Objective` on
each batch; after the last backward the band of DAC-KL moves once. Everything that carries over
to the next step is in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from retort.distill import metrics
from retort.distill.batch import Batch, TrainingSequence, build_batch
from retort.distill.callbacks import StepCallback
from retort.distill.captured import build_teacher
from retort.distill.config import DistillConfig
from retort.distill.data import Example, collate
from retort.distill.evaluation import HeldOut, watched
from retort.distill.hidden import HeadlessModel
from retort.distill.init import disable_dropout
from retort.distill.objective import Objective
from retort.distill.options.elsewhere import check_keywords
from retort.distill.ordering import GroupedByLength
from retort.distill.packing import require_packing
from retort.distill.parts import find_models
from retort.distill.preparation import prepare
from retort.distill.records import DistillLog
from retort.distill.rollouts import Rollouts, Writers
from retort.distill.samples import Samples
from retort.errors import ConfigurationError, RetortError
from retort.train.arguments import resolved
from retort.train.saving import WholeCheckpointTrainer


class DistillTrainer(WholeCheckpointTrainer):
    """Train a student by the method that its `DistillConfig` names.

    Args:
        model: the student, or its name (then built as the configuration says).
        args: a `DistillConfig`.
        teacher_model: the teacher or its name; not needed by methods without one.
        train_dataset, eval_dataset: rows as `retort.distill.data` describes (a `Dataset`, a
            list of dictionaries; for evaluation also a dictionary of either).
        processing_class: the tokenizer that both models share.
        resume_from: the checkpoint that `train` will be told to go on from.

    Raises:
        ConfigurationError: the method needs a teacher and there is none; tokenizers, rows, a
            capture or a checkpoint that do not fit. Names are loaded after these checks.
    """

    def __init__(
        self,
        model: Any = None,
        args: DistillConfig | None = None,
        teacher_model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        resume_from: str | Path | None = None,
        **keywords: Any,
    ) -> None:
        args = args if args is not None else DistillConfig()
        if not isinstance(args, DistillConfig):
            raise ConfigurationError(f"args is a {type(args).__name__}: give a DistillConfig")
        check_keywords(keywords)
        if processing_class is None:
            raise ConfigurationError("DistillTrainer needs processing_class, the tokenizer")
        models, data = find_models(args, model, teacher_model), (train_dataset, eval_dataset)
        self.prepared = prepare(models, processing_class, *data, resume_from)
        student, teacher = models.load()
        if args.disable_dropout:
            disable_dropout(student)
        self.prepared.ask()
        super().__init__(
            model=student,
            args=args,
            data_collator=collate,
            processing_class=processing_class,
            train_dataset=self.prepared.train,
            eval_dataset=self.prepared.evaluation,
            **keywords,
        )
        self.loss_is_scaled_for_ga = True  # every term is divided by its count of the whole step
        self._set_up(args, teacher, processing_class)

    def _set_up(self, args: DistillConfig, teacher_model: Any, tokenizer: Any) -> None:
        self.config, self.recipe, self.tokens = args, args.recipe, tokenizer
        self.end_tokens, self.max_length = self.prepared.end_tokens, self.prepared.max_length
        self.teacher = build_teacher(args, teacher_model, self.model, self.prepared.capture)
        self.student = HeadlessModel(self._bare_student())
        if args.packing:
            require_packing(self.student, "student")
            if (live := getattr(self.teacher, "live", self.teacher)) is not None:
                require_packing(live.headless, "teacher")
        self.objective: Objective = Objective(args, tokenizer, args.device)
        self.rollouts = Rollouts(args, tokenizer, self._writers())
        self.held_out, self.meter = HeldOut(self), metrics.Meter()
        self.run_log = DistillLog(str(args.output_dir), self.is_world_process_zero())
        self._counts: dict[str, float] = {}
        self._step = metrics.Meter()
        self.samples = Samples(self)
        self.add_callback(StepCallback(self))

    def _bare_student(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _writers(self) -> Writers:
        return Writers(
            student=self._bare_student(),
            teacher=None if self.teacher is None else self.teacher.model,
            end_tokens=self.end_tokens,
            max_length=self.max_length,
            rank=self.accelerator.process_index,
            sharded=self.is_fsdp_enabled,
            share=self._gathered,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(rows, step, seed)

    # A training step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The batches of an optimiser step, as tensors, with what the student wrote for it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        window = self._sequences([batch["examples"] for batch in batches])
        built = [self._batch(sequences) for sequences in window]
        self._counts = self._global_counts(built)
        return built, None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The weighted terms of one batch, each divided by its count of the whole step.

        Multiplied by the number of processes, because gradients are averaged over them. Raises
        RetortError, before anything is changed, when a term is not finite.
        """
        sums = self.objective.sums(self.student, self.teacher, inputs, through=model)
        numbers = metrics.term_sums(sums)
        self._require_finite(numbers)
        self.meter.add(numbers)
        self._step.add(numbers)
        return self.objective.combine(sums, self._counts) * self.accelerator.num_processes

    def training_step(self, *args: Any, **keywords: Any) -> Tensor:
        """One batch forward and backward; its time is split between teacher and training."""
        teacher = 0.0 if self.teacher is None else self.teacher.seconds
        started = perf_counter()
        loss = super().training_step(*args, **keywords)
        elapsed = perf_counter() - started
        teaching = 0.0 if self.teacher is None else self.teacher.seconds - teacher
        self.meter.add({"time/teacher": teaching, "time/train": elapsed - teaching})
        return loss

    def finish_step(self) -> None:
        """Move DAC-KL's sub-network and dual variable, once an optimiser step."""
        sums = self._summed(self._step.take())
        if self.objective.bands is not None:
            self.objective.bands.step(self.accelerator)
            count = sums.get("dac.count", 0.0)
            self.objective.bands.update(sums["dac.coverage"] / count if count else None)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise RetortError(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}: "
                "lower learning_rate or max_grad_norm; the newest checkpoint is intact"
            )
        return norm

    def _sequences(self, window: list[list[Example]]) -> list[list[TrainingSequence]]:
        step, steps = self.state.global_step, self.state.max_steps
        sequences, sums = self.rollouts.draw(window, step, steps, self._bare_student())
        self.meter.add(sums)
        return sequences

    def _batch(self, sequences: list[TrainingSequence]) -> Batch:
        pad = self.tokens.pad_token_id
        pad = self.end_tokens[0] if pad is None else pad
        size = self.max_length if self.config.packing else None
        return build_batch(sequences, pad, self.objective.tagger, size)

    def _global_counts(self, batches: list[Batch]) -> dict[str, float]:
        counts = metrics.Meter()
        for batch in batches:
            counts.add(self.objective.counts(batch))
        return self._summed(counts.take())

    def _summed(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        total = metrics.Meter()
        for part in self._gathered([sums]):
            total.add(part)
        return total.take()

    def _gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes; every process must call it."""
        return list(gather_object(items)) if self.accelerator.num_processes > 1 else items

    def _require_finite(self, numbers: Mapping[str, float]) -> None:
        bad = [k for k, v in numbers.items() if k.endswith(".total") and not math.isfinite(v)]
        if bad:
            name = bad[0].removesuffix(".total")
            raise RetortError(
                f"the loss term {name!r} is {numbers[bad[0]]} at step "
                f"{self.state.global_step + 1}: lower learning_rate, or look at the data of this "
                "step; the newest checkpoint is intact"
            )

    # Evaluation: the dataset's completions under every term

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The loss of one batch of dataset completions; sums are kept for `evaluation_loop`."""
        return self.held_out.loss(model, inputs["examples"]), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, **keywords: Any) -> EvalLoopOutput:
        """transformers' loop; means of each term are added, over tokens and not over batches.

        With ``predict_with_generate`` so are the scores of the student's answers.
        """
        self.held_out.meter.take()
        output = super().evaluation_loop(dataloader, *args, **keywords)
        prefix = keywords.get("metric_key_prefix", "eval")
        found = self.held_out.numbers(prefix)
        if self.config.predict_with_generate:
            found |= self.held_out.answers(dataloader.dataset, prefix)
        if self.is_in_train and prefix == watched(self.eval_dataset):
            self.rollouts.sources.schedule.observe(found[f"{prefix}_loss"])
        return output._replace(metrics={**(output.metrics or {}), **found})

    # Log

    def begin_run(self) -> None:
        """Open the run's log at the step where training goes on."""
        config = self.config
        self.run_log.start(resolved(config), config.seed, self.state.global_step)
        self.samples.begin(self.state.global_step)

    def end_run(self) -> None:
        """Write what the report shows of the trained student."""
        self.samples.end()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms and phase times since the last record, and write the run's own log."""
        if "loss" in logs:
            logs |= metrics.numbers(self._summed(self.meter.take()))
            if self.recipe.adaptive:
                logs["phi"] = self.rollouts.sources.schedule.phi
            if self.objective.bands is not None:
                logs["dac/dual"] = self.objective.bands.state.dual
            self.run_log.corrections(self.rollouts.corrections)
        super().log(logs, start_time)
        self.run_log.append({**logs, "step": self.state.global_step})

    # What the checkpoint carries

    def carried(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that the next step reads beside weights, optimiser and random numbers.

        Every process must call it: what they counted since the last log record is added up.
        """
        bands = self.objective.bands
        state = {
            "meter": self._summed(self.meter.state_dict()),
            **self.rollouts.state_dict(),
            "bands": None if bands is None else bands.numbers(),
        }
        return state, {} if bands is None else bands.tensors()

    def fixed(self) -> dict[str, Any]:
        """What a continuation must not change: the resolved recipe, models, limits and rows."""
        return self.prepared.fixed()

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `carried` gave."""
        self.meter.load_state_dict(state["meter"] if self.is_world_process_zero() else {})
        self.rollouts.load_state_dict(state)
        if self.objective.bands is not None:
            self.objective.bands.load(state["bands"], tensors)
