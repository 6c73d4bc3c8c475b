"""FAULTS D19 with DenseSSM models as the *drafter*: the target's tokens in every pattern.

The drafter reads, drafts and is rewound with a row cache of its own, whose spare storage is
filled with NaN before each of its calls. Targets are a transformer and both DenseSSM models.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from retort.decode.drafter import ModelDrafter
from retort.decode.engine import Engine
from tests.invariants.losslessness import BATCHES, Cell, _decode, _request, model, texts
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

    def __init__(self, name, cell):
        super().__init__(self._model(name, cell), max_draft=8)
        self.cell, self.dice = cell, random.Random(repr(cell))
        self.reads = 0

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
            if self.cell.pattern == "all rejected":
                answer = self._answer(list(context.tokens))
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
        pairs = texts(self.cell.model, self.cell.dtype)
        whole = next(p + a for p, a in pairs if (p + a)[: len(tokens)] == tokens)
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
    drafter = Drafter(name, cell)
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
    if name == cell.model:  # it is its own drafter: all that it drafts stands, but for the ends
        assert cell.pattern == "all rejected" or accepted > 0.5 * drafted
    drafter.packed.cache.check()
    assert not drafter.packed.cache.rows


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_never_changes_a_token(name, pattern):
    """Every pattern; targets, batches and draft lengths take turns."""
    at = PATTERNS.index(pattern) + 2 * list(DRAFTERS).index(name)
    check(name, Cell(TARGETS[at % 3], "float64", BATCHES[at // 2 % 3], K[at % 4], pattern))


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(
    "axes", itertools.product(TARGETS, ("float32", "float64"), BATCHES, K, PATTERNS), ids=str
)
def test_every_cell(name, axes):
    check(name, Cell(*axes))
