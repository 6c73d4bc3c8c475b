"""Perplexity against one cross-entropy over the whole text."""

import math

import pytest
import torch

from retort.errors import ConfigurationError
from retort.evaluate.perplexity import completion_perplexity, perplexity, token_nll, windows
from tests.evaluate.tiny import tiny_llama


def tokenize(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(c) % 31 for c in text]}


def _losses(model, ids, first=1):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.nn.functional.cross_entropy(
        logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="none"
    )


def test_tokens_are_the_weight_not_texts():
    model, texts = tiny_llama(0), ["abcdefghij", "xy"]
    losses = torch.cat([_losses(model, tokenize(text)["input_ids"]) for text in texts])
    found = perplexity(model, tokenize, texts, chunk_size=4)
    assert found.tokens == 10
    assert found.value == pytest.approx(math.exp(losses.mean()), rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 31, 32])
@pytest.mark.parametrize("size", [2, 3, 8, 100])
def test_windows_score_each_token_once_with_half_a_window_of_context(length, size):
    scored = []
    for window, first in windows(list(range(length)), size):
        assert len(window) <= size
        assert window[0] == 0 or first >= size // 2
        scored += window[first:]
    assert scored == list(range(1, length))


def test_a_long_text_is_scored_in_windows():
    model, text = tiny_llama(0), "the quick brown fox jumps over"
    ids = tokenize(text)["input_ids"]
    expected = torch.cat([_losses(model, window, first) for window, first in windows(ids, 10)])
    found = perplexity(model, tokenize, [text], max_length=10)
    assert found.tokens == len(ids) - 1
    assert found.nll == pytest.approx(expected.mean().item(), rel=1e-12)


def test_completions_leave_their_prompts_out():
    model = tiny_llama(0)
    found = completion_perplexity(model, [([1, 2, 3], [4, 5])])
    assert found.tokens == 2
    assert found.nll == pytest.approx(_losses(model, [1, 2, 3, 4, 5], 3).mean().item(), rel=1e-12)


def test_half_precision_models_are_scored_in_float32():
    model = tiny_llama(0).bfloat16()
    assert token_nll(model, [1, 2, 3]).dtype == torch.float32


def test_texts_without_a_token_to_predict_are_refused():
    with pytest.raises(ConfigurationError, match="no token to predict"):
        perplexity(tiny_llama(0), tokenize, ["", "a"])


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ConfigurationError, match="max_length"):
        perplexity(tiny_llama(0), tokenize, ["abc"], max_length=1)
