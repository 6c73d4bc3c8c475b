"""Two optimiser steps of a 1.3B DenseRetNet student with random weights, and the peak memory.

    python bench/scale.py --prompts dolly_valid.jsonl --output bench-scale.json
    python bench/scale.py --prompts dolly_valid.jsonl --rank 0 --output bench-scale-full.json

The student has the published 1.3B sizes (hidden 2560, keys 1280, 4 heads, 25 layers, m = 2) in
bf16, with LoRA on its projections or all weights trained; the teacher is a real model. Both steps
are mgsr's: the student writes, the teacher revises, all terms are trained. Peak memory is the
process' own.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from retort import DenseRetNetConfig, DenseRetNetForCausalLM, DistillConfig, DistillTrainer
from retort.models import zoo
from retort.provenance import Provenance, write_json

SIZES = {
    "hidden_size": 2560,
    "query_key_dim": 1280,
    "num_attention_heads": 4,
    "num_hidden_layers": 25,
    "dense_block_layers": 2,
    "intermediate_k_select_scale": 16,
    "intermediate_v_select_scale": 8,
}
QUESTIONS = ["Name three rivers.", "What is tin used for?", "Who wrote Faust?", "How do bees see?"]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    tokenizer = zoo.load_tokenizer(options.model)
    student = build_student(options, len(tokenizer))
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in student.parameters())
    print(f"student: {total / 1e9:.2f}e9 weights, {trainable / 1e6:.1f}e6 trained", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(options, student, tokenizer, folder)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        lines = (Path(folder) / "training.jsonl").read_text("utf-8").splitlines()
    logged = [line for line in map(json.loads, lines) if "loss" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{len(logged)} steps in {seconds:.0f} s, peak {peak / 1e9:.1f} GB", flush=True)
    places = {"prompts": options.prompts and options.prompts.name, "output": None}
    record = Provenance.collect(vars(options) | places).to_dict() | {"command": []}
    write_json(
        options.output,
        {
            "provenance": record,
            "weights": total,
            "trained": trainable,
            "peak_bytes": peak,
            "seconds": seconds,
            "steps": logged,
        },
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the teacher")
    parser.add_argument("--prompts", type=Path, help="JSONL with prompt and reference")
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; 0 trains everything")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("bench-scale.json"))
    return parser.parse_args()


def build_student(options: argparse.Namespace, vocabulary: int) -> torch.nn.Module:
    """Random weights in bf16, with adapters."""
    sizes = {**SIZES, "num_hidden_layers": options.layers, "vocab_size": vocabulary}
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = DenseRetNetForCausalLM(DenseRetNetConfig(**sizes, pad_token_id=None))
    finally:
        torch.set_default_dtype(torch.float32)
    if not options.rank:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=options.rank, target_modules="all-linear"))


def build_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """As many rows as the steps take."""
    count = options.steps * options.batch_size
    if options.prompts is None:
        rows = [{"prompt": row, "completion": " I do not know yet."} for row in QUESTIONS]
        return (rows * count)[:count]
    with options.prompts.open(encoding="utf-8") as file:
        found = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return [{"prompt": row["prompt"], "completion": row["reference"]} for row in found]


def build_trainer(
    options: argparse.Namespace, student: torch.nn.Module, tokenizer: AutoTokenizer, folder: str
) -> DistillTrainer:
    args = DistillConfig(
        output_dir=folder,
        method="mgsr",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        max_length=options.max_length,
        max_completion_length=options.new_tokens,
        gradient_checkpointing=True,
        scrg_warmup_steps=0,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    return DistillTrainer(
        model=student,
        args=args,
        teacher_model=zoo.load_model(options.model, dtype="bfloat16"),
        train_dataset=build_rows(options),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
