"""Rollouts refill a place as soon as its text ends, and no text depends on its neighbours."""

import pytest
import torch

from retort.decode.step import Step
from retort.distill.builders import dense_retnet_student
from retort.distill.sequences.writers import StudentWriter, WritingSettings
from tests.distill.toys import llama

LENGTHS = [22, 3, 20, 23, 5, 21, 1]  # of prompts; what is left of 24 tokens, at most 12, is written
PROMPTS = [[7 + 31 * i % 250, *range(1, n)] for i, n in enumerate(LENGTHS)]
SEEDS = [3, 1, 4, 1, 5, 9, 2]


def student(kind):
    if kind == "llama":
        return llama(2)
    torch.manual_seed(0)
    return dense_retnet_student(llama(1), 2)


def write(model, size, chosen=slice(None), drafter=None):
    settings = WritingSettings((0,), 12, 24, size, drafter, do_sample=True)
    made = StudentWriter(model, None, settings).write(PROMPTS[chosen], seeds=SEEDS[chosen])
    assert [text.prompt for text in made.texts] == PROMPTS[chosen]
    assert made.written_tokens == sum(len(text.tokens) for text in made.texts)
    return [text.tokens for text in made.texts]


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("drafter", [None, "prompt-lookup"])
@pytest.mark.parametrize("kind", ["llama", "dense_retnet"])
def test_texts_are_those_of_batches_that_wait_for_their_longest(kind, drafter, size):
    model = student(kind)
    batches = [slice(start, start + size) for start in range(0, len(PROMPTS), size)]
    waited = [tokens for batch in batches for tokens in write(model, size, batch, drafter)]
    assert write(model, size, drafter=drafter) == waited


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_place_is_refilled_in_the_next_pass(monkeypatch, size):
    passes, run = [], Step.run
    monkeypatch.setattr(Step, "run", lambda step: (passes.append(1), run(step)))
    texts = write(student("llama"), size)
    ends = [0] * size
    for tokens in texts:
        place = ends.index(min(ends))
        ends[place] += len(tokens)
    assert len(passes) == max(ends)
    if size > 1:  # batches that wait take longer, or this would show nothing
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        assert max(ends) < sum(max(map(len, batch)) for batch in batches)
