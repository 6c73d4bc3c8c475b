"""DenseRetNet and DenseMamba: prefill, decoding against context, the dense connection, rewinds.

    OMP_NUM_THREADS=2 python bench/recurrent.py --output docs/results/recurrent.json
        [--parts prefill context dense commit] [--hidden 512] [--layers 8] [--tokens 4096]

All arms of a part take turns; times are medians over repeats, ratios medians within a repeat.
Weights are random: nothing here depends on their values. A part that runs alone keeps what the
output file holds of the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from retort import (
    DenseMambaConfig,
    DenseMambaForCausalLM,
    DenseRetNetConfig,
    DenseRetNetForCausalLM,
)
from retort.decode.packed import PackedModel
from retort.ops import native
from retort.provenance import Provenance, write_json

VOCAB = 1024


def mamba(a: argparse.Namespace, m: int) -> DenseMambaForCausalLM:
    """A DenseMamba with window m."""
    config = DenseMambaConfig(
        vocab_size=VOCAB, hidden_size=a.hidden, num_hidden_layers=a.layers, dense_block_layers=m
    )
    return DenseMambaForCausalLM(config).eval()


def retnet(a, m, hidden=None):
    """A DenseRetNet with window m, of another width where given."""
    config = DenseRetNetConfig(
        vocab_size=VOCAB, hidden_size=hidden or a.hidden, num_hidden_layers=a.layers,
        dense_block_layers=m,
    )  # fmt: skip
    return DenseRetNetForCausalLM(config).eval()


def foreign_mamba(a):
    """transformers' own Mamba."""
    sizes = {"vocab_size": VOCAB, "hidden_size": a.hidden, "num_hidden_layers": a.layers}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def llama(a):
    """A transformer of about the same size."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=a.hidden, intermediate_size=a.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=a.layers, num_attention_heads=a.hidden // 64,
        max_position_embeddings=32768,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def size(model):
    """Number of weights."""
    return sum(p.numel() for p in model.parameters())


def equal_retnet(a, m, parameters):
    """The DenseRetNet whose number of weights is nearest to ``parameters``."""
    widths = range(a.hidden // 2, 2 * a.hidden, 32)
    with torch.device("meta"):
        sizes = {h: size(retnet(a, m, h)) for h in widths}
    return retnet(a, m, min(widths, key=lambda h: abs(sizes[h] - parameters)))


def seconds(run):
    """Wall-clock time of a call."""
    start = perf_counter()
    run()
    return perf_counter() - start


def interleaved(arms: dict[str, Callable[[], float]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each arm, and the median over rounds of its time over the first arm's."""
    for run in arms.values():
        run()
    rounds = [{name: run() for name, run in arms.items()} for _ in range(repeats)]
    first = next(iter(arms))
    return {
        name: {
            "seconds": median(r[name] for r in rounds),
            "speed_ratio": median(r[first] / r[name] for r in rounds),
        }
        for name in arms
    }


# (a) prefill


def prefill(a):
    """A prompt of ``a.tokens``, in passes of ``a.chunk`` for ours; the last token's logits."""
    theirs = foreign_mamba(a)
    models = {"DenseMamba m=2": mamba(a, 2), "DenseMamba m=0": mamba(a, 0)}
    models["DenseRetNet m=2"] = equal_retnet(a, 2, size(models["DenseMamba m=2"]))
    ids = torch.randint(VOCAB, (1, a.tokens))
    packed = {
        f"{name}, {backend}": PackedModel(_copy(model), cpu_backend=backend)
        for name, model in models.items()
        for backend in ("native", "torch")
    }  # fmt: skip

    def slow():
        with torch.no_grad():
            return seconds(lambda: theirs(input_ids=ids, use_cache=True, logits_to_keep=1))

    arms = {"transformers Mamba": slow}
    arms |= {name: lambda p=p: _prefill(p, ids[0].tolist(), a.chunk) for name, p in packed.items()}
    got = interleaved(arms, a.repeats)
    sizes = {"transformers Mamba": size(theirs)} | {n: size(m) for n, m in models.items()}
    for name, row in got.items():
        row["parameters"] = sizes[name.split(",")[0]]
        row["tokens_per_second"] = a.tokens / row["seconds"]
    for model in packed.values():
        model.close()
    return got


def _copy(model):
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def _prefill(packed, ids, chunk):
    row = packed.add_row()
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    took = seconds(lambda: [packed.forward([(row, part)], [1]) for part in parts])
    packed.free_row(row)
    return took


# (b) decoding against context


def context(a):
    """Time of one token and bytes of one row at each context length, each row alone in a pass."""
    results = {}
    for name, build in (
        ("DenseRetNet m=2", lambda: retnet(a, 2)),
        ("DenseMamba m=2", lambda: mamba(a, 2)),
        ("Llama", lambda: llama(a)),
    ):
        packed = PackedModel(build())
        rows = {}
        for length in a.contexts:
            rows[length] = packed.add_row()
            for i in range(0, length, a.chunk):
                packed.forward([(rows[length], [i % VOCAB] * min(a.chunk, length - i))], [0])
        arms = {length: partial(_decode, packed, [row], 12) for length, row in rows.items()}
        results[name] = interleaved(arms, a.repeats + 2)
        for length, row in rows.items():
            results[name][length]["bytes"] = _bytes(packed.cache, row)
        packed.close()
    return results


