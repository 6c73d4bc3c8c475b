"""Tiny models, a tokenizer and rows for the trainer's tests."""

import json

import torch

from retort.decode.stats import EngineStats
from retort.distill.config import DistillConfig
from retort.distill.sequences.sources import Sources
from retort.distill.trainer import DistillTrainer
from tests.decode.toys import toy
from tests.distill.tokenizers import byte_level

# After one step of eight rows the buffer is full; seed 42 chooses student, student, replay.
FULL_BUFFER = {"method": "distillm", "phi": 0.9, "replay_buffer_size": 8, "max_steps": 3}
WORDS = ["the cat", "a dog sat", "hello", "my old house, far off", "we know", "green", "x", "on"]
ROWS = [{"prompt": f"{w} and", "completion": f" {w[::-1]}."} for w in WORDS]


def tokenizer():
    """Bytes; it pads with its end token, as SmolLM2's does."""
    made = byte_level(merges=False)
    made.pad_token = made.eos_token
    return made


def llama(seed=1, layers=2, dtype=torch.float32, **changes):
    """A random llama over the tokenizer's 258 ids."""
    sizes = {"vocab_size": 258, "num_hidden_layers": layers, "eos_token_id": 0, "hidden_size": 32}
    sizes |= {"head_dim": 8, "intermediate_size": 48, "pad_token_id": None}
    return toy("llama", seed, dtype, **{**sizes, **changes})


def config(folder, **changes):
    """Four optimiser steps of 2 × 2 rows on the CPU, quiet."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 64,
        "max_completion_length": 8,
        "report_samples": 0,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if changes.get("scrg", changes.get("method", "mgsr") == "mgsr"):
        values["scrg_warmup_steps"] = 0
    if changes.get("method") == "distillm":  # its scheduler follows evaluations
        values |= {"eval_strategy": "steps", "eval_steps": 1}
    return DistillConfig(**{**values, **changes})


def trainer(folder, student=None, teacher=None, rows=ROWS, **changes):
    """A trainer over `ROWS` with random models; ``phi`` is where DistiLLM's scheduler begins."""
    phi = changes.pop("phi", 0.0)
    callbacks = changes.pop("callbacks", None)
    evaluation = changes.pop("eval_dataset", None)
    if evaluation is None and changes.get("method") == "distillm":
        evaluation = ROWS[:2]
    made = DistillTrainer(
        model=student or llama(2),
        args=config(folder, **changes),
        teacher_model=teacher or llama(1),
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
    made.rollouts.sources.schedule.phi = phi
    return made


def record_texts(monkeypatch):
    """A list that receives the ids of every text that a student writes, a list each step."""
    texts, draw = [], Sources.draw

    def recorded(*arguments):
        sequences, writing = draw(*arguments)
        texts.append([text.tokens for text in writing.texts])
        return sequences, writing

    monkeypatch.setattr(Sources, "draw", recorded)
    return texts


def record_accepted(monkeypatch):
    """A list that receives how many tokens of every draft were accepted."""
    accepted, record = [], EngineStats.record_draft

    def recorded(stats, length, count):
        accepted.append(count)
        record(stats, length, count)

    monkeypatch.setattr(EngineStats, "record_draft", recorded)
    return accepted


def weights(model):
    """A copy of every parameter, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lettered(model):
    """``model`` with a head that says letters and spaces only, so that its texts have words."""
    ids = [tokenizer()(c)["input_ids"][0] for c in "etaoin shrdlu "]
    with torch.no_grad():
        kept = model.lm_head.weight[ids].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids] = kept
    return model


@torch.no_grad()
def greedy_text(model, prompt, length):
    """What ``model`` says after ``prompt`` by transformers' own `generate`."""
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    kept = model.training
    made = model.eval().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
    )
    model.train(kept)
    return tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def save_parts(folder):
    """A model that teaches and learns, with its tokenizer, and rows, as files in ``folder``."""
    llama(2).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def config_of_parts(parts, folder, **changes):
    """Learn the rows of `save_parts` in ``folder``, with a checkpoint at every second step."""
    names = {"model_name_or_path": parts / "model", "dataset_name": parts / "rows.jsonl"}
    values = {"method": "sft", "save_strategy": "steps", "save_steps": 2}
    return config(folder, **{**values, **{k: str(v) for k, v in names.items()}, **changes})


def logged(folder):
    """The records of a run's log."""
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def first_batch(run, index=0):
    """One batch of the data loader, as the student's step would see it."""
    batches = iter(run.get_train_dataloader())
    window, _ = run.get_batch_samples(batches, 1, run.args.device)
    return window[0]
