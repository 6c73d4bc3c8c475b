"""One cell: data, model, training on `PretrainTrainer`, evaluation, and its result."""

from __future__ import annotations

import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from experiments.dense_ssm import mqar
from experiments.dense_ssm.cells import BATCH, BLOCK, VOCABULARY, Cell, model_config
from retort.pretrain.config import PretrainConfig
from retort.pretrain.corpus import Blocks, Corpus, load_texts, pack, train_tokenizer
from retort.pretrain.model import new_model
from retort.pretrain.run import train
from retort.pretrain.trainer import PretrainTrainer
from retort.provenance import Provenance, write_json

# Of the validation texts a part tunes the learning rate, another is reported; none does both.
TUNING = {"wikitext2": slice(0, 10), "tinyshakespeare": slice(0, 10)}
REPORTED = {"wikitext2": slice(10, 40), "tinyshakespeare": slice(10, None)}


def run_cell(cell: Cell, data: Path, work: Path, results: Path) -> dict[str, Any]:
    """Train a cell from where it stopped and write its result; the checkpoints go then."""
    folder = work / cell.name
    config = training_config(cell, folder)
    tokenizer, training, evaluation, size = _data(cell, data)
    values = model_config(cell.corpus, cell.family, cell.variant, len(tokenizer))
    set_seed(cell.seed)
    watch = Watch()
    trainer = PretrainTrainer(
        model=new_model(f"dense_{cell.family}", values, tokenizer),
        args=config,
        train_dataset=training,
        eval_dataset=evaluation,
        processing_class=None if cell.corpus == "mqar" else tokenizer,
        eval_size=size,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    train(trainer)
    found = {k: v for r in trainer.state.log_history[-1:] for k, v in r.items()}
    result = {
        "cell": cell.to_dict() | {"steps": cell.steps},
        "evaluation": {k: v for k, v in found.items() if k in _KEPT},
        "losses": [[r["step"], r["loss"]] for r in trainer.state.log_history if "loss" in r],
        "model": values | {"parameters": sum(p.numel() for p in trainer.model.parameters())},
        "training": watch.numbers(),
        "data": training.digest,
        "provenance": _provenance(),
    }
    if cell.corpus == "mqar":
        result["evaluation"]["accuracy"] = mqar.accuracy(trainer.model, evaluation)
    write_json(results / f"{cell.name}.json", result)
    shutil.rmtree(folder)
    return result


def training_config(cell: Cell, folder: Path) -> PretrainConfig:
    """The recipe, which is the same for all cells but for rate, seed and steps."""
    return PretrainConfig(
        output_dir=str(folder),
        model_type=f"dense_{cell.family}",
        tokenizer_vocab_size=VOCABULARY,
        block_size=BLOCK,
        per_device_train_batch_size=64 if cell.corpus == "mqar" else BATCH,
        per_device_eval_batch_size=64 if cell.corpus == "mqar" else 2 * BATCH,
        max_steps=cell.steps,
        learning_rate=cell.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=cell.steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=cell.seed,
        logging_steps=10,
        save_strategy="steps",
        save_steps=50,
        save_total_limit=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )


class Watch(TrainerCallback):
    """CPU and wall seconds of the steps of this process, without evaluation and saving."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.steps = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step starts."""
        self._began = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
        """A step is done."""
        cpu, wall = self._began
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        self.steps += 1

    def numbers(self) -> dict[str, float]:
        """Means a step; wall time depends on what else the machine did."""
        steps = max(self.steps, 1)
        return {"cpu_seconds_a_step": self.cpu / steps, "wall_seconds_a_step": self.wall / steps}


_KEPT = {"eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_word_perplexity"}
_KEPT |= {"eval_tokens"}


def _data(cell: Cell, data: Path) -> tuple[Any, Any, Any, tuple[int, int] | None]:
    if cell.corpus == "mqar":
        test = mqar.Recall(mqar.TEST, seed=99 if cell.grid else 98)
        return _NoTokenizer(), mqar.Recall(mqar.TRAIN, cell.seed), test, None
    tokenizer, training = _training(cell.corpus, data)
    corpus = load_texts(str(data / f"lm_{cell.corpus}_valid.jsonl"))
    part = (TUNING if cell.grid else REPORTED)[cell.corpus]
    chosen = Corpus(corpus.texts[part], corpus.origin)
    return tokenizer, training, pack(chosen, tokenizer, BLOCK, whole=False), chosen.size


@cache
def _training(corpus: str, data: Path) -> tuple[Any, Blocks]:
    texts = load_texts(str(data / f"lm_{corpus}_train.jsonl"))
    tokenizer = train_tokenizer(texts.texts, VOCABULARY)
    return tokenizer, pack(texts, tokenizer, BLOCK, whole=True)


class _NoTokenizer:
    """MQAR's ids are its own; the trainer and the model ask only for these."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return mqar.VOCABULARY


def _provenance() -> dict[str, Any]:
    found = Provenance.collect().to_dict()
    return {name: found[name] for name in ("versions", "commit", "platform", "time")}
