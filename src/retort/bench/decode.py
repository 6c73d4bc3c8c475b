"""Decoding speed: greedy, padded, unpadded, with prompt lookup, and beside other engines.

    retort bench decode --prompts spec_bench.jsonl --category summarization --batch-sizes 1 4 8

Writes a JSON file with machine, versions and memory bandwidth after every batch size, an HTML page
beside it, and prints a line an arm. ``--openvino`` names the Python of an environment with
openvino-genai, ``--openvino-model`` the exported model; ``--llama-cpp`` and ``--llama-cpp-model``
one with llama-cpp-python and a GGUF (see `retort.bench.peers`).
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retort.bench.arms import (
    ARMS,
    ENGINES,
    build_engine,
    drafts_by_model,
    transformers_arm,
    weights_of,
)
from retort.bench.decode_page import page
from retort.bench.peers.process import PEERS, Peer, check, peer_arms
from retort.errors import ConfigurationError
from retort.evaluate.decoding import Arm, ArmResult, compare, engine_arm
from retort.models import zoo
from retort.provenance import Provenance, write_json, write_text
from retort.train.rows import read_jsonl

Prompts = list[list[int]]


def run(options: Namespace) -> None:
    """Measure all arms and write the results.

    Args:
        options: see `retort.bench.decode_options`.

    Raises:
        ConfigurationError: an arm or a peer that does not exist, or a file without fitting prompts.
    """
    for peer in PEERS:
        check(peer, *_where(peer, options))
    options.num_prompts = _counts(options)
    options.threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(options.threads)
    tokenizer = zoo.load_tokenizer(options.model)
    sets = {c: _prompts(options, tokenizer, c) for c in options.category or [None]}
    record = _record(options)
    arms, peers = _arms(options), _peers(options)
    arms |= {name: arm for name, (arm, _) in peers.items()}
    told = {"provenance": record, "peers": {name: how for name, (_, how) in peers.items()}}
    results: list[dict[str, Any]] = []
    for row in _rows(arms, sets, options):
        results.append(row)
        write_json(options.output, told | {"results": results})
    write_text(options.output.with_suffix(".html"), page(results, told["peers"]))


def _record(options: Namespace) -> dict[str, Any]:
    """What produced the numbers; files by their names, since nobody else has these folders."""
    record = Provenance.collect(vars(options)).to_dict()
    record["arguments"] = {name: _bare(value) for name, value in record["arguments"].items()}
    record["command"] = [_bare(word) for word in record["command"]]
    return record


def _bare(value: Any) -> Any:
    """A path's last part; of ``--flag=PATH`` too. What is no path stays as it is."""
    if isinstance(value, Path):
        return value.name
    flag, equals, path = value.rpartition("=") if isinstance(value, str) else ("", "", "")
    return f"{flag}{equals}{Path(path).name}" if Path(path).is_absolute() else value


def _arms(options: Namespace) -> dict[str, Arm]:
    unknown = sorted(set(options.arms) - set(ARMS))
    if unknown:
        raise ConfigurationError(f"--arms {', '.join(unknown)}: choose from {', '.join(ARMS)}")
    drafted = any(map(drafts_by_model, options.arms))
    if drafted and not options.draft_model:
        raise ConfigurationError("--arms 'draft model' needs --draft-model: which one drafts?")
    drafts = zoo.load_model(options.draft_model, dtype="float32") if drafted else None
    sampling = _sampling(options)
    load = partial(zoo.load_model, options.model, dtype="float32")
    size = max(options.batch_sizes)
    kept = 4 * max(options.num_prompts) * options.prompt_tokens if options.keep_prefixes else 0
    models: dict[tuple, Any] = {}
    arms: dict[str, Arm] = {}
    for name in options.arms:
        if name in ENGINES:
            kind = weights_of(name)
            if kind not in models:
                models[kind] = load()
            engine = build_engine(models[kind], name, size, kept, drafts)
            arms[name] = engine_arm(engine, **sampling)
        else:
            arms[name] = transformers_arm(load(), name)
    return arms


def _sampling(options: Namespace) -> dict[str, Any]:
    """What every request asks for; drawn texts are equal in all of our arms, and in no other."""
    if not options.temperature:
        return {}
    peers = any(_where(peer, options)[0] for peer in PEERS)
    if peers or set(options.arms) - set(ENGINES):
        raise ConfigurationError(
            f"--temperature {options.temperature} compares arms of Retort, since other engines "
            "draw other texts: leave them out, or leave --temperature out"
        )
    chosen = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
    return {"do_sample": True, **chosen}


