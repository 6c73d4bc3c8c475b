"""A model that an engine holds can be copied, and the copy is a model of its own."""

import copy

import pytest
import torch

from retort.decode.engine import Engine
from tests.decode.toys import prompts, reference, toy


@pytest.mark.parametrize("release", [False, True])
def test_the_copy_of_a_packed_model_is_a_plain_one(release):
    model, texts = toy(dtype=torch.float32), prompts((5, 9))
    expected = [reference(model, p, max_new_tokens=8) for p in texts]
    with Engine(model, release_weights=release) as engine:
        engine.generate(texts, max_new_tokens=2)
        copied = copy.deepcopy(model)
    assert [reference(copied, p, max_new_tokens=8) for p in texts] == expected
    assert {type(m).__name__ for m in copied.modules()} == {
        type(m).__name__ for m in model.modules()
    }
    with torch.no_grad():
        copied.model.layers[0].mlp.up_proj.weight.zero_()
    with Engine(copied) as engine:
        changed = [o.token_ids for o in engine.generate(texts, max_new_tokens=8)]
    assert changed == [reference(copied, p, max_new_tokens=8) for p in texts] != expected
