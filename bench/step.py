"""Where a decode step's time goes: the engine's own work, and the parts of the forward.

    python bench/step.py --batch-sizes 1 4 8 16 --output bench-step.json

Random prompts of 100 tokens, plain decoding and prompt lookup with up to 7 drafts; the parts are
timed by wrapping the engine's and the model's functions, so that they contain a little of the
clock's own time. Medians over the steps, milliseconds.

One native call runs all decoder layers, and no clock looks into it. Where the forward's own time
goes is therefore measured on the model's own modules (``fuse_layers=False``), plain decoding: the
same kernels, one call each. What is no kernel of these is "the rest": calls and PyTorch's own work.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from retort.decode import head
from retort.decode.engine import Engine
from retort.models import zoo
from retort.provenance import Provenance, write_json

PARTS = ("schedule", "draft", "forward", "verify and emit")
KERNELS = {
    "query, key, value": ("q_proj", "k_proj", "v_proj"),
    "attention out": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "norms": ("input_layernorm", "post_attention_layernorm", "norm"),
    "activation": ("act_fn",),
}


class Clock:
    """Seconds of wrapped calls, step by step."""

    def __init__(self):
        self.steps = []
        self.now = defaultdict(float)

    def wrap(self, owner, name, part):
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.now[part] += time.perf_counter() - started

        setattr(owner, name, timed)

    def step(self, engine):
        self.now = defaultdict(float)
        started = time.perf_counter()
        engine.step()
        self.now["step"] = time.perf_counter() - started
        self.steps.append(dict(self.now))


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    results, forwards = [], []
    for size in options.batch_sizes:
        for drafter in (None, "prompt-lookup"):
            results.append(measure(options, size, drafter))
            print(line(results[-1]), flush=True)
        forwards.append(measure_forward(options, size))
        print(line(forwards[-1]), flush=True)
    record = Provenance.collect({**vars(options), "output": None}).to_dict() | {"command": []}
    write_json(options.output, {"provenance": record, "results": results, "forward": forwards})


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("bench-step.json"))
    return parser.parse_args()


def measure(options, size, drafter):
    """The engine's parts of a step."""
    model = zoo.load_model(options.model, dtype="float32")
    with Engine(model, drafter=drafter, max_batch_size=size, draft_budget=7) as engine:
        clock = Clock()
        clock.wrap(engine._step, "schedule", "schedule")
        clock.wrap(engine.drafting, "propose", "draft")
        clock.wrap(engine.target, "forward", "forward")
        clock.wrap(engine._step, "accept", "verify and emit")
        steps = decode(engine, clock, size, options.new_tokens)
    rest = {"outside": [s["step"] - s.get("forward", 0.0) for s in steps]}
    return {"batch_size": size, "drafter": drafter} | summary(steps, ("step", *PARTS), rest)


def measure_forward(options, size):
    """The forward's parts, in plain decoding on the model's own modules."""
    model = zoo.load_model(options.model, dtype="float32")
    with Engine(model, max_batch_size=size, fuse_layers=False) as engine, unwrapped() as clock:
        clock.wrap(engine.target, "forward", "forward")
        clock.wrap(engine.target.cache, "attend", "attention")
        clock.wrap(head, "packed_argmax", "head")
        part_of = {module: part for part, modules in KERNELS.items() for module in modules}
        for name, module in model.named_modules():
            if (part := part_of.get(name.split(".")[-1])) is not None:
                clock.wrap(module, "forward", part)
        steps = decode(engine, clock, size, options.new_tokens)
    parts = (*KERNELS, "attention", "head")
    rest = {"the rest": [s["forward"] - sum(s[p] for p in parts) for s in steps]}
    return {"batch_size": size} | summary(steps, ("forward", *parts), rest)


@contextmanager
def unwrapped():
    """A clock whose wrappers around what outlives an engine go with it."""
    inner = head.packed_argmax
    try:
        yield Clock()
    finally:
        head.packed_argmax = inner


def decode(engine, clock, size, new):
    """Timed steps in which all rows decode; the first few warm up."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (size, 50), generator=generator)
    prompts = torch.cat((prompts, prompts), 1).tolist()  # so that lookup finds something
    for prompt in prompts:
        engine.add_request(prompt, params(new))
    while not running(engine) or not all(r.decoding for r in running(engine)):
        engine.step()
    while engine.has_unfinished() and len(running(engine)) == size:
        clock.step(engine)
    return clock.steps[4:]


def params(new):
    from retort.decode.params import SamplingParams

    return SamplingParams(max_new_tokens=new, ignore_eos=True)


def running(engine):
    return engine.scheduler.running


def summary(steps, parts, rest):
    """Median milliseconds of each part, and of what ``rest`` adds."""
    out = {p: 1000 * median(s.get(p, 0.0) for s in steps) for p in parts}
    out |= {name: 1000 * median(seconds) for name, seconds in rest.items()}
    return {"steps": len(steps), "milliseconds": out}


def line(row):
    parts = "  ".join(f"{name} {ms:.2f}" for name, ms in row["milliseconds"].items())
    return f"batch {row['batch_size']:2} {row.get('drafter') or 'plain':14} {parts}"


if __name__ == "__main__":
    main()
