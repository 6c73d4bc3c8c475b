"""``lm_eval --model local-completions`` against the server, on a task of local data."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from retort.models.zoo import load_model, load_tokenizer
from tests.serve import tiny

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("lm_eval", "tenacity", "aiohttp")),
    reason="needs lm-eval with its api extra",
)

ROWS = [
    {"question": "the cat sat on", "choices": [" the mat", " the house"], "answer": 0},
    {"question": "the old house in", "choices": [" the street", " green"], "answer": 0},
    {"question": "don't they", "choices": [" the", " know it's green"], "answer": 1},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["T:"], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def samples(folder, task):
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def test_scores_and_texts_are_the_models(served, folder, engine, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=data))
    (tmp_path / "write.yaml").write_text(WRITE.format(data=data))
    address = f"model={tiny.NAME},base_url={served.url}/v1/completions,num_concurrent=2"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", f"{address},max_retries=1,tokenizer={folder}"]
    command += ["--tasks", "tiny_choice,tiny_write", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, **offline, "NO_PROXY": "127.0.0.1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for row, sample in zip(ROWS, samples(tmp_path / "out", "tiny_choice"), strict=True):
        for choice, (answer,) in zip(row["choices"], sample["resps"], strict=True):
            expected = score(model, tokenizer, row["question"], choice)
            assert float(answer[0]) == pytest.approx(expected, abs=1e-3)
    for row, sample in zip(ROWS, samples(tmp_path / "out", "tiny_write"), strict=True):
        text = engine.generate(row["question"], max_new_tokens=12, stop_strings="T:")[0].text
        assert sample["resps"][0][0] == text


def score(model, tokenizer, question, choice):
    """Log-probability of the choice's tokens after the question's."""
    ids = tokenizer(question + choice).input_ids
    start = len(tokenizer(question).input_ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
