"""Greedy tokens out of the output layer: the same tokens, no logits, only where allowed."""

from __future__ import annotations

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.decode.padded import PaddedModel
from retort.decode.params import SamplingParams
from retort.ops import native
from tests.decode.toys import prompts, toy

pytestmark = pytest.mark.skipif(not native.available(), reason="no native core")

FEEDS, KEEP = [([5, 6, 7, 8], 4), ([9], 1), ([3, 4], 0)], [4, 1, 0]


def passes(packed, greedy):
    rows = [packed.add_row() for _ in FEEDS]
    feeds = [(row, tokens) for row, (tokens, _) in zip(rows, FEEDS, strict=True)]
    return packed.forward(feeds, KEEP, greedy=greedy)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "phi3", "olmo2"])
@pytest.mark.parametrize("model_class", [PackedModel, PaddedModel])
def test_tokens_are_the_argmax_of_the_logits(name, model_class):
    model = toy(name, dtype=torch.float32)
    logits = passes(model_class(model, cpu_backend="native"), False)
    tokens = passes(model_class(model, cpu_backend="native"), True)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, logits.argmax(-1))


def test_the_first_of_equal_logits_wins():
    model = toy(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[torch.arange(97) % 16])
    logits = passes(PackedModel(model, cpu_backend="native"), False)
    tokens = passes(PackedModel(model, cpu_backend="native"), True)
    assert torch.equal(tokens, logits.argmax(-1))
    assert tokens.max() < 16


@pytest.mark.parametrize(
    ("name", "options"),
    [("gemma2", {"final_logit_softcapping": 3.0}), ("granite", {"logits_scaling": 7.0})],
)
def test_models_that_change_their_logits_keep_them(name, options):
    packed = PackedModel(toy(name, dtype=torch.float32, **options), cpu_backend="native")
    assert passes(packed, True).shape == (sum(KEEP), 97)


def test_without_the_core_there_are_logits():
    assert passes(PackedModel(toy(), cpu_backend="torch"), True).shape == (sum(KEEP), 97)


@pytest.mark.parametrize(
    ("sampling", "stored"),
    [
        ({}, False),
        ({"logprobs": 2}, True),
        ({"prompt_logprobs": 0}, True),
        ({"do_sample": True}, True),
        ({"repetition_penalty": 1.3}, True),
    ],
)
def test_the_engine_stores_logits_only_where_a_row_needs_them(monkeypatch, sampling, stored):
    shapes = set()
    forward = PackedModel.forward

    def spy(self, *args, **options):
        shapes.add((out := forward(self, *args, **options)).dim())
        return out

    monkeypatch.setattr(PackedModel, "forward", spy)
    options = {"drafter": "prompt-lookup", "draft_budget": 3}
    with Engine(toy(dtype=torch.float32), cpu_backend="native", **options) as engine:
        engine.generate(prompts(), max_new_tokens=12, **sampling)
    assert shapes == ({2} if stored else {1})


def test_a_row_that_needs_logits_does_not_change_the_others():
    model, texts = toy(dtype=torch.float32), prompts()
    with Engine(model, cpu_backend="native") as engine:
        alone = [o.token_ids for o in engine.generate(texts, max_new_tokens=12)]
        greedy, drawn = {"max_new_tokens": 12}, {"max_new_tokens": 6, "do_sample": True}
        ids = [engine.add_request(t, SamplingParams.build(**greedy)) for t in texts]
        engine.add_request(texts[0], SamplingParams.build(**drawn))
        done = {}
        while engine.has_unfinished():
            done |= {o.request_id: o.token_ids for o in engine.step()}
    assert [done[i] for i in ids] == alone


def test_prefill_computes_the_logits_of_last_tokens_only(monkeypatch):
    """Counted at the output layer: one row of logits a prompt, whatever its length and slices."""
    model, rows = toy(dtype=torch.float32), []
    with Engine(model, cpu_backend="native", max_prefill_tokens=7) as engine:
        head = model.lm_head
        monkeypatch.setattr(
            type(engine.target._greedy_head), "_choose", _counting(rows, head.packed)
        )
        engine.generate(prompts((9, 11, 3)), max_new_tokens=1)
    assert sum(rows) == 3


def _counting(rows, packed):
    from retort.ops.linear import packed_argmax

    def choose(self, hidden):
        rows.append(hidden.shape[1])
        self._tokens = packed_argmax(hidden, packed)[0]
        return self._tokens

    return choose
