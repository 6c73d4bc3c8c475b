"""Load on `retort serve`, beside itself without speculation and beside plain transformers.

    retort serve smollm2-135m-instruct --drafter prompt-lookup --port 8000 &
    python bench/peers/transformers_server.py smollm2-135m-instruct --port 8001 &
    python bench/serve.py load spec_bench.jsonl --piece 0 --pieces 10
    python bench/serve.py saturated spec_bench.jsonl --piece 0 --pieces 5
    python bench/serve.py intruder spec_bench.jsonl
    python bench/serve.py table serve-*.json --output docs/results/serve.json

``load`` runs one piece of the requests on every arm in turn, in an order that changes from piece
to piece; each arm has kept prefixes of its own. ``saturated`` sends the requests of a piece all at
once, so that throughput is the server's and not the arrivals'. ``intruder`` lets a long prompt
arrive among streams. ``table`` puts all pieces together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path

import numpy as np

from retort.bench.load import CHAT, Load, Sample, ask, read_prompts, run
from retort.bench.stream import Address
from retort.bench.summary import duration, summarize, token_time
from retort.provenance import Provenance, write_json

OFF = {"speculation": "off"}
SETTLED = 2.0  # seconds after which the streams' own prompts have been read


def main() -> None:
    options = arguments()
    kinds = {"load": load, "saturated": load, "intruder": intruder, "table": table}
    kinds[options.kind](options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["load", "saturated", "intruder", "table"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--peer", help="such as http://127.0.0.1:8001")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=10)
    parser.add_argument("--piece", type=int, default=0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--long-tokens", type=int, default=3000)
    parser.add_argument("--label", default="", help="of the server that the intruder meets")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def load(options: argparse.Namespace) -> None:
    prompts = read_prompts(options.files[0], options.requests)[options.piece :: options.pieces]
    arms = [("speculation", options.url, {}), ("off", options.url, OFF)]
    if options.peer:
        arms.append(("transformers", options.peer, {}))
    rate = options.rate if options.kind == "load" else float("inf")
    turn = options.piece % len(arms)
    found = {}
    for name, url, extra in arms[turn:] + arms[:turn]:
        salt = {"cache_salt": f"{name}-{options.piece}-{time.time_ns()}"}
        asked = Load(prompts, rate, options.max_tokens, extra=extra | salt, seed=options.piece)
        found[name] = asyncio.run(run(Address.parse(url), asked))
        print(options.piece, name, line(summarize(found[name])), flush=True)
    save(options, {name: [vars(s) for s in samples] for name, samples in found.items()})


def intruder(options: argparse.Namespace) -> None:
    """Streams alone, then with a long prompt in their middle; several times in turn."""
    prompts = read_prompts(options.files[0], options.streams)
    words = " ".join(read_prompts(options.files[0])).split()
    rounds = []
    for number in range(options.pieces):
        for with_long in (False, True):
            rounds.append(asyncio.run(among(options, prompts, words, number, with_long)))
            print(json.dumps({k: v for k, v in rounds[-1].items() if k != "samples"}), flush=True)
    save(options, rounds)


async def among(options, prompts, words, number, with_long) -> dict:
    address = Address.parse(options.url)
    extra = {"ignore_eos": True, "cache_salt": f"{number}-{with_long}-{time.time_ns()}", **OFF}
    asked = Load([p[:200] for p in prompts], max_tokens=options.max_tokens, extra=extra)
    start = time.perf_counter()
    streams = asyncio.create_task(run(address, asked))
    long: Sample | None = None
    if with_long:
        await asyncio.sleep(SETTLED)
        text = " ".join(words[number * 97 :][: int(options.long_tokens / 1.35)])
        long = await ask(address, CHAT, {**asked.body(text), "max_tokens": 4}, start)
    samples = await streams
    gaps = _gaps(samples, SETTLED, float("inf"))
    reading = () if long is None else (long.sent, long.sent + (long.first or long.last))
    return {
        "label": options.label,
        "long": with_long,
        "long_prompt_tokens": long.prompt_tokens if long else 0,
        "long_first": long.first if long else None,
        "itl_p50": float(np.percentile(gaps, 50)),
        "itl_p99": float(np.percentile(gaps, 99)),
        "itl_max": max(gaps),
        "during_p99": float(np.percentile(_gaps(samples, *reading), 99)) if reading else None,
        "errors": [s.error for s in [*samples, *([long] if long else [])] if s.error],
    }


def _gaps(samples: list[Sample], start: float, stop: float) -> list[float]:
    """The gaps that ended between two times, in seconds from the run's start."""
    inside = []
    for sample in samples:
        at = sample.sent + (sample.first or 0.0)
        for gap in sample.gaps:
            at += gap
            if start <= at <= stop:
                inside.append(gap)
    return inside


def save(options: argparse.Namespace, found) -> None:
    record = Provenance.collect(
        {k: v for k, v in vars(options).items() if k not in ("files", "output")}
    ).to_dict()
    record["command"] = record["command"][:2]
    name = options.output or Path(f"serve-{options.kind}-{options.piece}.json")
    write_json(name, {"kind": options.kind, "provenance": record, "found": found})


def table(options: argparse.Namespace) -> None:
    pieces = [json.loads(file.read_text("utf-8")) for file in options.files]
    result = {"provenance": [p["provenance"] for p in pieces], "intruder": []}
    for kind in ("load", "saturated"):
        result[kind] = together([p["found"] for p in pieces if p["kind"] == kind])
    for found in (p["found"] for p in pieces if p["kind"] == "intruder"):
        result["intruder"] += found
    if options.output:
        write_json(options.output, result)


def together(loads: list[dict]) -> dict[str, dict]:
    """The numbers of each arm over all pieces; prints them as a table."""
    arms = {}
    print(
        "| arm | requests | tokens/s | TTFT p50 | p99 | ITL p50 | p99 | a token p50 | p99 "
        "| accepted |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in loads[0] if loads else []:
        parts = [[Sample(**s) for s in found[name]] for found in loads]
        summary = summarize([s for part in parts for s in part], sum(map(duration, parts)))
        equal = sum(
            ours["text"] == theirs["text"]
            for found in loads
            for ours, theirs in zip(found[name], found["off"], strict=True)
        )
        seconds = [round(duration(part), 2) for part in parts]
        arms[name] = {**summary.as_dict(), "texts_as_off": equal, "seconds_of_pieces": seconds}
        arms[name]["token_time_by_off"] = by_off(loads, name)
        print(f"| {name} {line(summary)}")
    return arms


def by_off(loads: list[dict], name: str) -> dict[str, float]:
    """Percentiles over the requests of an arm's time a token by that of the same request in off."""
    ratios = [
        token_time(Sample(**ours)) / token_time(Sample(**theirs))
        for found in loads
        for ours, theirs in zip(found[name], found["off"], strict=True)
        if ours["tokens"] > 1 and not ours["error"] and not theirs["error"]
    ]
    return {f"p{q}": round(float(np.percentile(ratios, q)), 3) for q in (10, 50, 90)}


def line(s) -> str:
    latencies = " ".join(f"| {q.p50:.0f} | {q.p99:.0f}" for q in (s.ttft, s.itl, s.tpot))
    accepted = "" if s.acceptance is None else f"{s.accepted_tokens} / {s.draft_tokens}"
    return f"| {s.requests - s.failed} | {s.output_throughput:.1f} {latencies} | {accepted} |"


if __name__ == "__main__":
    main()
