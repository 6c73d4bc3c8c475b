"""The stages of the demo. Each calls what users call (engine, trainer, evaluation, report), writes
its result into the run's folder, and is not repeated when the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from retort.cli.demo_records import decoding_line, decoding_row, read_rows, write_report, write_rows
from retort.cli.generate import complete
from retort.cli.output import say
from retort.errors import ConfigurationError
from retort.provenance import write_json

LOOKUP = "prompt-lookup"


@dataclass(frozen=True)
class Size:
    """How much the demo does.

    Attributes:
        decode_tokens: tokens a row when ways of decoding are compared, 8 rows.
        train_prompts, dev_prompts: prompts that the teacher answers for training, and for judging.
        answer_tokens: most tokens of an answer.
        steps: optimiser steps of the student.
        layers: retention layers of the student.
        rounds: repeats of the last comparison.
    """

    decode_tokens: int
    train_prompts: int
    dev_prompts: int
    answer_tokens: int
    steps: int
    layers: int
    rounds: int


FULL = Size(
    decode_tokens=96,
    train_prompts=96,
    dev_prompts=16,
    answer_tokens=48,
    steps=80,
    layers=3,
    rounds=3,
)
QUICK = Size(
    decode_tokens=24,
    train_prompts=8,
    dev_prompts=3,
    answer_tokens=16,
    steps=4,
    layers=2,
    rounds=1,
)


class Demo:
    """One run of the demo in ``folder``."""

    def __init__(self, folder: Path, model: str, size: Size) -> None:
        self.folder, self.model_name, self.size = folder, model, size
        self.settings = {"model": model, **asdict(size)}

    def run(self) -> Path:
        """Do what is not done yet and return the report's path."""
        self._begin()
        stages: list[tuple[str, str, Callable[[], Any]]] = [
            ("decoding", "Plain, padded and unpadded decoding of the same batch", self.decoding),
            ("answers", "The teacher answers the prompts: the student's data", self.answers),
            ("before", "The student before training", self.judged),
            ("training", "Distillation with semantic revision (mgsr)", self.training),
            ("after", "The student after training", self.judged),
            ("drafting", "Decoding with the student as the drafter", self.drafting),
        ]
        for number, (name, title, stage) in enumerate(stages, 1):
            say(f"[{number}/{len(stages)}] {title}")
            self.stage(name, stage)
        return self.report()

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """The stage's stored result; it is worked out at most once."""
        path = self.folder / f"{name}.stage.json"
        if path.is_file():
            say("      done earlier")
        else:
            write_json(path, work())
        return json.loads(path.read_text("utf-8"))

    def _begin(self) -> None:
        marker = self.folder / "demo.json"
        if marker.is_file() and json.loads(marker.read_text("utf-8")) != self.settings:
            raise ConfigurationError(
                f"{self.folder} holds a demo with other settings: name another --output-dir, or "
                "pass --fresh to start again"
            )
        self._check_model()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, self.settings)

    def _check_model(self) -> None:
        """Refuse a model before its weights are loaded and before anything is written."""
        from retort.decode.support import check_supported
        from retort.models.zoo import load_config

        check_supported(load_config(self.model_name))

    # Shared parts
    @cached_property
    def teacher(self) -> Any:
        """The teacher, loaded once."""
        from retort.models.zoo import load_model

        say(f"      loading {self.model_name}")
        return load_model(self.model_name, dtype="float32")

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from retort.models.zoo import load_tokenizer

        return load_tokenizer(self.model_name)

    @property
    def student_folder(self) -> Path:
        """Where the trainer works."""
        return self.folder / "student"

    def student(self) -> Any:
        """The trained student, or, before training, the one that training starts from."""
        from transformers import set_seed

        from retort.distill.init import build_student
        from retort.models.zoo import load_model

        if (self.folder / "training.stage.json").is_file():
            return load_model(str(self.student_folder), dtype="float32")
        config = self.distill_config()
        set_seed(config.seed)
        return build_student(config, self.teacher)

    def chats(self, split: str, count: int | None = None) -> list[list[dict]]:
        """Prompts of our own writing, as chat messages."""
        file = resources.files("retort.cli") / "data" / "demo_prompts.jsonl"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        texts = [row["prompt"] for row in rows if row["split"] == split]
        return [[{"role": "user", "content": text}] for text in texts[:count]]

    # Stages
    def decoding(self) -> list[dict]:
        """The same batch decoded in several ways; all give the same tokens."""
        return self._compared(_lookup_arms(), rounds=1)

    def answers(self) -> dict:
        """The teacher's answers as training and development rows."""
        from retort.decode.engine import Engine

        counts = {"train": self.size.train_prompts, "dev": self.size.dev_prompts}
        with Engine(self.teacher, self.tokenizer, drafter=LOOKUP) as engine:
            for split, count in counts.items():
                chats = self.chats(split, count)
                outputs = complete(engine, chats, self._params(self.size.answer_tokens))
                write_rows(self.folder, split, chats, outputs)
        return counts

    def judged(self) -> dict:
        """ROUGE-L against the teacher's answers, acceptance α and likelihood of the student."""
        from retort.decode.engine import Engine
        from retort.evaluate.acceptance import acceptance
        from retort.evaluate.perplexity import completion_perplexity
        from retort.evaluate.rouge import rouge_l_scores

        student, rows = self.student(), read_rows(self.folder, "dev")
        examples = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        with Engine(student, self.tokenizer) as engine:
            outputs = complete(
                engine, [p for p, _ in examples], self._params(self.size.answer_tokens)
            )
        texts = [output.text for output in outputs]
        return {
            "texts": texts,
            "rouge_l": rouge_l_scores(texts, [row["text"] for row in rows]),
            "acceptance": acceptance(self.teacher, student, examples).rate,
            "nll": completion_perplexity(student, examples).nll,
        }

    def training(self) -> dict:
        """Run the trainer; it goes on from its newest checkpoint by itself."""
        from retort.cli.progress import TrainingProgress
        from retort.distill.run import run

        self.__dict__.pop("teacher", None)  # the trainer loads its own
        return {"folder": str(run(self.distill_config(), [TrainingProgress()]))}

    def drafting(self) -> list[dict]:
        """All ways again in interleaved rounds, now with the student as a drafter too."""
        student = self.student()
        arms = _lookup_arms()
        arms["unpadded (student, 2 drafts)"] = {"drafter": student, "draft_budget": 2}
        arms["unpadded (student, automatic budget)"] = {"drafter": student}
        return self._compared(arms, rounds=self.size.rounds)

    def report(self) -> Path:
        """All records on one page."""
        seed = self.distill_config().seed
        return write_report(self.folder, self.student_folder, self.settings, seed)

    # Details
    def distill_config(self) -> Any:
        """What ``retort distill`` would be given."""
        from retort.distill.config import DistillConfig

        return DistillConfig(
            output_dir=str(self.student_folder),
            method="mgsr",
            teacher_model_name_or_path=self.model_name,
            student_type="dense_retnet",
            student_num_hidden_layers=self.size.layers,
            freeze_embeddings=True,
            dataset_name=str(self.folder / "train.jsonl"),
            max_steps=self.size.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            max_completion_length=self.size.answer_tokens,
            scrg_warmup_steps=0.2,
            logging_steps=1,
            save_steps=max(self.size.steps // 4, 2),
            save_total_limit=2,
            report_samples=0,  # the demo writes its own
            disable_tqdm=True,
            use_cpu=True,
        )

    def _compared(self, arms: dict[str, dict], rounds: int) -> list[dict]:
        """Rows of the report, medians over rounds in which all arms take turns."""
        from retort.decode.admission import encode
        from retort.decode.engine import Engine
        from retort.decode.padded import PaddedEngine
        from retort.evaluate.decoding import compare, engine_arm

        prompts = [encode(chat, self.tokenizer) for chat in self.chats("decode")]
        with ExitStack() as stack:
            runs = {}
            for name, options in arms.items():
                engine_class = PaddedEngine if name.startswith("padded") else Engine
                engine = engine_class(self.teacher, self.tokenizer, max_batch_size=8, **options)
                runs[name] = engine_arm(stack.enter_context(engine))
            how = {"warmup": 0, "batch_size": min(len(prompts), 8)}
            results = compare(runs, prompts, self.size.decode_tokens, rounds, **how)
            rows = [decoding_row(result) for result in results]
        for row in rows:
            say(decoding_line(row))
        return rows

    def _params(self, tokens: int) -> Any:
        from retort.decode.params import SamplingParams

        return SamplingParams(max_new_tokens=tokens)


def _lookup_arms() -> dict[str, dict]:
    return {
        "plain": {},
        "padded (prompt lookup, 7 drafts)": {"drafter": LOOKUP, "draft_budget": 7},
        "unpadded (prompt lookup, 7 drafts)": {"drafter": LOOKUP, "draft_budget": 7},
        "unpadded (prompt lookup, automatic budget)": {"drafter": LOOKUP},
    }
