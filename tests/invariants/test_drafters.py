"""FAULTS D19 with DenseSSM models as the *drafter*: the target's tokens in every pattern.

The drafter reads, drafts and is rewound with a row cache of its own, whose spare storage is
filled with NaN before each of its calls. Targets are a transformer and both DenseSSM models.

All cells, or a random sample of them where time is short, into docs/results/drafters.json:

    OMP_NUM_THREADS=1 python -m tests.invariants.test_drafters [--cells N] [--limit SECONDS]
"""

import argparse
import itertools
import random
import sys
import time
from dataclasses import replace

import pytest
import torch

from retort.decode.drafter import ModelDrafter
from retort.decode.engine import Engine
from retort.provenance import Provenance, write_json
from tests.invariants.losslessness import BATCHES, RESULT, Cell, _decode, _request, model, texts
from tests.models import mambas, retnets

DRAFTERS = {"dense_retnet": retnets.tiny, "dense_mamba": mambas.tiny}
TARGETS = ("llama", "dense_retnet", "dense_mamba")
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
K = (1, 4, 8, "random")


class Drafter(ModelDrafter):
    """A model that drafts; its choices bend to what a pattern wants, its cache does not."""

    def __init__(self, name, cell, requests):
        super().__init__(self._model(name, cell), max_draft=8)
        self.cell, self.dice = cell, random.Random(repr(cell))
        self.rows = [prompt + answer for prompt, _, answer in requests]
        self.reads = self.behind = 0  # behind: tokens drafted behind a row's end

    @staticmethod
    def _model(name, cell):
        dtype = getattr(torch, cell.dtype)
        return DRAFTERS[name](seed=0 if name == cell.model else 1, dtype=dtype)

    def propose(self, contexts):
        self.packed.cache.check()
        self.packed.cache.poison()
        cut = [self._limited(context) for context in contexts]
        drafts = super().propose(cut)
        for draft, context in zip(drafts, cut, strict=True):
            assert len(draft.tokens) == context.limit
            answer = self._answer(list(context.tokens))
            self.behind += max(0, len(draft.tokens) - len(answer))
            if self.cell.pattern == "all rejected":
                draft.tokens[:] = [(t + 1) % 31 if t == a else t
                                   for t, a in zip(draft.tokens, answer, strict=False)]  # fmt: skip
        return drafts

    def _limited(self, context):
        limit = context.limit
        if self.cell.pattern == "none on some steps" and self.dice.random() < 0.5:
            limit = 0
        elif self.cell.k == "random":
            limit = self.dice.randint(0, limit)
        if self.cell.pattern == "all rejected":
            limit = min(limit, len(self._answer(list(context.tokens))))
        return replace(context, limit=limit)

    def _answer(self, tokens):
        """What the row still gains after these."""
        whole = next(row for row in self.rows if row[: len(tokens)] == tokens)
        return whole[len(tokens) :]

    def _forward(self, ids, feeds):
        logits = super()._forward(ids, feeds)
        assert logits.isfinite().all()
        self.reads += 1
        return logits


def check(name, cell):
    pairs = texts(cell.model, cell.dtype)
    requests = [_request(cell, i, prompt, answer) for i, (prompt, answer) in enumerate(pairs)]
    slots = max(1, cell.batch - 1) if cell.pattern == "slots reused" else cell.batch
    drafter = Drafter(name, cell, requests)
    with Engine(
        model(cell.model, cell.dtype),
        drafter=drafter,
        draft_budget=8 if cell.k == "random" else cell.k,
        max_batch_size=slots,
        debug=True,
    ) as engine:
        got = _decode(engine, cell, requests)
        drafted, accepted = engine.stats.draft_tokens, engine.stats.accepted_tokens
    assert got == [answer for *_, answer in requests]
    assert drafter.reads and drafted > 0
    if cell.pattern == "all rejected":
        assert accepted == 0
    if cell.pattern != "end inside a block":
        assert drafter.behind == 0  # a row's limit is known before it is drafted for
    if name == cell.model and cell.pattern != "all rejected":
        # It is its own drafter: all that it drafts stands, but for what lies behind a row's end.
        assert accepted == drafted - drafter.behind > 0
    drafter.packed.cache.check()
    assert not drafter.packed.cache.rows


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_never_changes_a_token(name, pattern):
    """Every pattern; targets, batches and draft lengths take turns."""
    at = PATTERNS.index(pattern) + 2 * list(DRAFTERS).index(name)
    check(name, Cell(TARGETS[at % 3], "float64", BATCHES[at // 2 % 3], K[at % 4], pattern))


EVERY = list(itertools.product(TARGETS, ("float32", "float64"), BATCHES, K, PATTERNS))


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("axes", EVERY, ids=str)
def test_every_cell(name, axes):
    check(name, Cell(*axes))


def main() -> int:
    """Check cells in random order until they or the time are through; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    begun = time.monotonic()
    a = parser.parse_args()
    cells = list(itertools.product(DRAFTERS, EVERY))
    random.Random(0).shuffle(cells)
    run, failed = [], []
    for name, axes in cells[: a.cells]:
        if time.monotonic() - begun > a.limit:
            break
        run.append(" ".join(map(str, (name, "drafts for", *axes))))
        try:
            check(name, Cell(*axes))
        except Exception as error:
            failed.append(f"{run[-1]}: {error!r}")
    facts = {"cells": len(cells), "run": len(run), "cpu_seconds": round(time.process_time())}
    record = {"provenance": Provenance.collect(seeds={"order": 0}).to_dict(), **facts}
    write_json(RESULT.with_name("drafters.json"), record | {"failed": failed, "records": run})
    print(f"{len(run)} of {len(cells)} cells run, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
