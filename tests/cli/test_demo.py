"""``retort demo``: the whole of it at toy size, and what it refuses before it writes anything."""

import json
from types import SimpleNamespace

import pytest

from retort import cli
from retort.cli.demo_records import read_rows, write_rows
from retort.cli.demo_stages import Demo, Size
from tests.distill.toys import llama, tokenizer
from tests.experiments.toys import TEMPLATE


@pytest.mark.parametrize(
    ("model", "message"),
    [("smollm2-135m-instrukt", "nearest known: smollm2-135m-instruct"), ("mamba", "mamba: ")],
)
def test_a_refused_model_leaves_nothing_behind(capsys, monkeypatch, tmp_path, model, message):
    from transformers import MambaConfig

    MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1).save_pretrained(
        tmp_path / "mamba"
    )
    (tmp_path / "mamba" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("retort.models.loader.load_model", lambda *_, **__: pytest.fail("loaded"))
    name = "./mamba" if model == "mamba" else model
    assert cli.run(["demo", "--quick", "--output-dir", "run", "--model", name]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_texts_own_line_ends_stay_in_its_row(tmp_path):
    """JSON leaves U+0085 and U+2028 as they are; `str.splitlines` would cut a row there."""
    output = SimpleNamespace(text="a\x85b\u2028c", prompt_token_ids=[3], token_ids=[1, 2])
    write_rows(tmp_path, "dev", [[{"role": "user", "content": "d\u2029e"}]], [output])
    (row,) = read_rows(tmp_path, "dev")
    assert row["text"] == output.text and row["prompt"][0]["content"] == "d\u2029e"


def test_the_whole_demo_leaves_a_report_and_repeats_nothing(tmp_path, monkeypatch):
    made = tokenizer()
    made.chat_template = TEMPLATE
    made.save_pretrained(tmp_path / "model")
    llama(1, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    size = Size(6, train_prompts=4, dev_prompts=2, answer_tokens=4, steps=2, layers=2, rounds=1)
    demo = Demo(tmp_path / "run", str(tmp_path / "model"), size)
    page = demo.run().read_text(encoding="utf-8")
    compared = json.loads((tmp_path / "run" / "drafting.stage.json").read_text())
    assert len(compared) == 6 and all(row["outputs_equal"] for row in compared)
    assert all(row["arm"] in page for row in compared)
    rows = [json.loads(line) for line in (tmp_path / "run" / "dev.jsonl").read_text().splitlines()]
    judged = json.loads((tmp_path / "run" / "after.stage.json").read_text())
    assert len(rows) == len(judged["texts"]) == len(judged["rouge_l"]) == 2
    assert all(0 < len(row["completion_ids"]) <= 4 for row in rows)
    monkeypatch.setattr("retort.models.zoo.load_model", lambda *_, **__: pytest.fail("loaded"))
    again = Demo(tmp_path / "run", str(tmp_path / "model"), size)
    assert again.run() == tmp_path / "run" / "report.html"
