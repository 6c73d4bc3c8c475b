"""Engines on one model: they share its packed weights, and the last one gives the model back."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.decode.packing import _packings
from retort.ops import native
from retort.ops.packing import PackedLinear
from tests.decode.toys import prompts, reference, toy

pytestmark = pytest.mark.skipif(not native.available(), reason="no native core")

TEXTS = prompts((5, 9))
FAMILIES = ("llama", "gpt2", "gemma2")


def state(model):
    """Everything an engine may touch: modules, forwards, attention function, parameters."""
    return (
        dict(model.named_modules()),
        {n for n, m in model.named_modules() if "forward" in m.__dict__},
        model.config._attn_implementation,
        {n: id(p) for n, p in model.named_parameters()},
    )


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TEXTS[:1])).logits


def is_packed(model):
    return any(isinstance(m, PackedLinear) for m in model.modules())


def decode(engine):
    return [o.token_ids for o in engine.generate(TEXTS, max_new_tokens=6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_engine_leaves_the_model_as_it_was(family):
    model = toy(family, dtype=torch.float32)
    want, before = logits(model), state(model)
    expected = [reference(model, p, max_new_tokens=6) for p in TEXTS]
    engine = Engine(model, drafter="prompt-lookup")
    assert decode(engine) == expected and is_packed(model)
    del engine
    gc.collect()
    assert state(model) == before
    assert torch.equal(logits(model), want)


def test_an_engine_lost_in_the_middle_of_its_work_leaves_the_model_as_it_was():
    model = toy(dtype=torch.float32)
    want, before = logits(model), state(model)
    engine = Engine(model)
    engine.add_request(TEXTS[0])
    engine.step()
    stream = engine.stream(TEXTS, max_new_tokens=6)
    next(stream)
    del engine, stream
    gc.collect()
    assert state(model) == before
    assert torch.equal(logits(model), want)


def test_an_engine_that_could_not_be_built_leaves_the_model_as_it_was():
    model = toy(dtype=torch.float32)
    before = state(model)
    with pytest.raises(Exception, match="no such drafter"):
        Engine(model, drafter="no such drafter")
    assert state(model) == before


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("first_to_end", [0, 1])
def test_two_engines_share_the_weights_and_the_last_restores(first_to_end, dropped):
    model = toy(dtype=torch.float32)
    want, before = logits(model), state(model)
    engines = [Engine(model), Engine(model, weight_storage="float32")]
    packings = {id(e.target.backend.packing) for e in engines}
    assert len(packings) == 1
    expected = decode(engines[0])
    assert decode(engines[1]) == expected
    leaving = engines.pop(first_to_end)
    if not dropped:
        leaving.close()
    del leaving
    gc.collect()
    facts = engines[0].target.backend.facts()
    assert facts["packed_linears"] == 29 and facts["one_call_a_step"]
    assert decode(engines[0]) == expected
    assert is_packed(model)
    if not dropped:
        engines[0].close()
    engines.clear()
    gc.collect()
    assert state(model) == before
    assert torch.equal(logits(model), want)


def test_closing_twice_counts_once():
    model = toy(dtype=torch.float32)
    first, second = PackedModel(model), PackedModel(model)
    first.close()
    first.close()
    assert is_packed(model)
    second.close()
    assert not is_packed(model)


def test_a_refresh_by_one_engine_reaches_the_other():
    model = toy(dtype=torch.float32)
    with Engine(model) as first, Engine(model) as second:
        before = decode(second)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-2)
        first.target.backend.refresh()
        changed = decode(second)
    assert changed == [reference(model, p, max_new_tokens=6) for p in TEXTS] != before


def test_released_weights_come_back_when_the_engine_is_dropped():
    model = toy(dtype=torch.float32)
    want, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    engine = Engine(model, release_weights=True)
    assert any(p.is_meta for p in model.parameters())
    del engine
    gc.collect()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), want)


def test_an_engine_dropped_with_its_model_unpacks_nothing(monkeypatch):
    monkeypatch.setattr(PackedLinear, "unpacked", lambda self: pytest.fail("unpacked for nobody"))
    model = toy(dtype=torch.float32)
    alive, kept = weakref.ref(model), len(_packings)
    engine = Engine(model, release_weights=True)
    decode(engine)
    del model, engine
    gc.collect()
    assert alive() is None
    assert len(_packings) == kept


def test_engines_in_two_threads_take_turns_on_one_model():
    """The second begins a sampled pass inside a greedy one, whose head gives ids for logits."""
    model, text = toy(dtype=torch.float32, eos_token_id=None), prompts((5,))
    sampled = {"max_new_tokens": 6, "do_sample": True, "seed": 3}
    with Engine(model) as engine, Engine(model) as other:
        greedy = engine.generate(text, max_new_tokens=6)[0].token_ids
        drawn = other.generate(text, **sampled)[0].token_ids
        found = []
        thread = threading.Thread(target=lambda: found.extend(other.generate(text, **sampled)))

        def start(*_):
            if not thread.ident:
                thread.start()
                thread.join(0.5)  # without turns it is through by then

        hook = model.get_input_embeddings().register_forward_hook(start)
        again = engine.generate(text, max_new_tokens=6)[0].token_ids
        hook.remove()
        thread.join()
    assert (again, found[0].token_ids) == (greedy, drawn)
