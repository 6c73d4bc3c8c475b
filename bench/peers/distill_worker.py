"""One arm of `bench/distill_step.py`: a trainer that does a step for each line on standard input.

    PYTHON distill_worker.py ARM SETTINGS.json

ARM is retort, trl or trl-gkd. Each step answers with a JSON line: seconds of the whole step, of the
student's writing and of the teacher's passes, tokens written, and the process' peak memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

OUT = sys.stdout
sys.stdout = sys.stderr  # libraries print; answers go to OUT alone


class Clock:
    """Seconds by phase; a timed call inside a timed call counts once."""

    def __init__(self):
        self.seconds = {"rollout": 0.0, "teacher": 0.0}
        self.tokens = self.depth = 0

    def timed(self, phase, function, count=None):
        def call(*arguments, **keywords):
            started, self.depth = time.perf_counter(), self.depth + 1
            try:
                result = function(*arguments, **keywords)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds[phase] += time.perf_counter() - started
            self.tokens += count(result, keywords) if count else 0
            return result

        return call


class Gate(TrainerCallback):
    """Waits for a line before each step and reports after it."""

    def __init__(self, read):
        self.read, self.started, self.before = read, 0.0, None

    def on_train_begin(self, args, state, control, **_):
        self._wait(control)

    def on_step_end(self, args, state, control, **_):
        step, now = time.perf_counter() - self.started, self.read()
        answer = {key: now[key] - self.before[key] for key in now}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"step": step, **answer, "peak_bytes": peak}), file=OUT, flush=True)
        self._wait(control)

    def _wait(self, control):
        if sys.stdin.readline().strip() != "step":
            control.should_training_stop = True
        self.before, self.started = self.read(), time.perf_counter()


def main():
    arm, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    torch.set_num_threads(settings["threads"])
    trainer, gate = {"retort": retort_arm, "trl": trl_arm, "trl-gkd": gkd_arm}[arm](settings)
    print(json.dumps({"ready": arm, "versions": versions()}), file=OUT, flush=True)
    trainer.add_callback(gate)
    trainer.train()


def versions():
    import importlib.metadata as metadata

    known = {d.metadata["Name"].lower() for d in metadata.distributions()}
    names = [n for n in ("trl", "torch", "transformers", "accelerate") if n in known]
    return {name: metadata.version(name) for name in names}


def common(settings, name):
    """Training arguments that all arms share."""
    return {
        "output_dir": f"{settings['folder']}/{name}",
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "learning_rate": 1e-5,
        "max_steps": settings["steps"],
        "optim": "adamw_torch",
        "bf16": False,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
        "dataloader_pin_memory": False,
    }


def models(settings):
    """Student, teacher and tokenizer, float32."""
    tokenizer = AutoTokenizer.from_pretrained(settings["teacher"])
    pair = [
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=torch.float32)
        for name in ("student", "teacher")
    ]
    for model in pair:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return *pair, tokenizer


def chats(settings):
    return [json.loads(line) for line in Path(settings["rows"]).read_text("utf-8").splitlines()]


def retort_arm(settings):
    from retort import DistillConfig, DistillTrainer

    student, teacher, tokenizer = models(settings)
    args = DistillConfig(
        **common(settings, "retort"),
        method="gkd",
        beta=1.0,
        lmbda=1.0,
        max_completion_length=settings["new_tokens"],
        max_length=1024,
        rollout_batch_size=settings["batch_size"],
        report_samples=0,
    )
    rows = [{"prompt": r["prompt"], "completion": r["completion"]} for r in chats(settings)]
    trainer = DistillTrainer(
        model=student,
        args=args,
        teacher_model=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    names = {"rollout": "time/rollout", "teacher": "time/teacher", "tokens": "rollout/tokens"}
    return trainer, Gate(lambda: {k: trainer.meter.sums[name] for k, name in names.items()})


def trl_arm(settings):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher, tokenizer = models(settings)
    exact = {"min_new_tokens": settings["new_tokens"]}
    args = DistillationConfig(
        **common(settings, "trl"),
        beta=1.0,
        temperature=1.0,
        max_completion_length=settings["new_tokens"],
        generation_kwargs=exact,
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in chats(settings)]),
        processing_class=tokenizer,
    )
    return trainer, Gate(watched(trainer, student, teacher))


def gkd_arm(settings):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = models(settings)
    args = GKDConfig(
        **common(settings, "gkd"),
        beta=1.0,
        lmbda=1.0,
        temperature=1.0,
        max_new_tokens=settings["new_tokens"],
        max_length=1024,
    )
    rows = [{"messages": [*r["prompt"], *r["completion"]]} for r in chats(settings)]
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.generation_config.min_new_tokens = settings["new_tokens"]
    return trainer, Gate(watched(trainer, student, teacher))


def watched(trainer, student, teacher):
    """Clocks around TRL's generation and its teacher's passes (head included)."""
    clock = Clock()

    def written(result, keywords):
        ids = result if isinstance(result, torch.Tensor) else result.sequences
        return ids.shape[0] * (ids.shape[1] - keywords["input_ids"].shape[1])

    student.generate = clock.timed("rollout", student.generate, written)
    for module in (teacher, teacher.base_model):
        module.forward = clock.timed("teacher", module.forward)
    return lambda: {**clock.seconds, "tokens": clock.tokens}


if __name__ == "__main__":
    main()
