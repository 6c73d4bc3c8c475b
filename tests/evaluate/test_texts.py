"""Totals over an engine's outputs."""

from types import SimpleNamespace

import pytest

from retort.errors import RetortError
from retort.evaluate.texts import generate_texts


class FakeEngine:
    """Answers each prompt with itself; the first row took 2 steps for 3 tokens, the other 1."""

    def generate(self, prompts, **sampling):
        self.sampling = sampling
        rows = [(2, 4, 1, [7, 8, 9]), (1, 0, 0, [5])]
        return [
            SimpleNamespace(
                text=prompt.upper(),
                token_ids=ids,
                finish_reason="stop",
                stats=SimpleNamespace(steps=s, draft_tokens=d, accepted_tokens=a),
            )
            for prompt, (s, d, a, ids) in zip(prompts, rows, strict=True)
        ]


def test_totals_and_order():
    engine = FakeEngine()
    found = generate_texts(engine, ["a", "b"], max_new_tokens=3)
    assert found.texts == ("A", "B") and found.token_ids == ((7, 8, 9), (5,))
    assert engine.sampling == {"max_new_tokens": 3}
    assert found.tokens == 4 and found.tokens_per_step == pytest.approx(4 / 3)
    assert found.mean_draft_length == pytest.approx(4 / 3)
    assert found.accepted_tokens == 1
    assert found.tokens_per_second == pytest.approx(4 / found.seconds)


def test_no_step_means_not_measured():
    engine = SimpleNamespace(generate=lambda prompts: [])
    found = generate_texts(engine, [])
    assert found.tokens_per_step is None and found.mean_draft_length is None


def test_a_text_that_failed_is_not_judged():
    failed = SimpleNamespace(index=3, finish_reason="error", error="no memory")
    with pytest.raises(RetortError, match=r"row 3.*no memory"):
        generate_texts(SimpleNamespace(generate=lambda prompts: [failed]), ["a"])
