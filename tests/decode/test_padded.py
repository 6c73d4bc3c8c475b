"""The padded baseline gives the same tokens; only padding differs."""

import pytest

from retort.decode.engine import Engine
from retort.decode.padded import PaddedEngine
from retort.errors import ConfigurationError
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, reference, toy

NEW = 24


def _run(engine_class, model, texts, expected, **options):
    answers = [p + e + [0] * 5 for p, e in zip(texts, expected, strict=True)]
    drafter = ScriptedDrafter("random, sometimes none", answers)
    with engine_class(model, drafter=drafter, draft_budget=5, **options) as engine:
        outputs = engine.generate(texts, max_new_tokens=NEW)
        return [o.token_ids for o in outputs], engine.stats


@pytest.mark.parametrize("pad_input", [True, False])
@pytest.mark.parametrize("pad_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_ablation_differs_in_padding_only(name, pad_input, pad_cache):
    model, texts = toy(name), prompts()
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    plain, unpadded = _run(Engine, model, texts, expected)
    tokens, padded = _run(
        PaddedEngine, model, texts, expected, pad_input=pad_input, pad_cache=pad_cache
    )
    assert tokens == plain == expected
    same = ("draft_tokens", "accepted_tokens", "generated_tokens", "steps")
    assert [getattr(padded, n) for n in same] == [getattr(unpadded, n) for n in same]
    real = padded.packed_tokens - padded.padding_tokens
    assert real == unpadded.packed_tokens
    assert (padded.padding_tokens > 0) == pad_input


def test_recurrent_models_have_no_padded_baseline():
    model = toy()
    model.new_row_cache = lambda **_: object()
    with pytest.raises(ConfigurationError, match="attention models only"):
        PaddedEngine(model)
