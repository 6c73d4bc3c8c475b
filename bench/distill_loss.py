"""Memory and time of one loss over a small model's vocabulary, forward and backward.

    OMP_NUM_THREADS=2 python bench/distill_loss.py --output bench-distill-loss.json

`dense` is forward KL in plain torch (whole logits of both models, two log-softmaxes, `kl_div`);
`TRL's loss` its GKD trainer's `generalized_jsd_loss` at beta = 0 on the same logits, where TRL is
installed; `chunked` is Retort's, from hidden states and head, `at once` the same without chunks.
All start from the same hidden states, heads and targets and end with gradients of the student's
hidden states and head; values and gradients are compared first.

Peak memory is counted inside torch's CPU allocator through its profiler (every allocation and
release with its size), so that neither the C library's habits nor Python's objects count. What
exists before (hidden states, weights) is left out; gradients are included. Writes JSON with machine
and versions, and prints a table.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from retort.distill.losses import DacTerm, DivergenceTerm, SpanTerm, chunked_loss, divergence
from retort.distill.losses.dac import DacSettings
from retort.distill.signals import HeadSignal
from retort.provenance import Provenance, write_json


class Data:
    """Hidden states [N, D] and heads of both models; the student's are trained."""

    def __init__(self, tokens, vocab, width):
        torch.manual_seed(0)
        self.heads = [nn.Linear(width, vocab, bias=False) for _ in range(2)]
        self.hidden = [torch.randn(tokens, width) for _ in range(2)]
        self.hidden[0].requires_grad_()
        self.targets = torch.randint(0, vocab, (tokens,))
        self.pairs = torch.rand(tokens) < 0.7

    def forget(self):
        self.hidden[0].grad = self.heads[0].weight.grad = None


def dense(data):
    """Forward KL over whole logits."""
    student = data.heads[0](data.hidden[0])
    with torch.no_grad():
        teacher = data.heads[1](data.hidden[1])
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def trl_loss(data):
    """What TRL's GKD trainer computes of both models' logits."""
    from trl.experimental.gkd import GKDTrainer

    student = data.heads[0](data.hidden[0])
    with torch.no_grad():
        teacher = data.heads[1](data.hidden[1])
    logits = student[None], teacher[None]
    return GKDTrainer.generalized_jsd_loss(*logits, labels=data.targets[None], beta=0)


def retort_loss(data, terms, size, pairs=None):
    signal = HeadSignal(data.hidden[1], data.heads[1])
    sums = chunked_loss(
        data.hidden[0], data.heads[0], data.targets, terms,
        signal=signal, pairs=pairs, chunk_size=size,
    )  # fmt: skip
    return sum(term.mean() for term in sums.values())


def candidates(data):
    kl = [DivergenceTerm(divergence("forward_kl"))]
    mgsr = [DacTerm(DacSettings(mode="fixed")), SpanTerm()]
    made = {
        "dense": lambda: dense(data),
        "retort, all at once": lambda: retort_loss(data, kl, None),
    }
    if find_spec("trl"):
        made["TRL's loss"] = lambda: trl_loss(data)
    for size in (32, 64, 128, 256):
        made[f"chunked, {size}"] = lambda size=size: retort_loss(data, kl, size)
    made["mgsr at once"] = lambda: retort_loss(data, mgsr, None, data.pairs)
    made["mgsr chunked, 64"] = lambda: retort_loss(data, mgsr, 64, data.pairs)
    return made


def step(data, loss):
    data.forget()
    value = loss()
    value.backward()
    return float(value.detach())


def peak_bytes(data, loss):
    """Most bytes that torch held at once above its start, and the events that were seen."""
    data.forget()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss().backward()
    held = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, len(events)


def check(data, made):
    """How far value and gradients are from the chunked loss, relative to the greatest."""

    def ends(name):
        value = torch.tensor(step(data, made[name]))
        return value, data.hidden[0].grad.clone(), data.heads[0].weight.grad.clone()

    chunked, apart = ends("chunked, 64"), {}
    for name in [name for name in ("dense", "TRL's loss") if name in made]:
        pairs = zip(("value", "hidden", "head"), ends(name), chunked, strict=True)
        apart[name] = {k: float((a - b).abs().max() / a.abs().max()) for k, a, b in pairs}
    return apart


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 2048), ("vocab", 49152), ("width", 576), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="*", help="names of candidates; dense ones come with them")
    parser.add_argument("--output", type=Path, default=Path("bench-distill-loss.json"))
    args = parser.parse_args()
    data = Data(args.tokens, args.vocab, args.width)
    made = candidates(data)
    apart = check(data, made)
    if args.only is not None:
        made = {
            n: m
            for n, m in made.items()
            if n in ("dense", "TRL's loss", "mgsr at once", *args.only)
        }
    times = {name: [] for name in made}
    for _ in range(args.repeats):  # all take turns
        for name, loss in made.items():
            started = perf_counter()
            step(data, loss)
            times[name].append(perf_counter() - started)
    peaks = {name: peak_bytes(data, loss)[0] for name, loss in made.items()}
    rows = {n: {"mb": peaks[n] / 1e6, "seconds": median(times[n])} for n in made}
    record = Provenance.collect({**vars(args), "output": None}).to_dict() | {"command": []}
    write_json(args.output, {"provenance": record, "apart": apart, "rows": rows})
    for name, far in apart.items():
        print(f"chunked from {name}, relative:", {k: f"{v:.1e}" for k, v in far.items()})
    for name, row in rows.items():
        base = rows["mgsr at once" if name.startswith("mgsr") else "dense"]
        share, seconds = base["mb"] / row["mb"], row["seconds"]
        print(f"{name:20}{row['mb']:8.0f} MB  1/{share:4.1f}  {seconds:6.2f} s")


if __name__ == "__main__":
    main()
