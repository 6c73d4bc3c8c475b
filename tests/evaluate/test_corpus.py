"""Perplexity of a corpus against sums by hand, and over tokenizers."""

import json
import math

import pytest
import torch

from retort.errors import ConfigurationError
from retort.evaluate.corpus import corpus_perplexity, evaluate_folder
from tests.distill.tokenizers import byte_level
from tests.evaluate.tiny import tiny_llama

TEXTS = ["the cat sat on the mat", "ä 猫, hello", "x"]


class Uniform(torch.nn.Module):
    """All tokens equally likely."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.bias = vocabulary, torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, **_):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=torch.zeros(*input_ids.shape, self.vocabulary).double())


def test_every_token_and_end_is_counted_once_against_sums_by_hand():
    tokenizer = byte_level()
    model = tiny_llama(1, vocab_size=len(tokenizer))
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"], 0]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= logs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    found = corpus_perplexity(model, tokenizer, TEXTS)
    assert found.tokens == count
    assert found.nll == pytest.approx(total / count, rel=1e-9)
    size, words = sum(len(t.encode()) for t in TEXTS), sum(len(t.split()) for t in TEXTS)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-9)
    assert found.word_perplexity == pytest.approx(math.exp(total / words), rel=1e-9)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("max_length", [2, 5, 1024])
def test_windows_count_every_token_once(merges, max_length):
    tokenizer = byte_level(merges=merges)
    found = corpus_perplexity(Uniform(330), tokenizer, TEXTS, max_length)
    tokens = sum(len(tokenizer(t)["input_ids"]) + 1 for t in TEXTS)
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(330)
    size = sum(len(t.encode()) for t in TEXTS)
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(330) / size)


def test_a_folder_and_a_file(tmp_path):
    tokenizer = byte_level()
    model = tiny_llama(1, vocab_size=len(tokenizer)).float()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    found = evaluate_folder(tmp_path / "model", str(rows), text_field="body", max_rows=2)
    want = corpus_perplexity(model, tokenizer, TEXTS[:2])
    assert found.tokens == want.tokens
    assert found.nll == pytest.approx(want.nll, rel=1e-5)


def test_what_cannot_be_counted_is_refused():
    tokenizer = byte_level()
    with pytest.raises(ConfigurationError, match="max_length"):
        corpus_perplexity(Uniform(330), tokenizer, TEXTS, 1)
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="eos_token"):
        corpus_perplexity(Uniform(330), tokenizer, TEXTS)
