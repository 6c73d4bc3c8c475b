"""Arguments of ``retort bench decode``; light, so that its help answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The arguments and their help."""
    made = argparse.ArgumentParser(
        prog="retort bench decode", description="Decoding speed of many arms, in turns."
    )
    add = made.add_argument
    add("--prompts", required=True, type=Path, help="JSONL with `prompt`, `category`")
    add("--category", nargs="+", help="use the prompts of these categories, one after the other")
    add("--model", default="smollm2-135m-instruct", help="zoo name, hub id or folder")
    add("--draft-model", help="of the arms 'draft model': zoo name, hub id or folder")
    add("--arms", nargs="+", default=["plain", "auto"], metavar="ARM", help="see docs/speed.md")
    add("--batch-sizes", nargs="+", type=_positive, default=[1, 4, 8, 16])
    add(
        "--num-prompts", nargs="+", type=_positive,
        help="prompts decoded at each batch size, through as many places; default the size itself",
    )  # fmt: skip
    add("--prompt-tokens", type=_positive, default=400, help="longest prompt")
    add("--max-new-tokens", type=_positive, default=128)
    add("--temperature", type=_temperature, default=0.0, help="draw texts; 0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of drawn texts, which are then equal in all arms")
    add("--repeats", type=_positive, default=5, help="interleaved rounds")
    add("--warmup", type=int, choices=(0, 1, 2), default=1, help="rounds before that do not count")
    add("--keep-prefixes", action="store_true", help="read each prompt once: only decoding counts")
    add("--threads", type=_positive, help="default: all that torch takes")
    add("--openvino", help="Python of an environment with openvino-genai")
    add("--openvino-model", help="the model, exported")
    add("--llama-cpp", help="Python of an environment with llama-cpp-python")
    add("--llama-cpp-model", help="the model as a GGUF file, see bench/peers/to_gguf.py")
    add("--output", type=Path, default=Path("bench-decode.json"))
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 or more")
    return value