def _peers(options: Namespace) -> dict[str, tuple[Arm, dict[str, Any]]]:
    """Engines in processes of their own, with their settings."""
    arms: dict[str, tuple[Arm, dict[str, Any]]] = {}
    for peer in PEERS:
        python, model = _where(peer, options)
        if python and model:
            arms |= peer_arms(peer, python, model, options.threads)
    return arms


def _where(peer: Peer, options: Namespace) -> tuple[str | None, str | None]:
    """The peer's Python and model, as the command line has them."""
    name = peer.flag.lstrip("-").replace("-", "_")
    return getattr(options, name), getattr(options, f"{name}_model")


def _rows(
    arms: dict[str, Arm], sets: dict[str | None, Prompts], options: Namespace
) -> Iterator[dict[str, Any]]:
    for category, prompts in sets.items():
        for size, count in zip(options.batch_sizes, options.num_prompts, strict=True):
            probe = bandwidth()
            print(f"{category or 'all'}, batch {size}, {probe:.0f} GB/s", file=sys.stderr)
            told = {"category": category, "bandwidth": probe}
            how = (options.max_new_tokens, options.repeats, options.warmup, size)
            for result in compare(arms, prompts[:count], *how):
                print(_line(result), flush=True)
                yield result.as_dict() | told


def _counts(options: Namespace) -> list[int]:
    """How many prompts to decode at each batch size."""
    sizes, counts = options.batch_sizes, options.num_prompts or options.batch_sizes
    if len(counts) == 1:
        counts = counts * len(sizes)
    if len(counts) != len(sizes) or any(n < size for n, size in zip(counts, sizes, strict=True)):
        raise ConfigurationError(
            "--num-prompts takes one number, or one for each of --batch-sizes and none below it"
        )
    return list(counts)


def _prompts(options: Namespace, tokenizer: Any, category: str | None) -> Prompts:
    rows = read_jsonl(options.prompts)
    chosen = [r for r in rows if category in (None, r.get("category"))]
    if not chosen:
        known = sorted({str(r.get("category")) for r in rows})
        raise ConfigurationError(
            f"{options.prompts} has no prompts of category {category!r}; it has {', '.join(known)}"
        )
    count = max(options.num_prompts)
    if len(chosen) < count:
        raise ConfigurationError(
            f"{options.prompts} has {len(chosen)} prompts of category {category!r} and {count} are "
            "asked for: lower --batch-sizes or --num-prompts"
        )
    return [_chat(tokenizer, _text(options, row), options.prompt_tokens) for row in chosen[:count]]


def _text(options: Namespace, row: dict[str, Any]) -> str:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ConfigurationError(f"{options.prompts}: a row has no `prompt` of text")
    return prompt


def _chat(tokenizer: Any, text: str, limit: int) -> list[int]:
    """Through the chat template; a text that is too long loses its end."""
    room = limit - len(_template(tokenizer, ""))
    if room < 1:
        raise ConfigurationError(
            f"--prompt-tokens {limit} leaves no room: the chat template alone has {limit - room}"
        )
    return _template(tokenizer, tokenizer.decode(tokenizer(text).input_ids[:room]))


def _template(tokenizer: Any, text: str) -> list[int]:
    message = [{"role": "user", "content": text}]
    made = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(made["input_ids"])


def bandwidth(megabytes: int = 512) -> float:
    """GB/s of reading memory once, best of three."""
    data = torch.ones(megabytes * 2**18)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def _line(result: ArmResult) -> str:
    return (
        f"{result.batch_size:3} {result.arm:22} {result.tokens_per_second:7.1f} tokens/s "
        f"{result.tokens_per_step:5.2f} a step  ratio {result.ratio:.2f} "
        f"[{result.ratio_low:.2f}, {result.ratio_high:.2f}]  padding {result.padding_share:4.0%}  "
        f"accepted {result.accepted_tokens}/{result.draft_tokens} "
        f"on {result.drafted_rows}/{result.prompts} rows  "
        f"prompts {result.prefill_seconds:.2f} s  equal {result.equal_to_plain}"
    )
