"""SCRG on hand-made bigram models, and against a naive version on random ones."""

from itertools import pairwise

import pytest
import torch

from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.decode.params import SamplingParams
from retort.distill.builders import dense_retnet_student
from retort.distill.sequences.scrg import Reviser, Text
from retort.distill.sequences.writers import StudentWriter, WritingSettings
from tests.decode.toys import toy
from tests.distill.toys import llama

EOS, V = 2, 24


def bigram(table, strength=10.0):
    """A llama whose next token depends on the last one only: {token: next or {next: logit}}."""
    model = toy("llama", dtype=torch.float64, vocab_size=V, hidden_size=V, num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        for token, after in table.items():
            for target, logit in (after if isinstance(after, dict) else {after: strength}).items():
                model.lm_head.weight[target, token] = logit / V**0.5
    return model


def chain(*tokens):
    return dict(pairwise(tokens))


STUDENT = chain(3, 4, 5, 6, 7, 8, 9, 13) | {10: 14, 11: 12, 12: 15, 14: 16, 16: 17}
# The teacher differs after 5 (mildly: 6 is its second choice) and after 7 (strongly).
TEACHER = STUDENT | {5: {10: 10.0, 6: 9.0}, 7: 11}


def revise(student, teacher, prompts=([3],), limit=6, rounds=1):
    """(texts, corrections, counts) of a rollout and its revision."""
    settings = WritingSettings((EOS,), limit, 64, rounds=rounds)
    writing = StudentWriter(student, teacher, settings).write(list(prompts), revise=True)
    return writing.texts, writing.corrections, writing.counts


def test_the_worst_error_is_replaced_and_only_what_follows_is_written_anew():
    (text,), (made,), counts = revise(bigram(STUDENT), bigram(TEACHER))
    assert made.tokens == [4, 5, 6, 7, 8, 9]
    assert (made.position, made.replacement, made.regenerated) == (4, 11, [12])
    assert text.tokens == [4, 5, 6, 7, 11, 12]
    # Prompt and five tokens were read to judge six predictions; afterwards only position 4 on.
    assert (counts.teacher_tokens, counts.student_score_tokens) == (6, 6)
    assert (counts.student_rewritten_tokens, counts.teacher_rescored_tokens) == (1, 1)
    assert counts.nll_after < counts.nll_before
    assert (counts.tokens_before, counts.tokens_after) == (6, 6)


def test_a_mild_error_before_the_worst_is_corrected_in_the_next_round():
    (text,), made, counts = revise(bigram(STUDENT), bigram(TEACHER), rounds=2)
    assert [(c.position, c.replacement) for c in made] == [(4, 11), (2, 10)]
    assert text.tokens == [4, 5, 10, 14, 16, 17]
    assert made[1].tokens == [4, 5, 6, 7, 11, 12]
    assert counts.corrected == 2 and counts.texts == 1


def test_agreement_is_kept_and_counted():
    (text,), made, counts = revise(bigram(STUDENT), bigram(STUDENT))
    assert text.tokens == [4, 5, 6, 7, 8, 9] and made == []
    assert (counts.without_error, counts.corrected, counts.student_rewritten_tokens) == (1, 0, 0)
    assert counts.nll_before == counts.nll_after


def test_the_teachers_end_token_cuts_the_text():
    (text,), (made,), counts = revise(bigram(STUDENT), bigram(STUDENT | {6: EOS}))
    assert text.tokens == [4, 5, 6, EOS] and made.regenerated == []
    assert counts.student_rewritten_tokens == counts.teacher_rescored_tokens == 0
    assert counts.tokens_after == 4


def test_the_last_place_is_corrected_without_regeneration():
    (text,), (made,), counts = revise(bigram(STUDENT), bigram(STUDENT | {8: 20}))
    assert (made.position, text.tokens) == (5, [4, 5, 6, 7, 8, 20])
    assert counts.student_rewritten_tokens == 0


def test_a_wrong_end_token_is_corrected_and_the_text_grows_to_the_limit():
    student = bigram(STUDENT | {5: EOS})
    (text,), (made,), _ = revise(student, bigram(STUDENT))
    assert made.tokens == [4, 5, EOS] and made.position == 2
    assert text.tokens == [4, 5, 6, 7, 8, 9]


def test_of_equal_errors_the_first_is_taken():
    # After 4 and after 8 the same disagreement, token for token.
    teacher = STUDENT | {4: 21, 8: 22}
    _, (made,), _ = revise(bigram(STUDENT), bigram(teacher))
    assert made.position == 1


@pytest.mark.parametrize("kind", ["llama", "dense_retnet"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_equals_a_naive_version_that_computes_everything_again(kind, rounds):
    teacher, student = models(kind)
    prompts = [[5, 6, 7], [9] * 7, [200, 3], [11, 12, 13, 14, 15], [8], [40, 41]]
    texts, made, counts = revise(student, teacher, prompts, limit=9, rounds=rounds)
    expected = [naive(student, teacher, p, 9, rounds) for p in prompts]
    assert [t.tokens for t in texts] == [tokens for tokens, _ in expected]
    assert counts.corrected == len(made) == sum(n for _, n in expected) > len(prompts) / 2
    nll = sum(
        negative_log_likelihood(teacher, p, t.tokens) for p, t in zip(prompts, texts, strict=True)
    )
    assert counts.nll_after == pytest.approx(nll, rel=1e-9)
    raw = [greedy(student, p, 9) for p in prompts]
    changes = [
        negative_log_likelihood(teacher, p, t.tokens) / len(t.tokens)
        - negative_log_likelihood(teacher, p, old) / len(old)
        for p, t, old in zip(prompts, texts, raw, strict=True)
    ]
    assert counts.nll_change == pytest.approx(sum(changes), rel=1e-9)
    assert counts.nll_change_squared == pytest.approx(sum(c**2 for c in changes), rel=1e-9)


@pytest.mark.parametrize("kind", ["llama", "dense_retnet"])
def test_no_forward_reads_what_stands_before_a_correction(kind, monkeypatch):
    teacher, student = models(kind)
    prompts = [[5, 6, 7] * 5, [9, 8, 7, 6] * 5]
    with Engine(student, tape="completion", draft_budget=0) as engine:
        packed = PackedModel(teacher)
        texts = write(engine, prompts, 12)
        reviser = Reviser(engine, packed, [EOS])
        judged = spy(monkeypatch, reviser)
        corrections = reviser.revise(texts)
    assert len(corrections) == 2
    new = [len(c.regenerated) for c in corrections]
    assert judged["student"] == sum(new) == reviser.counts.student_rewritten_tokens
    assert judged["teacher"] == sum(new) == reviser.counts.teacher_rescored_tokens


def spy(monkeypatch, reviser):
    """Tokens that go through either model's own forward once corrections have begun."""
    seen = {"student": 0, "teacher": 0}
    correct = reviser._correct

    def watch(name, model):
        forward = model.forward

        def counted(*args, input_ids=None, **keywords):
            seen[name] += input_ids.numel()
            return forward(*args, input_ids=input_ids, **keywords)

        monkeypatch.setattr(model, "forward", counted)

    def begin(found):
        watch("student", reviser.engine.model)
        watch("teacher", reviser.teacher.model)
        return correct(found)

    monkeypatch.setattr(reviser, "_correct", begin)
    return seen


def write(engine, prompts, limit):
    params = SamplingParams(max_new_tokens=limit, eos_token_id=EOS)
    texts = {}
    for prompt in prompts:
        rid = engine.add_request(prompt, params, hold=True)
        texts[rid] = Text(rid, prompt, [], limit)
    while engine.has_unfinished():
        for output in engine.step():
            texts[output.request_id].tokens = output.token_ids
    return list(texts.values())


def models(kind):
    teacher = llama(1, dtype=torch.float64)
    if kind == "llama":
        return teacher, llama(2, layers=1, dtype=torch.float64)
    torch.manual_seed(3)
    return teacher, dense_retnet_student(teacher, 2, initializer_range=0.3).double().eval()


@torch.no_grad()
def naive(student, teacher, prompt, limit, rounds):
    """(tokens, corrections): the definition, with a whole forward for every number."""
    tokens, corrected = greedy(student, prompt, limit), 0
    for _ in range(rounds):
        p, q = (log_probs(m, prompt, tokens) for m in (teacher, student))
        kl = (p.exp() * (p - q)).sum(-1)
        errors = [t for t, y in enumerate(tokens) if y != int(p[t].argmax())]
        if not errors:
            break
        j = max(errors, key=lambda t: float(kl[t]))
        kept = [*tokens[:j], int(p[j].argmax())]
        room = 0 if kept[-1] == EOS else limit - len(kept)
        tokens = kept + greedy(student, [*prompt, *kept], room)
        corrected += 1
    return tokens, corrected


def greedy(model, prompt, limit):
    tokens = []
    while len(tokens) < limit and EOS not in tokens:
        ids = torch.tensor([[*prompt, *tokens]])
        tokens.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    return tokens


def log_probs(model, prompt, tokens):
    ids = torch.tensor([[*prompt, *tokens]])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def negative_log_likelihood(model, prompt, tokens):
    p = log_probs(model, prompt, tokens)
    return -float(p.gather(1, torch.tensor(tokens)[:, None]).sum())
