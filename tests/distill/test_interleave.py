"""Speculative KD against a loop that asks both models for every token."""

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.decode.sampling import RESAMPLE, draw
from retort.distill.builders import dense_retnet_student
from retort.distill.sequences.interleave import Interleaver
from retort.distill.sequences.writers import StudentWriter, WritingSettings
from retort.errors import RetortError
from tests.distill.test_presets import interleaved
from tests.distill.toys import llama

PROMPTS = [[5, 6, 7], [9] * 7, [200, 3], [11, 12, 13, 14, 15], [8], [40, 41]]


def models(kind="llama", **changes):
    teacher = llama(1, dtype=torch.float64)
    if kind == "llama":
        return llama(2, dtype=torch.float64, **changes), teacher
    torch.manual_seed(0)
    return dense_retnet_student(teacher, 2).double(), teacher


def write(student, teacher, top_k, limit=8, seeds=None, revise=False, **changes):
    made = WritingSettings((0,), limit, 64, interleave_top_k=top_k, **changes)
    return StudentWriter(student, teacher, made).write(PROMPTS, revise, seeds)


@pytest.mark.parametrize("kind", ["llama", "dense_retnet"])
@pytest.mark.parametrize("top_k", [1, 25, 150])
def test_greedy_text_equals_token_by_token(kind, top_k):
    student, teacher = models(kind)
    writing = write(student, teacher, top_k, batch_size=4)
    assert [t.tokens for t in writing.texts] == [
        interleaved(student, teacher, p, top_k) for p in PROMPTS
    ]
    assert writing.judged == sum(len(t.tokens) for t in writing.texts)
    assert 0 < writing.replaced <= writing.judged


def test_with_every_token_allowed_the_text_is_the_students(monkeypatch):
    student, teacher = models()
    writing = write(student, teacher, 258)
    plain = StudentWriter(student, teacher, WritingSettings((0,), 8, 64)).write(PROMPTS)
    assert [t.tokens for t in writing.texts] == [t.tokens for t in plain.texts]
    assert writing.replaced == 0


@pytest.mark.parametrize("block", [1, 3, 50])
def test_the_block_does_not_change_a_greedy_text(block, monkeypatch):
    student, teacher = models()
    monkeypatch.setattr(Interleaver.__init__, "__defaults__", (True, block))
    monkeypatch.setattr("retort.distill.sequences.writers.BLOCK", block)
    texts = [t.tokens for t in write(student, teacher, 25).texts]
    assert texts == [interleaved(student, teacher, p, 25) for p in PROMPTS]


def test_a_replacement_is_drawn_from_the_teacher():
    """Where no token of the student stands (K = 0), the text is the teacher's own draw."""
    student, teacher = models()
    seeds = [3, 1, 4, 1, 5, 9]
    texts = write(student, teacher, 1, seeds=seeds, do_sample=True).texts
    for text, seed in zip(texts, seeds, strict=True):
        for place, token in enumerate(text.tokens):
            ids = torch.tensor([[*text.prompt, *text.tokens[:place]]])
            with torch.no_grad():
                p = teacher(ids).logits[0, -1].log_softmax(-1)
            assert token in (int(p.argmax()), int(draw(p, seed, place, RESAMPLE)))


def test_the_teacher_reads_no_token_twice_but_those_thrown_away():
    student, teacher = models()
    counted = []
    close = PackedModel.close

    def watched(self):
        counted.append((self.model is teacher, self.forward_tokens))
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedModel, "close", watched)
        writing = write(student, teacher, 25)
    read = sum(n for is_teacher, n in counted if is_teacher)
    standing = sum(len(t.prompt) + len(t.tokens) - 1 for t in writing.texts)
    assert standing <= read <= standing + 4 * writing.replaced + writing.judged


def test_a_wider_students_vocabulary_is_cut():
    student, teacher = models(vocab_size=264)
    tokens = [t for text in write(student, teacher, 25).texts for t in text.tokens]
    assert max(tokens) < 258


@pytest.mark.parametrize(
    ("top_k", "revise", "rewritten"),
    [(0, False, False), (25, False, False), (25, False, True), (0, True, True)],
)
def test_a_row_that_fails_ends_the_step_and_trains_nothing(monkeypatch, top_k, revise, rewritten):
    """In its first text as well as in what is written after a correction."""
    from retort.decode import stopping

    whole, rewind, again = stopping._ends, Engine.rewind, set()

    def noted(engine, request_id, *arguments, **keywords):
        again.add(request_id)
        rewind(engine, request_id, *arguments, **keywords)

    def failing(request, token):
        begun = request.id in again if rewritten else len(request.output) == 2
        if request.index == 1 and begun:
            raise ValueError("not a number")
        return whole(request, token)

    monkeypatch.setattr(Engine, "rewind", noted)
    monkeypatch.setattr(stopping, "_ends", failing)
    with pytest.raises(RetortError, match=r"row 1 .*not a number"):
        write(*models(), top_k, revise=revise)
