"""The real model: unpadded output equals `transformers.generate` at batch 1, token for token."""

import pytest
import torch

from retort.decode.engine import Engine
from retort.models import zoo
from retort.models.dense_retnet import DenseRetNetConfig, DenseRetNetForCausalLM
from tests.decode.toys import reference

PROMPTS = [
    "The capital of France is",
    "Repeat after me: one two three, one two three, one two",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return",
    "Once upon a time there was a small fox who lived near a river. The small fox",
    "List: apple, pear, plum, apple, pear,",
    "Water boils at",
    "Dear Sir or Madam,\nI am writing to",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
]


@pytest.fixture(scope="module")
def model():
    return zoo.load_model("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.load_tokenizer("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def student(model):
    """A DenseRetNet of one layer over the teacher's embedding and head: an untrained drafter."""
    torch.manual_seed(0)
    config = DenseRetNetConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        query_key_dim=128,
        num_attention_heads=2,
        num_hidden_layers=2,
        dense_block_layers=1,
        tie_word_embeddings=True,
    )
    student = DenseRetNetForCausalLM(config).eval()
    student.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    return student


def _texts(count):
    """The eight prompts, and variations of them when more are asked for."""
    return [f"{'Note: ' * (i // len(PROMPTS))}{PROMPTS[i % len(PROMPTS)]}" for i in range(count)]


def _check(model, tokenizer, student, count, new):
    ids = [tokenizer(t).input_ids for t in _texts(count)]
    expected = [reference(model, i, max_new_tokens=new) for i in ids]
    for drafter, budget in ((None, 0), ("prompt-lookup", 5), (student, 2)):
        for batch in (1, 3, 8):
            options = {"drafter": drafter, "draft_budget": budget, "max_batch_size": batch}
            with Engine(model, tokenizer, **options) as engine:
                outputs = engine.generate(ids, max_new_tokens=new)
            assert [o.token_ids for o in outputs] == expected, (drafter, batch)
            assert (engine.stats.draft_tokens > 0) == (drafter is not None)
            assert drafter != "prompt-lookup" or engine.stats.accepted_tokens > 0


def test_unpadded_equals_generate(model, tokenizer, student):
    _check(model, tokenizer, student, count=8, new=32)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_unpadded_equals_generate_at_length(model, tokenizer, student):
    _check(model, tokenizer, student, count=32, new=64)


def test_streaming_gives_the_same_text_in_pieces(model, tokenizer):
    with Engine(model, tokenizer, drafter="prompt-lookup") as engine:
        whole = engine.generate(PROMPTS[:3], max_new_tokens=24)
        pieces = list(engine.stream(PROMPTS[:3], max_new_tokens=24))
    for output in whole:
        mine = [c for c in pieces if c.index == output.index - whole[0].index]
        assert "".join(c.text for c in mine) == output.text
        assert [t for c in mine for t in c.token_ids] == output.token_ids
        assert mine[-1].finish_reason == output.finish_reason


def test_chat_messages_go_through_the_template(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with Engine(model, tokenizer) as engine:
        (out,) = engine.generate([messages], max_new_tokens=24)
    assert "Paris" in out.text
    assert out.finish_reason == "stop"
