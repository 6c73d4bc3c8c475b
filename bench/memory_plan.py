"""Memory of a step for each number of GPUs, worked out without allocating anything.

    python bench/memory_plan.py --student FOLDER_OR_ID --teacher FOLDER_OR_ID --processes 1 2 4 8

Without names a 13B teacher and a 7B student of Llama 2's sizes are planned for. `--captured` plans
for a captured signal in the teacher's place, `--lora` for adapters of that rank on frozen weights.
`--output FILE` keeps the plan as JSON.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import nn

from retort.distill.memory import MemoryPlan, Workload, on_meta, plan
from retort.provenance import Provenance, write_json

LLAMA = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
}


def main() -> None:
    options = arguments()
    student = load(options.student or "7B", options.dtype)
    teacher = None if options.captured else load(options.teacher or "13B", options.dtype)
    if options.lora:
        add_adapters(student, options.lora)
    names = [each.name for each in fields(MemoryPlan)]
    print("| GPUs | " + " | ".join(n.replace("_", " ") for n in names) + " | total GB |")
    print("|" + "---|" * (len(names) + 2))
    plans = []
    for count in options.processes:
        work = Workload(
            rows=options.rows,
            tokens=options.tokens,
            rollout_rows=options.rollout_rows,
            processes=count,
            gradient_checkpointing=not options.no_checkpointing,
        )
        made = plan(student, teacher, work)
        plans.append({"processes": count, "total": made.total, **asdict(made)})
        sizes = " | ".join(f"{getattr(made, name) / 1e9:.2f}" for name in names)
        print(f"| {count} | {sizes} | {made.total / 1e9:.1f} |")
    if options.output:
        record = Provenance.collect({**vars(options), "output": None}).to_dict() | {"command": []}
        write_json(options.output, {"bytes": plans, "provenance": record})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", help="zoo name, hub id or folder; its weights are not read")
    parser.add_argument("--teacher")
    parser.add_argument("--captured", action="store_true")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=2, help="sequences a batch and GPU")
    parser.add_argument("--tokens", type=int, default=640, help="prompt and completion")
    parser.add_argument("--rollout-rows", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def load(name: str, dtype: str):
    from transformers import LlamaConfig

    from retort.models import zoo

    if name in LLAMA:
        heads = LLAMA[name]["hidden_size"] // 128
        config = LlamaConfig(num_attention_heads=heads, **LLAMA[name])
    else:
        config = zoo.load_config(name)
    return on_meta(config, getattr(torch, dtype))


def add_adapters(model: nn.Module, rank: int) -> None:
    """Two matrices beside each linear layer but the head; everything else is frozen."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module is not head:
            like = {"device": "meta", "dtype": module.weight.dtype}
            module.lora_A = nn.Parameter(torch.empty(rank, module.in_features, **like))
            module.lora_B = nn.Parameter(torch.empty(module.out_features, rank, **like))


if __name__ == "__main__":
    main()
