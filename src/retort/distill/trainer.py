"""`DistillTrainer`: transformers' Trainer with a teacher, student rollouts and exact resume.

A step: `get_batch_samples` takes the accumulation window, lets `Sources` write (and revise) its
sequences once and counts tokens over all processes; `compute_loss` evaluates the `Objective` on
each batch; after the last backward the band of DAC-KL moves once. Everything that carries over
to the next step is in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from retort.decode.support import max_length
from retort.distill import metrics
from retort.distill.batch import Batch, TrainingSequence, build_batch
from retort.distill.callbacks import StepCallback
from retort.distill.captured import CapturedTeacher, build_teacher
from retort.distill.config import DistillConfig, fixed_choices
from retort.distill.data import Encoding, Example, collate, end_tokens, tokenize
from retort.distill.hidden import HeadlessModel
from retort.distill.init import build_student, disable_dropout
from retort.distill.objective import Objective
from retort.distill.packing import require_packing
from retort.distill.records import DistillLog, correction_record
from retort.distill.sequences.sources import Sources, source_shares
from retort.distill.sequences.teacher_text import TeacherTexts
from retort.distill.sequences.writers import StudentWriter, Writing, WritingSettings
from retort.distill.sharding import RolloutCopy
from retort.distill.teachers import has_adapter, load_teacher
from retort.errors import ConfigurationError, RetortError
from retort.train.arguments import resolved
from retort.train.checkpoint import check_same_run
from retort.train.saving import WholeCheckpointTrainer

KEPT_CORRECTIONS = 64


class DistillTrainer(WholeCheckpointTrainer):
    """Train a student by the method that its `DistillConfig` names.

    Args:
        model: the student, or its name (then built as the configuration says).
        args: a `DistillConfig`.
        teacher_model: the teacher or its name; not needed by methods without one.
        train_dataset, eval_dataset: rows as `retort.distill.data` describes (a `Dataset`, a
            list of dictionaries; for evaluation also a dictionary of either).
        processing_class: the tokenizer that both models share.

    Raises:
        ConfigurationError: the method needs a teacher and there is none; rows that do not fit.
    """

    rollout_copy: RolloutCopy | None = None

    def __init__(
        self,
        model: Any = None,
        args: DistillConfig | None = None,
        teacher_model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **keywords: Any,
    ) -> None:
        args = args if args is not None else DistillConfig()
        if processing_class is None:
            raise ConfigurationError("DistillTrainer needs processing_class, the tokenizer")
        teacher_model = _teacher_model(args, teacher_model, model)
        model = _student_model(args, model, teacher_model)
        if args.disable_dropout:
            disable_dropout(model)
        self.end_tokens = end_tokens(processing_class, model)
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        ends = self.end_tokens
        self.max_length = _longest(args, model, teacher_model)
        longest = self.max_length
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            processing_class=processing_class,
            **{k: _tokenized(v, k, args, processing_class, ends, longest) for k, v in data.items()},
            **keywords,
        )
        self.loss_is_scaled_for_ga = True  # every term is divided by its count of the whole step
        self._set_up(args, teacher_model, processing_class)

    def _set_up(self, args: DistillConfig, teacher_model: Any, tokenizer: Any) -> None:
        self.config, self.recipe, self.tokens = args, args.recipe, tokenizer
        self.teacher = build_teacher(args, teacher_model, self.model)
        if isinstance(self.teacher, CapturedTeacher):
            self.teacher.check(tokenizer, self.train_dataset, self.eval_dataset, args.dataset_name)
        self.student = HeadlessModel(self._bare_student())
        if args.packing:
            require_packing(self.student, "student")
            if (live := getattr(self.teacher, "live", self.teacher)) is not None:
                require_packing(live.headless, "teacher")
        self.objective: Objective = Objective(args, tokenizer, args.device)
        self.sources = self._build_sources()
        self.meter, self.eval_meter = metrics.Meter(), metrics.Meter()
        self.corrections: list[dict[str, Any]] = []
        self.run_log = DistillLog(str(args.output_dir), self.is_world_process_zero())
        self._counts: dict[str, float] = {}
        self._step = metrics.Meter()
        self.add_callback(StepCallback(self))

    def _bare_student(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _build_sources(self) -> Sources:
        config, recipe = self.config, self.recipe
        teacher = None if self.teacher is None else self.teacher.model
        student = self._bare_student()
        if self.is_fsdp_enabled and recipe.writes:
            self.rollout_copy = RolloutCopy(student, config.device)
            student = self.rollout_copy.model
        writer = StudentWriter(student, teacher, self._writing()) if recipe.writes else None
        texts = self._teacher_texts(student, teacher) if recipe.completions == "teacher" else None
        share = self._gathered
        return Sources(recipe, writer, config.seed, config.replay_share, texts, share)

    def _writing(self) -> WritingSettings:
        config, recipe = self.config, self.recipe
        return WritingSettings(
            end_tokens=self.end_tokens,
            max_completion_length=config.max_completion_length,
            max_length=self.max_length,
            batch_size=config.rollout_batch_size,
            drafter=config.rollout_drafter,
            draft_budget=config.rollout_draft_budget,
            rounds=config.scrg_rounds,
            do_sample=recipe.do_sample,
            temperature=config.rollout_temperature,
            interleave_top_k=recipe.interleave_top_k,
        )

    def _teacher_texts(self, student: Any, teacher: Any) -> TeacherTexts:
        """The teacher's likeliest texts, kept in a file of each process."""
        drafter = "prompt-lookup" if self.config.rollout_drafter else None
        settings = replace(self._writing(), drafter=drafter, do_sample=False, interleave_top_k=0)
        writer = StudentWriter(teacher, student, settings)
        rank = self.accelerator.process_index
        file = Path(self.config.teacher_text_file or self._folder / "teacher_text.jsonl")
        made_by = {
            "teacher": self.config.teacher_model_name_or_path,
            "revision": self.config.teacher_model_revision,
            "max_completion_length": settings.max_completion_length,
            "max_length": settings.max_length,
            "end_tokens": list(settings.end_tokens),
        }
        path = file.with_name(f"{file.stem}-{rank}{file.suffix}") if rank else file
        return TeacherTexts(lambda p: [t.tokens for t in writer.write(p).texts], path, made_by)

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
        started, step = perf_counter(), self.state.global_step
        if self.rollout_copy is not None:
            self.rollout_copy.refresh(self._bare_student())
        revise = self.recipe.scrg and step >= self.config.scrg_start(self.state.max_steps)
        progress = step / max(self.state.max_steps, 1)
        sequences, writing = self.sources.draw(window, step, revise, progress)
        self.meter.add({"time/rollout": perf_counter() - started - writing.teacher_seconds})
        self.meter.add({"time/teacher": writing.teacher_seconds})
        self.meter.add({f"source/{k}": float(v) for k, v in source_shares(sequences).items()})
        self._record(writing, step)
        return sequences

    def _record(self, writing: Writing, step: int) -> None:
        if writing.texts:
            self.meter.add({"rollout/tokens": float(writing.written_tokens)})
            self.meter.add({"rollout/texts": float(len(writing.texts))})
            self.meter.add({"skd.judged": writing.judged, "skd.replaced": writing.replaced})
        self.meter.add(metrics.scrg_sums(writing.counts))
        made = [correction_record(c, step, self.tokens) for c in writing.corrections]
        self.corrections = [*self.corrections, *made][-KEPT_CORRECTIONS:]

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
        taught = self.teacher is not None
        supervised = self.recipe.sft_weight > 0
        sequences = [
            TrainingSequence(e.prompt_ids, e.completion_ids, supervised, taught)
            for e in inputs["examples"]
        ]
        batch = self._prepare_inputs(self._batch(sequences))
        with torch.no_grad(), self.compute_loss_context_manager():
            streams = self.objective.measured if taught else self.objective.streams
            sums = self.objective.sums(self.student, self.teacher, batch, model, streams)
            loss = self.objective.combine(sums, self.objective.counts(batch))
        self.eval_meter.add(metrics.term_sums(sums))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **keywords: Any) -> EvalLoopOutput:
        """transformers' loop; means of each term are added, over tokens and not over batches."""
        self.eval_meter.take()
        output = super().evaluation_loop(*args, **keywords)
        prefix = keywords.get("metric_key_prefix", "eval")
        means = metrics.term_means(self._summed(self.eval_meter.take()))
        weights = self.objective.weights
        found = {f"{prefix}_{name}": value for name, value in means.items()}
        found[f"{prefix}_loss"] = sum(w * means.get(n, 0.0) for n, w in weights.items())
        if self.is_in_train and prefix == self._watched():
            self.sources.schedule.observe(found[f"{prefix}_loss"])
        return output._replace(metrics={**(output.metrics or {}), **found})

    def _watched(self) -> str:
        """Prefix of the evaluation that the scheduler follows: the only or the first set's."""
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        return f"eval_{next(iter(several))}" if several else "eval"

    # Log

    def begin_run(self) -> None:
        """Open the run's log at the step where training goes on."""
        config = self.config
        self.run_log.start(resolved(config), config.seed, self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms and phase times since the last record, and write the run's own log."""
        if "loss" in logs:
            logs |= metrics.numbers(self._summed(self.meter.take()))
            if self.recipe.adaptive:
                logs["phi"] = self.sources.schedule.phi
            if self.objective.bands is not None:
                logs["dac/dual"] = self.objective.bands.state.dual
            self.run_log.corrections(self.corrections)
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
            "sources": self.sources.state_dict(),
            "corrections": self.corrections,
            "bands": None if bands is None else bands.numbers(),
            "fixed": fixed_choices(self.config),
        }
        return state, {} if bands is None else bands.tensors()

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
        """Take back what `carried` gave; refuses to go on as another run."""
        check_same_run(state["fixed"], fixed_choices(self.config), folder)
        self.meter.load_state_dict(state["meter"] if self.is_world_process_zero() else {})
        self.sources.load_state_dict(state["sources"])
        self.corrections = state["corrections"]
        if self.objective.bands is not None:
            self.objective.bands.load(state["bands"], tensors)


