"""Where a decode step's time goes: the engine's own work, and the parts of the forward.

    python bench/step.py --batch-sizes 1 4 8 16 --output bench-step.json

Random prompts of 100 tokens, plain decoding and prompt lookup with up to 7 drafts; the parts are
timed by wrapping the engine's and the model's functions, so that they contain a little of the
clock's own time. Medians over the steps, milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

from retort.decode.engine import Engine
from retort.models import zoo
from retort.provenance import Provenance, write_json

PARTS = ("schedule", "draft", "forward", "verify and emit")
INSIDE = ("embedding", "layers", "last norm", "head")


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
    results = []
    for size in options.batch_sizes:
        for drafter in (None, "prompt-lookup"):
            results.append(measure(options, size, drafter))
            print(line(results[-1]), flush=True)
    record = Provenance.collect(vars(options)).to_dict()
    write_json(options.output, {"provenance": record, "results": results})


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("bench-step.json"))
    return parser.parse_args()


def measure(options, size, drafter):
    model = zoo.load_model(options.model, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (size, 50), generator=generator)
    prompts = torch.cat((prompts, prompts), 1).tolist()  # so that lookup finds something
    with Engine(model, drafter=drafter, max_batch_size=size, draft_budget=7) as engine:
        clock = watched(engine, model)
        for prompt in prompts:
            engine.add_request(prompt, params(options.new_tokens))
        while not running(engine) or not all(r.decoding for r in running(engine)):
            engine.step()
        while engine.has_unfinished() and len(running(engine)) == size:
            clock.step(engine)
    return {"batch_size": size, "drafter": drafter} | summary(clock.steps[4:])


def watched(engine, model):
    clock = Clock()
    clock.wrap(engine._step, "schedule", "schedule")
    clock.wrap(engine.drafting, "propose", "draft")
    clock.wrap(engine.target, "forward", "forward")
    clock.wrap(engine._step, "accept", "verify and emit")
    inner = model.model
    for part, modules in {
        "embedding": [inner.embed_tokens],
        "layers": inner.layers,
        "last norm": [inner.norm],
        "head": [model.lm_head],
    }.items():
        for module in modules:
            clock.wrap(module, "forward", part)
    return clock


def params(new):
    from retort.decode.request import SamplingParams

    return SamplingParams(max_new_tokens=new, ignore_eos=True)


def running(engine):
    return engine.scheduler.running


def summary(steps):
    """Median milliseconds of each part; ``outside`` is all but the forward."""
    out = {p: 1000 * median(s.get(p, 0.0) for s in steps) for p in ("step", *PARTS, *INSIDE)}
    out["outside"] = 1000 * median(s["step"] - s.get("forward", 0.0) for s in steps)
    return {"steps": len(steps), "milliseconds": out}


def line(row):
    ms = row["milliseconds"]
    parts = "  ".join(f"{name} {ms[name]:.2f}" for name in ("step", "outside", *PARTS, *INSIDE))
    return f"batch {row['batch_size']:2} {row['drafter'] or 'plain':14} {parts}"


if __name__ == "__main__":
    main()
