"""The real model: unpadded output equals `transformers.generate` at batch 1, token for token."""

from functools import cache

import pytest
import torch

from retort.decode.engine import Engine
from retort.distill.builders import dense_retnet_student
from retort.distill.init import freeze_embeddings
from retort.models import zoo
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


NEW = {8: 32, 32: 64}


@pytest.fixture(scope="module")
def model(zoo_folder):
    return zoo.load_model(str(zoo_folder), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(zoo_folder):
    return zoo.load_tokenizer(str(zoo_folder))


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """What transformers' generate gives at batch 1, computed once for each size."""

    @cache
    def compute(count):
        ids = [tokenizer(t).input_ids for t in _texts(count)]
        return ids, [reference(model, i, max_new_tokens=NEW[count]) for i in ids]

    return compute


@pytest.fixture(scope="module")
def student(model, expected):
    """A DenseRetNet with the teacher's embedding and head, taught the first eight continuations
    until a good part of its drafts is right."""
    torch.manual_seed(0)
    student = dense_retnet_student(model, layers=2)
    freeze_embeddings(student)
    rows = [torch.tensor([prompt + new]) for prompt, new in zip(*expected(8), strict=True)]
    trained = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(48):
        row = rows[step % len(rows)]
        student(input_ids=row, labels=row).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return student.eval()


def _texts(count):
    """The eight prompts, and variations of them when more are asked for."""
    return [f"{'Note: ' * (i // len(PROMPTS))}{PROMPTS[i % len(PROMPTS)]}" for i in range(count)]


def _check(model, tokenizer, student, expected, count):
    ids, texts = expected(count)
    for drafter, budget in ((None, 0), ("prompt-lookup", 5), (student, 2)):
        for batch in (1, 3, 8):
            options = {"drafter": drafter, "draft_budget": budget, "max_batch_size": batch}
            with Engine(model, tokenizer, **options) as engine:
                outputs = engine.generate(ids, max_new_tokens=NEW[count])
            assert [o.token_ids for o in outputs] == texts, (drafter, batch)
            assert (engine.stats.accepted_tokens > 0) == (drafter is not None)


def test_unpadded_equals_generate(model, tokenizer, student, expected):
    _check(model, tokenizer, student, expected, count=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_unpadded_equals_generate_at_length(model, tokenizer, student, expected):
    _check(model, tokenizer, student, expected, count=32)


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
