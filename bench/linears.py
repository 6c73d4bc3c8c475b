"""Linear layers of a whole SmolLM2-135M step: packed against torch, beside what the machine can do.

    OMP_NUM_THREADS=2 python bench/linears.py [--rows 1 2 4 8 16 32] [--repeats 7] [--isa avx2]

Every number is the median of rounds in which all candidates take turns, with a read-bandwidth probe
and a matrix-product probe in the same rounds; the limit is max(bytes / bandwidth, flops / rate).
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from statistics import median
from time import perf_counter

import torch
from torch.nn import functional as F

from retort.ops import native
from retort.ops.linear import gated, pack, packed_linear, packed_linears

# hidden, query and key/value widths, intermediate width, layers, vocabulary
HIDDEN, QUERY, KEY, INNER, LAYERS, VOCAB = 576, 576, 192, 1536, 30, 49152


def shapes():
    """``[n, k]`` of each layer's linears: q, k, v, o, gate, up, down."""
    return [
        (QUERY, HIDDEN), (KEY, HIDDEN), (KEY, HIDDEN), (HIDDEN, QUERY),
        (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER),
    ]  # fmt: skip


class Step:
    """All linears of one step, as stock, one packed layer each, and fused."""

    def __init__(self, layers):
        torch.manual_seed(0)
        new = lambda n, k: torch.randn(n, k).bfloat16().float()  # noqa: E731
        self.layers = [[new(*s) for s in shapes()] for _ in range(layers)]
        self.head = new(VOCAB, HIDDEN)
        self.packed = {p: self._pack(p) for p in ("float32", "bfloat16")}
        self.fused = {p: self._fuse(p) for p in ("float32", "bfloat16")}

    def _pack(self, precision):
        layers = [[pack(w, precision=precision) for w in layer] for layer in self.layers]
        return layers, pack(self.head, precision=precision)

    def _fuse(self, precision):
        layers, head = self.packed[precision]
        return [(p[:3], p[3], gated(p[4], p[5]), p[6]) for p in layers], head

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

    def together(self, precision, x, wide):
        layers, head = self.fused[precision]
        for qkv, out, inner, down in layers:
            packed_linears(x, qkv)
            packed_linear(x, out, x)
            packed_linear(x, inner)
            packed_linear(wide, down, x)
        packed_linear(x, head)


def seconds(run):
    start = perf_counter()
    run()
    return perf_counter() - start


def probes():
    """Read bandwidth (bytes/s) of a large buffer, and fp32 product rate (flop/s)."""
    buffer, square = torch.ones(64 << 20), torch.randn(1024, 1024)
    return {
        "bandwidth": lambda: buffer.nbytes / seconds(buffer.sum),
        "rate": lambda: 2 * 1024**3 / seconds(lambda: square @ square),
    }


def measure(step, m, repeats):
    """Medians: probes in units a second, candidates in milliseconds."""
    x, wide = torch.randn(m, HIDDEN), torch.randn(m, INNER)
    runs = {"F.linear": lambda: step.stock(x, wide)}
    for p in ("float32", "bfloat16"):
        runs[f"packed {p}"] = lambda p=p: step.plain(p, x, wide)
        runs[f"fused {p}"] = lambda p=p: step.together(p, x, wide)
    results = {name: [] for name in (*probes(), *runs)}
    for _ in range(repeats):
        for name, probe in probes().items():
            results[name].append(probe())
        for name, run in runs.items():
            results[name].append(1e3 * seconds(run))
    return {name: median(values[1:]) for name, values in results.items()}


def report(step, m, got):
    """One table row; the packed columns show how far from the limit they are."""
    flops = 2 * m * step.weights / got["rate"]
    cells = [f"{m}", f"{got['bandwidth'] / 1e9:.0f}", f"{got['rate'] / 1e9:.0f}"]
    cells.append(f"{got['F.linear']:.1f}")
    for precision, size in (("float32", 4), ("bfloat16", 2)):
        limit = 1e3 * max(size * step.weights / got["bandwidth"], flops)
        cells.append(f"{limit:.1f}")
        for kind in ("packed", "fused"):
            took = got[f"{kind} {precision}"]
            cells.append(f"{took:.1f} ({took / limit:.2f})")
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--isa", choices=native.ISAS)
    arguments = parser.parse_args()
    step = Step(arguments.layers)
    with native.use_isa(arguments.isa) if arguments.isa else nullcontext():
        print(f"{native.isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}; ms")
        heads = ["rows", "GB/s", "GFLOPS", "F.linear"]
        for p in ("fp32", "bf16"):
            heads += [f"limit {p}", f"packed {p} (× limit)", f"fused {p} (× limit)"]
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for m in arguments.rows:
            report(step, m, measure(step, m, arguments.repeats))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
