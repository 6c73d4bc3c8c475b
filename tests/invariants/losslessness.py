"""Every cell of the greedy losslessness table, and the command that fills it:

    OMP_NUM_THREADS=1 python -m tests.invariants.losslessness [--limit SECONDS]

Model × dtype × batch × draft length × draft pattern: the engine's tokens must be those of the
reference, which decodes one row at a time and never speculates. Drafts must have been made, and
accepted where the pattern says so, so that equality is not vacuous. The result is written to
docs/results/d19.json.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from retort.decode.engine import Engine
from retort.decode.params import SamplingParams
from retort.provenance import Provenance, write_json
from tests.decode.toys import reference, toy
from tests.models import mambas, retnets

RESULT = Path(__file__).resolve().parents[2] / "docs" / "results" / "d19.json"

MODELS = ("llama", "retnet", "dense_retnet", "dense_mamba")  # retnet: dense connections off
DTYPES = ("float32", "float64")
BATCHES = (1, 3, 8)
LENGTHS = (0, 1, 4, 8, "random")
PATTERNS = (
    "all accepted",
    "all rejected",
    "random",
    "none on some steps",
    "end inside a block",
    "limit inside a block",
    "rows join and leave",
    "slots reused",
)
AXES = (MODELS, DTYPES, BATCHES, LENGTHS, PATTERNS)
SIZES = (5, 11, 3, 14, 7, 2, 9, 6, 4, 8)
ROWS = {1: 3, 3: 6, 8: 10}  # requests of a cell, so that some always wait
NEW, VOCAB = 17, 31


@dataclass(frozen=True)
class Cell:
    """One place of the table."""

    model: str
    dtype: str
    batch: int
    k: int | str
    pattern: str

    @property
    def rejecting(self) -> bool:
        """No draft of this cell may be accepted."""
        return self.pattern == "all rejected"


def every_cell() -> list[Cell]:
    """The whole table."""
    return [Cell(*values) for values in itertools.product(*AXES)]


def pairwise(seed: int = 0) -> list[Cell]:
    """Few cells in which any two values of any two axes meet (greedy choice)."""
    dice = random.Random(seed)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(AXES)), 2)
        for x, y in itertools.product(AXES[a], AXES[b])
    }
    chosen = []
    while missing:
        a, x, b, y = min(missing, key=str)
        rows = [[dice.choice(axis) for axis in AXES] for _ in range(40)]
        for row in rows:
            row[a], row[b] = x, y
        best = max(rows, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        chosen.append(Cell(*best))
    return chosen


def _pairs(row):
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(AXES)), 2)}


@cache
def model(name: str, dtype: str):
    """A toy model in evaluation mode."""
    kind = getattr(torch, dtype)
    if name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        return toy(dtype=kind, vocab_size=VOCAB, eos_token_id=None, head_dim=16, **sizes)
    if name == "retnet":
        return retnets.tiny(dtype=kind, dense_block_layers=0)
    return {"dense_retnet": retnets, "dense_mamba": mambas}[name].tiny(dtype=kind)


@cache
def texts(name: str, dtype: str) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what the reference says after each."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() * 2 for n in SIZES]
    return [(p, _reference(name, dtype, p)) for p in prompts]


@torch.no_grad()
def _reference(name: str, dtype: str, prompt: list[int]) -> list[int]:
    """transformers' generate; our own models are read anew, without a cache, for each token."""
    if name == "llama":
        return reference(model(name, dtype), prompt, max_new_tokens=NEW)
    tokens = list(prompt)
    for _ in range(NEW):
        logits = model(name, dtype)(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


class Script:
    """Drafts as the pattern of a cell says."""

    passes = False

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.dice = random.Random(repr(cell))
        self.answers = [p + a + [3] * 9 for p, a in texts(cell.model, cell.dtype)]

    def propose(self, contexts):
        return [self._draft(list(c.tokens), c.limit) for c in contexts]

    def release(self, request_id):
        pass

    def _draft(self, tokens: list[int], limit: int) -> list[int]:
        answer = next(a for a in self.answers if a[: len(tokens)] == tokens)
        right = answer[len(tokens) :][: self._length(limit)]
        if self.cell.rejecting:
            return [(t + 1) % VOCAB for t in right]
        if self.cell.pattern == "random":
            flip = self.dice.randrange(8)
            return [(t + (i == flip)) % VOCAB for i, t in enumerate(right)]
        return right

    def _length(self, limit: int) -> int:
        if self.cell.pattern == "none on some steps" and self.dice.random() < 0.5:
            return 0
        return self.dice.randint(0, limit) if self.cell.k == "random" else limit


def run(cell: Cell, cpu_backend: str = "auto") -> dict:
    """Decode one cell and compare; the record says what was drafted and accepted."""
    pairs = texts(cell.model, cell.dtype)[: ROWS[cell.batch]]
    requests = [_request(cell, i, prompt, answer) for i, (prompt, answer) in enumerate(pairs)]
    k = 8 if cell.k == "random" else cell.k
    slots = max(1, cell.batch - 1) if cell.pattern == "slots reused" else cell.batch
    with Engine(
        model(cell.model, cell.dtype),
        drafter=Script(cell),
        draft_budget=k,
        max_batch_size=slots,
        cpu_backend=cpu_backend,
        debug=True,
    ) as engine:
        got = _decode(engine, cell, requests)
        stats, backend = engine.stats, engine.target.backend.name
    wrong = [i for i, (g, r) in enumerate(zip(got, requests, strict=True)) if g != r[2]]
    return asdict(cell) | {
        "backend": backend,
        "equal": not wrong,
        "wrong_rows": wrong,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "sound": _sound(cell, stats.draft_tokens, stats.accepted_tokens),
    }


def _request(cell: Cell, index: int, prompt: list[int], answer: list[int]) -> tuple:
    """Prompt, options and expected tokens of a row."""
    if cell.pattern == "end inside a block":
        at = next((i for i in range(6, NEW) if answer[i] not in answer[:i]), NEW - 1)
        eos = answer[at]
        return prompt, {"eos_token_id": eos}, answer[: answer.index(eos) + 1]
    if cell.pattern == "limit inside a block":
        new = 6 + index % 4
        return prompt, {"max_new_tokens": new}, answer[:new]
    return prompt, {}, answer


def _decode(engine: Engine, cell: Cell, requests: list[tuple]) -> list[list[int]]:
    joining = cell.pattern == "rows join and leave"
    done, ids, waiting = {}, [], list(requests)
    while waiting or engine.has_unfinished():
        for prompt, options, _ in [waiting.pop(0)] if joining and waiting else waiting:
            params = SamplingParams(**{"max_new_tokens": NEW, "eos_token_id": [], **options})
            ids.append(engine.add_request(prompt, params))
        waiting = waiting if joining else []
        done |= {o.request_id: o.token_ids for o in engine.step()}
    return [done[i] for i in ids]


def _sound(cell: Cell, drafted: int, accepted: int) -> bool:
    if cell.k == 0:
        return drafted == 0
    return drafted > 0 and (accepted == 0) == cell.rejecting


def main() -> int:
    """Run every cell and write the result; exit code 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    options = parser.parse_args()
    started, cells = time.monotonic(), every_cell()
    records = []
    for cell in cells:
        if time.monotonic() - started > options.limit:
            break
        records.append(run(cell))
        print(f"\r{len(records)}/{len(cells)}", end="", file=sys.stderr)
    failed = [r for r in records if not (r["equal"] and r["sound"])]
    write_json(
        RESULT,
        {
            "provenance": Provenance.collect(seeds={"weights": 0, "prompts": 3}).to_dict(),
            "cells": len(cells),
            "run": len(records),
            "failed": failed,
            "draft_tokens": sum(r["draft_tokens"] for r in records),
            "accepted_tokens": sum(r["accepted_tokens"] for r in records),
            "records": [_line(r) for r in records],
        },
    )
    print(f"\n{len(records)} of {len(cells)} cells run, {len(failed)} failed: {RESULT}")
    return 1 if failed or len(records) < len(cells) else 0


def _line(record: dict) -> str:
    place = " ".join(f"{record[a]}" for a in ("model", "dtype", "backend"))
    verdict = "equal" if record["equal"] else "DIFFERS"
    return (
        f"{place} batch={record['batch']} k={record['k']} {record['pattern']}: {verdict}, "
        f"{record['accepted_tokens']} of {record['draft_tokens']} drafts accepted"
    )


if __name__ == "__main__":
    sys.exit(main())
