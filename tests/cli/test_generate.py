"""``retort generate`` on the real model, and what it refuses before loading one."""

import json
import os

import pytest
import torch

from retort import cli
from retort.cli.generate import parse_budget
from retort.errors import ConfigurationError

MODEL = "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt; give --prompt TEXT or --input FILE"),
        (["-i", "no-such.jsonl"], "cannot read no-such.jsonl"),
        (["-p", "x", "-o", "no/such/folder/out.jsonl"], "it must be a file in a folder"),
        (["-p", "x", "-o", "."], "it must be a file in a folder"),
        (["-p", "x", "--draft-budget", "-1"], "none of auto, counts and a whole number"),
    ],
)
def test_refused_before_the_model_is_loaded(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("retort.models.zoo.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert cli.run(["generate", MODEL, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("device", ["cuda:99", "zzz"])
def test_a_device_that_is_not_there(capsys, tiny_llama, device):
    assert cli.run(["generate", str(tiny_llama), "-p", "x", "--device", device]) == 2
    captured = capsys.readouterr()
    assert f"device '{device}' cannot be used" in captured.err
    assert captured.err.count("\n") == 2  # "Loading", and the error


def test_an_output_that_is_no_regular_file_is_refused(capsys, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert cli.run(["generate", MODEL, "-p", "x", "-o", str(pipe)]) == 2
    assert "it must be a file" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_budget():
    assert parse_budget("auto") == "auto"
    assert parse_budget("4") == 4
    with pytest.raises(ConfigurationError):
        parse_budget("four")


@pytest.mark.parametrize("drafter", [[], ["--drafter", "prompt-lookup", "--draft_budget", "4"]])
def test_file_to_file_equals_transformers(
    capsys, tmp_path, zoo_folder, zoo_model, zoo_tokenizer, drafter
):
    texts = ["One two three four one two three", "The capital of France is", "a, b, c, a, b, c,"]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = ["-i", str(prompts), "-o", str(out), "--max-new-tokens", "12", *drafter]
    assert cli.run(["generate", str(zoo_folder), *arguments]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == texts
    for row, text in zip(rows, texts, strict=True):
        ids = zoo_tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            whole = zoo_model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist()
        assert row["token_ids"] == whole[ids["input_ids"].shape[1] :]
    record = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    assert record["arguments"]["max_new_tokens"] == 12
    assert capsys.readouterr().out == ""


def test_chat_text_and_json_on_standard_output(capsys, zoo_folder):
    question = ["--chat", "-p", "What is the capital of France?", "--max-new-tokens", "16"]
    assert cli.run(["generate", str(zoo_folder), *question]) == 0
    assert "Paris" in capsys.readouterr().out
    assert cli.run(["generate", str(zoo_folder), *question, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["finish_reason"] == "stop"
    assert row["stats"]["steps"] >= 1


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_prompt_over_the_context_is_named(capsys, tmp_path, zoo_folder, on_error):
    file, out = tmp_path / "long.txt", tmp_path / "out.jsonl"
    file.write_text("short\n" + "word " * 9000 + "\nlast\n")
    arguments = ["-i", str(file), "-o", str(out), "--max-new-tokens", "2", "--on-error", on_error]
    assert cli.run(["generate", str(zoo_folder), *arguments]) == (2 if on_error == "stop" else 0)
    assert "line 2" in capsys.readouterr().err
    found = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert found == (["short"] if on_error == "stop" else ["short", "last"])