def _decode(packed, rows, steps):
    feeds = [(row, [1]) for row in rows]
    return seconds(lambda: [packed.forward(feeds, [1] * len(rows)) for _ in range(steps)]) / steps


def _bytes(cache, row):
    """Bytes of all that a row holds."""

    def count(x):
        if isinstance(x, torch.Tensor):
            return x.numel() * x.element_size()
        if isinstance(x, dict):
            x = x.values()
        return sum(map(count, x)) if isinstance(x, (tuple, list, type({}.values()))) else 0

    buffers = getattr(cache, "_buffers", None)
    return count(cache._copy_out(row) if buffers is None else buffers[row])


# (c) the dense connection


def dense(a):
    """m = 2 against m = 0 of the same width: decoding at each batch, and training."""
    results = {}
    for name, build in (("DenseRetNet", retnet), ("DenseMamba", mamba)):
        models = {m: build(a, m) for m in (0, 2)}
        packed = {m: PackedModel(_copy(model)) for m, model in models.items()}
        for batch in (1, 8):
            arms = {}
            for m, p in packed.items():
                rows = [p.add_row() for _ in range(batch)]
                p.forward([(row, [1] * 64) for row in rows], [0] * batch)
                arms[f"m={m}"] = lambda p=p, rows=rows: _decode(p, rows, 10)
            results[f"{name} decoding, batch {batch}"] = interleaved(arms, a.repeats + 2)
        arms = {f"m={m}": lambda model=model: _train(model, a) for m, model in models.items()}
        results[f"{name} training"] = interleaved(arms, a.repeats)
    return results


def _train(model, a):
    ids = torch.randint(VOCAB, (2, a.train_tokens))
    model.train()

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    with torch.enable_grad():
        return seconds(step)


# (d) deferred commit against snapshots


def commit(a):
    """A step that verifies 7 drafts and accepts 3 of them, by two ways of going back.

    Deferred: verify, rewind. Snapshot: copy the states, verify, copy them back, and read the
    accepted tokens again.
    """
    results = {}
    for name, build in (("DenseRetNet m=2", retnet), ("DenseMamba m=2", mamba)):
        packed = PackedModel(build(a, 2), max_draft=8)
        for batch in (1, 8):
            rows = [packed.add_row() for _ in range(batch)]
            packed.forward([(row, [1] * 64) for row in rows], [0] * batch)
            arms = {
                "snapshot": partial(_snapshot_step, packed, rows),
                "deferred": partial(_deferred_step, packed, rows),
                "verification alone": partial(_verify_only, packed, rows),
            }
            got = interleaved(arms, a.repeats + 4)
            states, tape = packed.cache.states, packed.cache.tape
            token = sum(t[:, :1].numel() for t in (tape.keys, tape.values)) * 4
            got["snapshot"]["bytes_a_row"] = states[:, 0].numel() * 4
            got["deferred"]["bytes_a_token"] = token // packed.cache.tape.keys.shape[-2]
            results[f"{name}, batch {batch}"] = got
            for row in rows:
                packed.free_row(row)
        packed.close()
    return results


def _feeds(rows, count):
    return [(row, [5] * count) for row in rows], [count] * len(rows)


def _deferred_step(packed, rows):
    def step():
        packed.forward(*_feeds(rows, 8))
        for row in rows:
            packed.rewind(row, packed.length(row) - 4)

    return seconds(step)


def _verify_only(packed, rows):
    took = seconds(lambda: packed.forward(*_feeds(rows, 8)))
    for row in rows:
        packed.rewind(row, packed.length(row) - 8)
    return took


def _snapshot_step(packed, rows):
    def step():
        kept = [packed.cache.states[:, row].clone() for row in rows]
        packed.forward(*_feeds(rows, 8))
        for row in rows:
            packed.rewind(row, packed.length(row) - 8)
        for row, states in zip(rows, kept, strict=True):  # of Mamba some slots: the cost counts
            packed.cache.states[:, row] = states
        packed.forward(*_feeds(rows, 4))

    return seconds(step)


PARTS = {"prefill": prefill, "context": context, "dense": dense, "commit": commit}


def main():
    """Run the parts that were asked for, one file for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--train-tokens", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    data = json.loads(a.output.read_text("utf-8")) if a.output.exists() else {}
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "output"}
    for part in a.parts:
        torch.manual_seed(0)
        record = Provenance.collect(told | {"parts": [part]}, {"torch": 0})
        data[part] = {
            "provenance": record.to_dict(),
            "threads": torch.get_num_threads(),
            "isa": native.isa(),
            "results": PARTS[part](a),
        }
        write_json(a.output, data)
        print(json.dumps(data[part]["results"], indent=1), flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
