"""Linear layers of a whole SmolLM2-135M step: packed against torch, beside what the machine can do.

    OMP_NUM_THREADS=2 python bench/linears.py [--rows 1 2 4 8 16 32] [--repeats 7] [--isa avx2]
    OMP_NUM_THREADS=2 python bench/linears.py --layers 4 --only plain --rows 1 7 33 257 512

Every number is the median of rounds in which all candidates take turns, with a read-bandwidth probe
and a matrix-product probe before each candidate; the limit is max(bytes / bandwidth, flops / rate),
from the probes next to it. "plain" is a call a layer, as `F.linear`; "step" is all layers of the
step in one call, as an engine runs them: query, key and value together, gate and up together.
"""

from __future__ import annotations

import argparse
import ctypes
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.nn import functional as F

from retort.ops import native
from retort.ops.linear import packed_linear
from retort.ops.native import abi
from retort.ops.pages import LargePages
from retort.ops.panels import gated, pack
from retort.provenance import Provenance, write_json

# hidden, query and key/value widths, intermediate width, layers, vocabulary
HIDDEN, QUERY, KEY, INNER, LAYERS, VOCAB = 576, 576, 192, 1536, 30, 49152


def shapes():
    """``[n, k]`` of each layer's linears: q, k, v, o, gate, up, down."""
    return [
        (QUERY, HIDDEN), (KEY, HIDDEN), (KEY, HIDDEN), (HIDDEN, QUERY),
        (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER),
    ]  # fmt: skip


class Step:
    """All linears of one step, stock and packed."""

    def __init__(self, layers):
        torch.manual_seed(0)
        new = lambda n, k: torch.randn(n, k).bfloat16().float()  # noqa: E731
        self.layers = [[new(*s) for s in shapes()] for _ in range(layers)]
        self.head = new(VOCAB, HIDDEN)
        self.packed = {p: self._pack(p) for p in ("float32", "bfloat16")}

    def _pack(self, precision):
        keep = partial(pack, precision=precision, pages=LargePages())
        return [[keep(w) for w in layer] for layer in self.layers], keep(self.head)

    @property
    def weights(self):
        return self.head.numel() + sum(w.numel() for layer in self.layers for w in layer)

    def stock(self, x, wide):
        for layer in self.layers:
            for weight in layer:
                F.linear(x if weight.shape[1] == HIDDEN else wide, weight)
        F.linear(x, self.head)

    def plain(self, precision, x, wide):
        layers, head = self.packed[precision]
        for layer in layers:
            for weight in layer:
                packed_linear(x if weight.k == HIDDEN else wide, weight)
        packed_linear(x, head)


class OneCall:
    """All linears of a step on ``m`` rows as one native call, with buffers of its own."""

    def __init__(self, layers, head, m):
        self.alive, calls = [], []
        rows = lambda *widths: [torch.randn(m, n) for n in widths]  # noqa: E731
        x, query, key, value, wide = rows(HIDDEN, QUERY, KEY, KEY, INNER)
        for q, k, v, o, gate, up, down in layers:
            calls += [
                self._call(x, [q, k, v], [query, key, value]),
                self._call(query, [o], [x], x),
                self._call(x, [gated(gate, up)], [wide]),
                self._call(wide, [down], [x], x),
            ]
        calls.append(self._call(x, [head], rows(VOCAB)))
        array = (abi.LinearCall * len(calls))(*calls)
        self.alive.append(array)
        self.call = abi.LinearsCall(ctypes.addressof(array), len(calls), torch.get_num_threads())

    def _call(self, x, weights, outs, residual=None):
        layers = (abi.Linear * len(weights))(*[w.layer for w in weights])
        places = (ctypes.c_int64 * len(outs))(*[out.data_ptr() for out in outs])
        strides = (ctypes.c_int64 * len(outs))(*[out.stride(0) for out in outs])
        self.alive += [x, weights, outs, layers, places, strides]
        add = None if residual is None else residual.data_ptr()
        return abi.LinearCall(
            ctypes.addressof(layers), len(weights), x.data_ptr(), x.stride(0), len(x),
            ctypes.addressof(places), ctypes.addressof(strides), add, HIDDEN, 0,
        )  # fmt: skip

    def __call__(self):
        native.library().retort_linears(self.call)


