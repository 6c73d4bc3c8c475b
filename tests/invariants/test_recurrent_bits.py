"""On the native core a recurrent row's logits are the same bits in any company and with any drafts.

Random layouts: rows join at any time, bring one token, a draft or a chunk, and take back any part
of a draft; every accepted token's logits must be those of the row alone, fed token by token.
"""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.decode.packed import PackedModel
from retort.ops import native
from retort.ops.native.invariant import row_invariant
from tests.models import mambas, retnets

pytestmark = pytest.mark.skipif(not native.available(), reason="no native core")

MODELS = {
    "retnet": (retnets, {}),
    "odd retnet": (retnets, {"hidden_size": 48, "query_key_dim": 20}),
    "retnet with an MLP": (retnets, {"mlp_intermediate_size": 37, "dense_block_layers": 1}),
    "mamba": (mambas, {}),
    "odd mamba": (mambas, {"hidden_size": 40, "state_size": 17, "dense_block_layers": 1}),
}
SIZES = (50, 21, 37, 5, 64, 33)
DRAFT = 8


@cache
def alone(name):
    """A model in float32, some texts, and the logits of each fed token by token."""
    module, changes = MODELS[name]
    model = module.tiny(dtype=torch.float32, **changes)
    texts = [module.ids(n, seed=i).tolist() for i, n in enumerate(SIZES)]
    packed = PackedModel(model, cpu_backend="native")
    want = []
    for text in texts:
        row = packed.add_row()
        want.append(torch.cat([packed.forward([(row, [t])], [1]) for t in text]))
        packed.free_row(row)
    packed.close()
    return model, texts, want


def together(name, dice, tape, rows):
    """Feed ``rows`` texts in one batch as ``dice`` falls; returns the accepted tokens' logits."""
    model, texts, _ = alone(name)
    packed = PackedModel(model, cpu_backend="native", max_draft=DRAFT, tape=tape)
    which = [dice.randrange(len(texts)) for _ in range(rows)]
    ids = [packed.add_row() for _ in which]
    got, at = [[] for _ in which], [0] * rows
    while any(a < len(texts[w]) for a, w in zip(at, which, strict=True)):
        plans = []
        for i, w in enumerate(which):
            text = texts[w][at[i] :]
            if not text or dice.random() < 0.2:
                continue
            good = text[: dice.choice([1, 1, 2, 4, 8, 24])]
            bad = [dice.randrange(retnets.VOCAB) for _ in range(dice.choice([0, 0, 1, 3, DRAFT]))]
            plans.append((i, good, bad))
        if not plans:
            continue
        dice.shuffle(plans)
        feeds = [(ids[i], good + bad) for i, good, bad in plans]
        logits = packed.forward(feeds, [len(t) for _, t in feeds]).split([len(t) for _, t in feeds])
        for (i, good, _), out in zip(plans, logits, strict=True):
            got[i].append(out[: len(good)])
            at[i] += len(good)
            packed.rewind(ids[i], at[i])
    packed.close()
    return which, [torch.cat(parts) for parts in got]


def check(name, seed, tape, rows):
    which, got = together(name, random.Random(seed), tape, rows)
    want = alone(name)[2]
    for w, logits in zip(which, got, strict=True):
        assert torch.equal(logits, want[w]), (name, float((logits - want[w]).abs().max()))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tape=st.sampled_from(["draft", "completion"]),
    rows=st.sampled_from([2, 3, 8]),
)
def test_bits_in_any_company(name, seed, tape, rows):
    check(name, seed, tape, rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_bits_in_any_company_at_length(name, isa, threads):
    if isa not in native.supported_isas():
        pytest.skip(f"no {isa} here")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    alone.cache_clear()
    try:
        with native.use_isa(isa):
            for seed in range(6):
                check(name, seed, ("draft", "completion")[seed % 2], (2, 5, 32)[seed % 3])
    finally:
        torch.set_num_threads(before)
        alone.cache_clear()


@pytest.mark.parametrize("start", [14, 15, 16, 30, 31, 32, 47])
@pytest.mark.parametrize("name", ["retnet", "mamba"])
def test_rejections_at_every_offset_around_a_block(name, start):
    model, texts, want = alone(name)
    packed = PackedModel(model, cpu_backend="native", max_draft=DRAFT)
    other, text = packed.add_row(), texts[4]
    for accepted in range(DRAFT + 1):
        row = packed.add_row()
        packed.forward([(row, text[:start])], [0])
        draft = text[start : start + accepted] + [5] * (DRAFT - accepted)
        packed.forward([(row, draft)], [1])
        packed.rewind(row, start + accepted)
        rest = [(row, text[start + accepted : start + accepted + 1])]
        logits = packed.forward([*rest, (other, [1, 2, 3])], [1, 1])
        assert torch.equal(logits[0], want[4][start + accepted]), accepted
        packed.free_row(row)
    packed.close()


@pytest.mark.parametrize("name", MODELS)
def test_no_torch_matmul_in_the_decode_profile(name):
    model, texts, _ = alone(name)
    packed = PackedModel(model, cpu_backend="native")
    rows = [packed.add_row() for _ in range(3)]
    packed.forward([(row, texts[row][:20]) for row in rows], [1, 1, 1])
    with torch.profiler.profile() as profile:
        packed.forward([(row, texts[row][20:21] + [3] * row) for row in rows], [1, 1, 1])
    packed.close()
    names = {event.key for event in profile.key_averages()}
    assert "aten::embedding" in names
    banned = ("aten::mm", "aten::bmm", "aten::addmm", "aten::matmul", "aten::baddbmm", "aten::mv")
    inexact = ("aten::silu", "aten::softplus", "aten::rms_norm", "aten::mean", "aten::exp")
    allowed = {"aten::exp"} if "mamba" in name else set()  # A, which no row enters
    assert not names & {*banned, *inexact} - allowed


@pytest.mark.parametrize("name", ["retnet", "mamba"])
def test_a_pass_needs_no_hook_on_every_torch_call(name, monkeypatch):
    """`row_invariant` costs more than the arithmetic of a short pass, and swaps nothing here."""

    def hooked(*_):
        raise AssertionError("a torch function went through the mode")

    model, texts, want = alone(name)
    packed = PackedModel(model, cpu_backend="native")
    monkeypatch.setattr(row_invariant, "__torch_function__", hooked)
    assert torch.equal(packed.forward([(packed.add_row(), texts[0])], [len(texts[0])]), want[0])
    packed.close()
