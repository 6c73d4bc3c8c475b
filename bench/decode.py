"""Decoding speed: greedy, padded, unpadded, with prompt lookup, beside transformers and OpenVINO.

    python bench/decode.py --prompts spec_bench.jsonl --category summarization --batch-sizes 1 4 8

Writes a JSON file with machine, versions and memory bandwidth, and prints a table. ``--openvino``
names the Python of an environment with openvino-genai, ``--openvino-model`` the exported model
(see bench/peers).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from retort.decode.engine import Engine
from retort.decode.padded import PaddedEngine
from retort.evaluate.decoding import Measurement, compare, engine_arm
from retort.models import zoo
from retort.provenance import Provenance, write_json

LOOKUP = "prompt-lookup"
ENGINES = {
    "plain": (Engine, {}),
    "plain fp32 weights": (Engine, {"weight_storage": "float32"}),
    "plain torch": (Engine, {"cpu_backend": "torch"}),
    "auto": (Engine, {"drafter": LOOKUP}),
    "unpadded k=7": (Engine, {"drafter": LOOKUP, "draft_budget": 7}),
    # The padded method runs layer by layer in PyTorch: this is the arm that differs in padding only
    "unpadded k=7 unfused": (
        Engine,
        {"drafter": LOOKUP, "draft_budget": 7, "fuse_layers": False},
    ),
    "padded k=7": (PaddedEngine, {"drafter": LOOKUP, "draft_budget": 7}),
    "padded cache only": (
        PaddedEngine,
        {"drafter": LOOKUP, "draft_budget": 7, "pad_input": False},
    ),
    "padded input only": (
        PaddedEngine,
        {"drafter": LOOKUP, "draft_budget": 7, "pad_cache": False},
    ),
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    tokenizer = zoo.load_tokenizer(options.model)
    prompts = load_prompts(options, tokenizer)
    load = partial(zoo.load_model, options.model, dtype="float32")
    engines = {name: make(load(), name, options) for name in options.arms if name in ENGINES}
    arms = {name: engine_arm(engine) for name, engine in engines.items()}
    if "transformers" in options.arms:
        arms["transformers"] = transformers_arm(load())
    if options.openvino:
        arms |= {f"openvino {mode}": openvino_arm(options, mode) for mode in ("plain", "lookup")}
    results = []
    for size in options.batch_sizes:
        probe = bandwidth()
        print(f"batch {size}, bandwidth {probe:.0f} GB/s", file=sys.stderr)
        for result in compare(arms, prompts[:size], options.max_new_tokens, options.repeats):
            results.append(result.as_dict() | {"bandwidth": probe})
            print(line(result), flush=True)
    record = Provenance.collect(vars(options)).to_dict()
    write_json(options.output, {"provenance": record, "results": results})
    for engine in reversed(engines.values()):
        engine.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", required=True, help="JSONL with `prompt`, `category`")
    parser.add_argument("--category", help="use the prompts of this category only")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--arms", nargs="+", default=["plain", "auto"], metavar="ARM")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=400, help="longest prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--openvino", help="Python of an environment with openvino-genai")
    parser.add_argument("--openvino-model", help="the model, exported")
    parser.add_argument("--output", type=Path, default=Path("bench-decode.json"))
    return parser.parse_args()


def load_prompts(options: argparse.Namespace, tokenizer) -> list[list[int]]:
    rows = [json.loads(text) for text in Path(options.prompts).read_text("utf-8").splitlines()]
    chosen = [r for r in rows if options.category in (None, r.get("category"))]
    ids = [chat(tokenizer, row["prompt"], options.prompt_tokens) for row in chosen]
    return ids[: max(options.batch_sizes)]


def chat(tokenizer, text: str, limit: int) -> list[int]:
    """Through the chat template; a text that is too long loses its end."""
    room = limit - len(template(tokenizer, ""))
    cut = tokenizer.decode(tokenizer(text).input_ids[:room])
    return template(tokenizer, cut)


def template(tokenizer, text: str) -> list[int]:
    message = [{"role": "user", "content": text}]
    made = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(made["input_ids"])


def make(model, name: str, options: argparse.Namespace) -> Engine:
    engine_class, extra = ENGINES[name]
    size = max(options.batch_sizes)
    given = {"max_batch_size": size, "release_weights": True, **extra}
    return engine_class(model, **given)


def transformers_arm(model):
    """`model.generate` on the left-padded batch; decoding time is total less a one-token call."""

    def run(prompts, max_new_tokens):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        first = timed(model, ids, mask, 1)[1]
        out, total = timed(model, ids, mask, max_new_tokens)
        rows = [cut(row.tolist(), model) for row in out[:, width:]]
        return Measurement(rows, sum(map(len, rows)) - len(rows), total - first, total)

    return run


def openvino_arm(options: argparse.Namespace, mode: str):
    """OpenVINO GenAI in a process of its own, which stays up between repeats."""
    script = str(Path(__file__).parent / "peers" / "openvino_genai_decode.py")
    command = [options.openvino, script, options.openvino_model, str(options.threads), mode]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print("peer:", peer.stdout.readline().strip(), file=sys.stderr)

    def run(prompts, max_new_tokens):
        request = {"prompts": list(map(list, prompts)), "max_new_tokens": max_new_tokens}
        peer.stdin.write(json.dumps(request) + "\n")
        peer.stdin.flush()
        return Measurement(**json.loads(peer.stdout.readline()))

    return run


def timed(model, ids, mask, new):
    started = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return out, time.perf_counter() - started


def cut(row: list[int], model) -> list[int]:
    eos = model.generation_config.eos_token_id
    stops = {eos} if isinstance(eos, int) else set(eos)
    return next((row[: i + 1] for i, t in enumerate(row) if t in stops), row)


def bandwidth(megabytes: int = 512) -> float:
    """GB/s of reading memory once, best of three."""
    data = torch.ones(megabytes * 2**18)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def line(result) -> str:
    return (
        f"{result.batch_size:3} {result.arm:18} {result.tokens_per_second:7.1f} tokens/s "
        f"{result.tokens_per_step:5.2f} a step  ratio {result.ratio:.2f} "
        f"[{result.ratio_low:.2f}, {result.ratio_high:.2f}]  padding {result.padding_share:4.0%}  "
        f"accepted {result.accepted_tokens}/{result.draft_tokens}  equal {result.equal_to_plain}"
    )


if __name__ == "__main__":
    main()