def seconds(run):
    start = perf_counter()
    run()
    return perf_counter() - start


class Probes:
    """Read bandwidth (bytes/s) of 256 MB in large pages, and fp32 product rate (flop/s)."""

    def __init__(self):
        self.buffer = LargePages().take((64 << 20,), torch.float32).fill_(1)
        self.square = torch.randn(1024, 1024)

    def bandwidth(self):
        return self.buffer.nbytes / seconds(self.buffer.sum)

    def rate(self):
        return 2 * 1024**3 / seconds(lambda: self.square @ self.square)


SIZES = {"float32": 4, "bfloat16": 2}


def candidates(step, x, wide, only):
    """Name → what it runs."""
    runs = {"F.linear": lambda: step.stock(x, wide)}
    for p in SIZES:
        runs[f"plain {p}"] = lambda p=p: step.plain(p, x, wide)
        runs[f"step {p}"] = OneCall(*step.packed[p], len(x))
    return {name: run for name, run in runs.items() if not only or name.split()[0] in only}


def measure(step, m, repeats, only):
    """Medians over rounds: bytes/s, flop/s, and of each candidate milliseconds and × its limit."""
    runs = candidates(step, torch.randn(m, HIDDEN), torch.randn(m, INNER), only)
    probes, took = Probes(), {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            took[name].append((probes.bandwidth(), probes.rate(), seconds(run)))
    took = {name: rounds[1:] for name, rounds in took.items()}  # the first warms up
    every = [r for rounds in took.values() for r in rounds]
    return {
        "rows": m,
        "bandwidth": median(r[0] for r in every),
        "rate": median(r[1] for r in every),
        "milliseconds": {n: 1e3 * median(r[2] for r in rounds) for n, rounds in took.items()},
        "times_limit": {
            n: median(s / limit(step, m, n, b, r) for b, r, s in rounds)
            for n, rounds in took.items()
        },
        "over_stock": {
            n: median(s / f[2] for (_, _, s), f in zip(rounds, took["F.linear"], strict=True))
            for n, rounds in took.items()
        },
    }


def limit(step, m, name, bandwidth, rate):
    size = SIZES.get(name.split()[-1], 4)
    return max(size * step.weights / bandwidth, 2 * m * step.weights / rate)


def row(got):
    """One table row: milliseconds, (× the limit), and × F.linear's time."""
    cells = [f"{got['rows']}", f"{got['bandwidth'] / 1e9:.0f}", f"{got['rate'] / 1e9:.0f}"]
    for name, took in got["milliseconds"].items():
        cells.append(f"{took:.1f} ({got['times_limit'][name]:.2f}, {got['over_stock'][name]:.2f})")
    return "| " + " | ".join(cells) + " |"


def table(results):
    heads = ["rows", "GB/s", "GFLOPS", *results[0]["milliseconds"]]
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(row, results)]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--only", nargs="+", choices=["plain", "step"], help="beside F.linear")
    parser.add_argument("--isa", choices=native.ISAS)
    parser.add_argument("--output", type=Path, default=Path("bench-linears.json"))
    return parser.parse_args()


def main():
    told = arguments()
    only = told.only and ["F.linear", *told.only]
    step, results = Step(told.layers), []
    with native.use_isa(told.isa) if told.isa else nullcontext():
        record = Provenance.collect(vars(told)).to_dict() | {"isa": native.isa()}
        record["threads"] = torch.get_num_threads()
        for m in told.rows:
            results.append(measure(step, m, told.repeats, only))
            print(row(results[-1]), flush=True)
            write_json(told.output, {"provenance": record, "results": results})
    print(*table(results), sep="\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
