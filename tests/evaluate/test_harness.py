"""lm-eval on a tiny DenseRetNet, with a task file and data of our own: no network."""

import json
import os
import subprocess
import sys

import pytest
import torch

from retort import DenseRetNetConfig, DenseRetNetForCausalLM
from retort.errors import ConfigurationError
from retort.evaluate import harness
from retort.evaluate.perplexity import token_nll
from tests.conftest import ROOT
from tests.distill.tokenizers import byte_level

ROWS = [
    {"question": "the cat", "choices": [" sat", " don't", " old house"]},
    {"question": "the", "choices": [" street", " mat", " x"]},
    {"question": "they know it's", "choices": [" green", " the", " hello"]},
]
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def model():
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_v_select_scale": 4}
    tokenizer = byte_level()
    config = DenseRetNetConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3)
    return DenseRetNetForCausalLM(config).eval(), tokenizer


def likeliest(made, tokenizer, row):
    """Index of the choice with the highest likelihood, by our own function."""
    context = tokenizer(row["question"])["input_ids"]
    whole = [tokenizer(row["question"] + choice)["input_ids"] for choice in row["choices"]]
    scores = [-token_nll(made, ids, first=len(context)).sum().item() for ids in whole]
    return scores.index(max(scores))


def test_answers_are_those_of_our_own_likelihoods(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    made, tokenizer = model()
    best = [likeliest(made, tokenizer, row) for row in ROWS]
    answers = [best[0], best[1], (best[2] + 1) % 3]
    rows = [row | {"answer": answer} for row, answer in zip(ROWS, answers, strict=True)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_choices.yaml").write_text(TASK.format(path=tmp_path / "rows.json"))
    found = harness.harness(made, tokenizer, ["local_choices"], tmp_path, batch_size=3)
    assert found["local_choices"]["acc"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_an_unknown_task_is_named(tmp_path):
    """Slow: lm-eval reads all of its own task files before it is sure."""
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigurationError, match="knows no task 'no_such'"):
        harness.harness(*model(), ["no_such"], include_path=tmp_path)


def test_without_lm_eval_the_extra_is_named():
    code = """
import sys
sys.modules["lm_eval"] = None
from retort.evaluate.harness import harness
try:
    harness(None, None, ["x"])
except Exception as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "pip install 'retort-lm[eval]'" in done.stdout
