"""Engines on PyTorch's arithmetic with weights that its oneDNN packed once."""

from __future__ import annotations

import gc

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.ops import native, prepacked
from retort.ops.packing import PackedLinear
from retort.ops.prepacked import PrepackedLinear
from tests.decode.test_sharing import logits, state
from tests.decode.toys import prompts, reference, toy
from tests.models import mambas, retnets

pytestmark = pytest.mark.skipif(not prepacked.available(), reason="no oneDNN")
needs_core = pytest.mark.skipif(not native.available(), reason="no native core")

TEXTS = prompts((5, 9, 3))
FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "opt", "phi3")


def engine(model, **options):
    return Engine(model, cpu_backend="torch", **options)


def kinds(model, kind):
    return sum(type(m) is kind for m in model.modules())


def decode(made, texts=TEXTS, new=8):
    return [o.token_ids for o in made.generate(texts, max_new_tokens=new)]


@pytest.mark.parametrize("drafter", [None, "prompt-lookup"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_outputs_are_those_of_generate(family, drafter):
    model = toy(family, dtype=torch.float32)
    want, before = logits(model), state(model)
    expected = [reference(model, p, max_new_tokens=8) for p in TEXTS]
    with engine(model, drafter=drafter, draft_budget=4, release_weights=True) as made:
        assert decode(made) == expected
        assert (made.stats.draft_tokens > 0) is (drafter is not None)
        facts = made.target.backend.facts()
        assert facts["cpu_backend"] == "torch" and not facts["one_call_a_step"]
        assert facts["packed_linears"] == kinds(model, PrepackedLinear) > 8
        assert not facts["linears_in_torch"]
    after = state(model)
    assert after[:3] == before[:3]
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("family", [retnets, mambas], ids=["retention", "mamba"])
def test_recurrent_models_decode_on_them_with_their_own_weights_released(family):
    model = family.tiny().float()
    texts = [[token % 31 for token in text] for text in TEXTS]
    expected = [reference(model, text, max_new_tokens=32) for text in texts]
    with engine(model, release_weights=True, drafter="prompt-lookup", draft_budget=3) as made:
        assert decode(made, texts, 32) == expected
        assert made.stats.draft_tokens and kinds(model, PrepackedLinear) > 4
        assert not made.target.backend.facts()["one_call_a_step"]
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_in_f_linear(dtype):
    model = toy(dtype=dtype)
    with engine(model) as made:
        assert made.target.backend.packing is None
        assert kinds(model, PrepackedLinear) == 0


def test_prepacking_can_be_left_out():
    model = toy(dtype=torch.float32)
    packed = PackedModel(model, cpu_backend="torch", prepack=False)
    assert packed.backend.key == ["torch"] and kinds(model, PrepackedLinear) == 0


def test_without_the_operators_an_engine_decodes_on_f_linear(monkeypatch):
    monkeypatch.setattr(prepacked, "available", lambda: False)
    model = toy(dtype=torch.float32)
    expected = [reference(model, p, max_new_tokens=8) for p in TEXTS]
    with engine(model) as made:
        assert kinds(model, PrepackedLinear) == 0 and decode(made) == expected


def test_two_engines_share_the_weights_and_a_dropped_one_gives_them_back():
    model = toy(dtype=torch.float32)
    before, first = state(model), engine(model)
    second = engine(model)
    assert first.target.backend.packing is second.target.backend.packing
    first.close()
    assert kinds(model, PrepackedLinear) == 29
    del second
    gc.collect()
    assert state(model) == before


@needs_core
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("core_first", [False, True])
def test_an_engine_that_needs_the_core_gets_it_whoever_came_first(core_first, release):
    model = toy(dtype=torch.float32)
    want, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    expected = [reference(model, p, max_new_tokens=8) for p in TEXTS]
    names = ("native", "torch") if core_first else ("torch", "native")
    engines = {n: Engine(model, cpu_backend=n, release_weights=release) for n in names}
    assert kinds(model, PackedLinear) == 29 and kinds(model, PrepackedLinear) == 0
    assert engines["native"].target.backend.facts()["one_call_a_step"]
    assert all(decode(made) == expected for made in engines.values())
    engines.pop("native").close()
    assert decode(engines["torch"]) == expected
    engines["torch"].close()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), want)
