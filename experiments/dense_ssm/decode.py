"""Decoding speed and memory against context length, beside a transformer of equal size.

OMP_NUM_THREADS=1 python -m experiments.dense_ssm.decode --output results/context.json

The models are the experiment's, with random weights (nothing here depends on their values). One
row a model; models take turns at each length. Times are CPU seconds of one thread, medians over
rounds, so that other load on the machine counts little.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from experiments.dense_ssm.cells import VOCABULARY, model_config, parameters
from retort.decode.packed import PackedModel
from retort.provenance import Provenance, write_json

LENGTHS, CHUNK, STEPS, ROUNDS = (1024, 2048, 4096, 8192, 16384), 512, 16, 3
SHOWN = (("retnet", "m0"), ("retnet", "m2"), ("mamba", "m0"), ("mamba", "m2"))


def measure(lengths: tuple[int, ...] = LENGTHS, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A record for each model and length: tokens a CPU second, bytes of the row, weights."""
    torch.manual_seed(0)
    models = build()
    packed = {name: PackedModel(model) for name, model in models.items()}
    rows = {name: p.add_row() for name, p in packed.items()}
    records = []
    for length in lengths:
        for name, p in packed.items():
            read(p, rows[name], length)
        times: dict[str, list[float]] = {name: [] for name in packed}
        for _ in range(rounds):
            for name, p in packed.items():
                times[name].append(decode(p, rows[name]))
        for name, p in packed.items():
            count = sum(w.numel() for w in models[name].parameters())
            rate = 1 / median(times[name])
            held = row_bytes(p.cache, rows[name])
            records.append(
                {"model": name, "context": length, "tokens_per_cpu_second": rate, "bytes": held}
                | {"parameters": count}
            )
    for p in packed.values():
        p.close()
    return records


def build() -> dict[str, torch.nn.Module]:
    """The experiment's models, and the Llama whose number of parameters is nearest."""
    made = {}
    for family, variant in SHOWN:
        values = model_config("wikitext2", family, variant, VOCABULARY)
        config = AutoConfig.for_model(f"dense_{family}", **values)
        made[f"{family} {variant}"] = AutoModelForCausalLM.from_config(config).eval()
    wanted = parameters("retnet", **model_config("wikitext2", "retnet", "m2", VOCABULARY))
    made["llama"] = llama(wanted).eval()
    return made


def llama(wanted: int) -> LlamaForCausalLM:
    """A Llama of the same width and depth; its MLP takes up the rest of the parameters."""
    sizes = range(16, 1024, 16)
    with torch.device("meta"):
        counts = {i: LlamaForCausalLM(_llama(i)).num_parameters() for i in sizes}
    return LlamaForCausalLM(_llama(min(sizes, key=lambda i: abs(counts[i] - wanted))))


def _llama(intermediate: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def read(packed: PackedModel, row: int, length: int) -> None:
    """Bring a row to ``length`` tokens."""
    while packed.length(row) < length:
        count = min(CHUNK, length - packed.length(row))
        packed.forward([(row, [i % VOCABULARY for i in range(count)])], [0])


@torch.no_grad()
def decode(packed: PackedModel, row: int) -> float:
    """CPU seconds a token of `STEPS` steps, after one that does not count."""
    packed.forward([(row, [1])], [1])
    started = process_time()
    for _ in range(STEPS):
        packed.forward([(row, [1])], [1])
    return (process_time() - started) / STEPS


def row_bytes(cache: Any, row: int) -> int:
    """Bytes that a row holds: keys and values of attention, states and tape of a recurrence."""

    def count(x: Any) -> int:
        if isinstance(x, torch.Tensor):
            return x.numel() * x.element_size()
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple | list) else ()
        return sum(map(count, parts))

    buffers = getattr(cache, "_buffers", None)
    return count(cache._copy_out(row) if buffers is None else buffers[row])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = Provenance.collect({"threads": torch.get_num_threads()}, {"torch": 0}).to_dict()
    kept = {k: found[k] for k in ("arguments", "versions", "commit", "platform", "time")}
    write_json(given.output, {"records": measure(), "provenance": kept})


if __name__ == "__main__":
    main()