def _longest(config: DistillConfig, *models: Any) -> int:
    """Most tokens of a sequence: ``max_length``, within the context of student and teacher."""
    contexts = (max_length(model.config) for model in models if model is not None)
    return min([config.max_length, *(c for c in contexts if c is not None)])


def _tokenized(
    rows: Any, name: str, config: DistillConfig, tokenizer: Any, end: tuple, longest: int
) -> Any:
    """Rows of the argument ``name`` as ids; a dictionary of datasets stays one."""
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {
            k: _tokenized(v, f"{name} {k!r}", config, tokenizer, end, longest)
            for k, v in rows.items()
        }
    evaluating = name.startswith("eval")
    origin = (config.eval_dataset_name if evaluating else None) or config.dataset_name or name
    encoding = Encoding(
        tokenizer=tokenizer,
        eos_ids=end,
        max_length=longest,
        completion=evaluating or config.recipe.reads_dataset,
        as_chat=config.as_chat,
        skip_long_prompts=config.skip_long_prompts,
        whole=evaluating or config.learns_whole_rows,
        completion_only=config.completion_only_loss,
        origin=Path(origin).name,
    )
    return tokenize(rows, encoding, config.dataset_num_proc)


def _teacher_model(config: DistillConfig, given: Any, student: Any) -> Any:
    if isinstance(given, str):
        config.teacher_model_name_or_path, given = given, None
    own = config.teacher_signal is not None or has_adapter(student)
    needed = (config.recipe.needs_teacher and not own) or config.student_type is not None
    named = config.teacher_model_name_or_path is not None
    return load_teacher(config) if given is None and (needed or named) else given


def _student_model(config: DistillConfig, given: Any, teacher: Any) -> Any:
    if isinstance(given, str):
        config.model_name_or_path, given = given, None
    return build_student(config, teacher) if given is None else given
