"""Evaluation by generated text: its scores, and that training goes on as if there were none."""

import json

import pytest
import torch

from retort.errors import ConfigurationError
from retort.text_scores import distinct_n, rouge_l
from tests.distill.toys import ROWS, config, greedy_text, lettered, llama, trainer, weights


def rows_of(student, count=4):
    """Rows whose first half is what the student says, so that scores are above zero."""
    said = [greedy_text(student, row["prompt"], 8) for row in ROWS[:count]]
    half = count // 2
    return [
        {**row, "completion": text if i < half else row["completion"]}
        for i, (row, text) in enumerate(zip(ROWS[:count], said, strict=True))
    ], said


def test_scores_are_those_of_the_students_greedy_texts(tmp_path):
    student = lettered(llama(2))
    rows, said = rows_of(student)
    how = {"method": "sft", "predict_with_generate": True, "rollout_batch_size": 2}
    found = trainer(tmp_path, student, eval_dataset=rows, **how).evaluate()
    scores = [rouge_l(t, r["completion"]) for t, r in zip(said, rows, strict=True)]
    assert scores[:2] == [100, 100] and found["eval_rouge_l"] == sum(scores) / 4
    assert found["eval_distinct_1"] == distinct_n(said, 1) > 0
    assert found["eval_distinct_2"] == distinct_n(said, 2)
    assert found["eval_gen_len"] == 8 and "eval_sft" in found
    first = trainer(tmp_path, student, eval_dataset={"a": rows, "b": rows[2:]}, max_eval_rows=1)
    assert "eval_a_rouge_l" not in first.evaluate()
    first.config.predict_with_generate = True
    found = first.evaluate()
    assert found["eval_a_rouge_l"] == 100 and found["eval_b_rouge_l"] == scores[2]


def test_training_is_bit_for_bit_what_it_is_without(tmp_path):
    """With dropout, which draws from the generators that a text must not touch."""
    ends = []
    for name, more in ("plain", {}), ("with", {"predict_with_generate": True, "report_samples": 2}):
        how = {"disable_dropout": False, "eval_dataset": ROWS[:3], "eval_strategy": "steps"}
        student = llama(2, attention_dropout=0.3)
        run = trainer(tmp_path / name, student, eval_steps=1, **how, **more)
        run.train()
        ends.append(weights(run.model))
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name
    lines = map(json.loads, (tmp_path / "with" / "training.jsonl").read_text().splitlines())
    assert sum("eval_rouge_l" in line for line in lines) == 4


def test_rows_without_a_prompt_to_answer_are_refused(tmp_path):
    how = {"method": "sft", "predict_with_generate": True}
    with pytest.raises(ConfigurationError, match="completion_only_loss=False contradicts predict"):
        config(tmp_path, completion_only_loss=False, **how)
    with pytest.raises(ConfigurationError, match="rows of 'text'"):
        trainer(tmp_path, eval_dataset=[{"text": "the cat sat"}], **how)
