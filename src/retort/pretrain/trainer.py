"""`PretrainTrainer`: transformers' Trainer with exact resume, perplexity and throughput."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from retort.errors import RetortError
from retort.pretrain.config import FIXED, PretrainConfig
from retort.pretrain.corpus import IGNORED, collate
from retort.pretrain.numbers import Throughput, perplexities
from retort.train.arguments import resolved
from retort.train.records import RunLog
from retort.train.saving import WholeCheckpointTrainer

CONFIG = "pretrain_config.yaml"


class PretrainTrainer(WholeCheckpointTrainer):
    """Train a causal language model on blocks of ids.

    Args:
        model: the model.
        args: a `PretrainConfig`.
        train_dataset, eval_dataset: `Blocks`, or any data set of ``input_ids`` (and ``labels``,
            −100 where nothing is to be predicted).
        processing_class: the tokenizer, saved beside the model.
        eval_size: bytes and words of the evaluation texts, for numbers that compare over
            tokenizers.
        **keywords: of transformers' Trainer.
    """

    def __init__(
        self,
        model: Any,
        args: PretrainConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        eval_size: tuple[int, int] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=collate,
            **keywords,
        )
        self.config, self.eval_size = args, eval_size
        self.run_log = RunLog(str(args.output_dir), CONFIG, self.is_world_process_zero())
        self.clock = Throughput()
        self._nll = torch.zeros(2, dtype=torch.float64)
        self.add_callback(_Start(self))

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices decay; vectors (norms, biases, D) and Mamba's A do not (its authors' rule)."""
        return [n for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("A_log")]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One batch forward and backward, timed; a loss that is not finite ends the run."""
        with self.clock.measure(inputs["input_ids"].numel() * self.accelerator.num_processes):
            loss = super().training_step(model, inputs, num_items_in_batch)
            finite = math.isfinite(float(loss))
        if not finite:
            raise RetortError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}: lower "
                "learning_rate or max_grad_norm; the newest checkpoint is intact"
            )
        return loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """Mean loss of a batch; the sum and the number of its tokens are kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
            labels = inputs["labels"][:, 1:]
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED,
                reduction="none",
            )  # fmt: skip
        count = (labels != IGNORED).sum()
        self._nll += torch.stack([losses.double().sum(), count.double()]).cpu()
        return losses.sum() / count.clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, **keywords: Any) -> EvalLoopOutput:
        """transformers' loop; the loss is a mean over tokens and not over batches."""
        self._nll.zero_()
        output = super().evaluation_loop(*args, **keywords)
        total, count = self.accelerator.reduce(self._nll, "sum").tolist()
        prefix = keywords.get("metric_key_prefix", "eval")
        found = perplexities(total, int(count), self.eval_size)
        named = {f"{prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens a second and the seconds that are left, and write the run's own log."""
        if "loss" in logs:
            logs |= self.clock.take(self.state.global_step, self.state.max_steps)
        super().log(logs, start_time)
        self.run_log.append({**logs, "step": self.state.global_step})

    def begin_run(self) -> None:
        """Open the run's log at the step where training goes on."""
        config = self.config
        self.run_log.start(resolved(config), config.seed, self.state.global_step)
        self.clock.begin(self.state.global_step)

    def carried(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The seconds trained so far."""
        return {"seconds": self.clock.seconds}, {}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on counting."""
        self.clock.seconds = state["seconds"]

    def fixed(self) -> dict[str, Any]:
        """What a continuation must not change: arguments, and the texts."""
        fixed = {name: getattr(self.config, name) for name in FIXED}
        return {**fixed, "data": getattr(self.train_dataset, "digest", None)}


class _Start(TrainerCallback):
    def __init__(self, trainer: PretrainTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin_run()
