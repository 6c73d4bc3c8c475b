"""``retort generate`` from file to file: every row once, in order, whatever kills the run."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from retort import cli
from retort.batch.output import OutputFile
from retort.errors import ConfigurationError
from tests.serve import tiny

FIXED = ["--drafter", "prompt-lookup", "--draft-budget", "3", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("batch") / "tiny")


@pytest.fixture
def run(folder, tmp_path, capfd):
    """Write lines to a file, run over it; exit code, output rows, and what was said."""

    def call(lines, *flags, name="in.jsonl", out=None):
        source, out = tmp_path / name, out or tmp_path / "out.jsonl"
        data = [x if isinstance(x, (bytes, str)) else json.dumps(x) for x in lines]
        data = [x if isinstance(x, bytes) else x.encode() for x in data]
        source.write_bytes(b"".join(x + b"\n" for x in data))
        code = cli.run(["generate", str(folder), "-i", str(source), "-o", str(out), *FIXED, *flags])
        found = out.read_text().splitlines() if out.suffix == ".jsonl" and out.is_file() else []
        return code, [json.loads(line) for line in found], capfd.readouterr().err

    return call


def prompts(count):
    """Rows of one to nine words, some with ids of their own."""
    words = tiny.TEXT.split()
    texts = [" ".join(words[i % 7 : i % 7 + 1 + i % 9] * 2) for i in range(count)]
    return [
        {"prompt": t} if i % 2 else {"id": f"row {i}", "prompt": t} for i, t in enumerate(texts)
    ]


def test_rows_come_in_order_and_are_the_engines(run, folder):
    rows = prompts(90)  # more than the window holds
    code, found, said = run(rows, "--max-batch-size", "4")
    assert code == 0 and "90 of 90 rows" in said and "of drafts accepted" in said
    assert [r["id"] for r in found] == [r.get("id", i) for i, r in enumerate(rows)]
    with tiny.load_engine(folder, drafter=None) as engine:
        outputs = engine.generate([r["prompt"] for r in rows], max_new_tokens=8)
    assert [r["token_ids"] for r in found] == [o.token_ids for o in outputs]
    assert [r["text"] for r in found] == [o.text for o in outputs]


def kill(folder, tmp_path, count, kills, patience=280):
    source, out, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    whole = tmp_path / "whole.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in prompts(count)))
    command = ["generate", str(folder), "-i", str(source), *FIXED, "--max-batch-size", "2", "-o"]
    assert cli.run([*command, str(whole)]) == 0
    script = Path(__file__).with_name("kill_loop.py")
    done = subprocess.run(
        [sys.executable, str(script), str(kills), str(log), *command, str(out)],
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(size) for size in log.read_text().split()]
    assert len(sizes) == kills and sizes == sorted(sizes) and sizes[-1] < out.stat().st_size
    assert out.read_bytes() == whole.read_bytes()
    assert len(out.read_text().splitlines()) == count


def test_killed_twice_equals_an_unbroken_run(folder, tmp_path):
    kill(folder, tmp_path, count=60, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times_over_500_rows_equals_an_unbroken_run(folder, tmp_path):
    kill(folder, tmp_path, count=500, kills=10, patience=3000)


def test_every_place_where_a_file_can_break_off(run, tmp_path):
    rows, out = prompts(5), tmp_path / "out.jsonl"
    _, whole, _ = run(rows)
    text = out.read_bytes()
    for cut in (1, len(text) // 2, text.index(b"\n"), text.index(b"\n") + 1, len(text) - 1):
        out.write_bytes(text[:cut])
        code, found, said = run(rows)
        assert code == 0 and found == whole and out.read_bytes() == text
        assert ("are there already" in said) == (b"\n" in text[:cut])
    code, found, said = run(rows)
    assert code == 0 and found == whole and "5 rows are there already" in said


@pytest.mark.parametrize("bad", [b'{"prompt": "x"', b"\xff\xfe", "[1]", {"id": 3}, {"prompt": ""}])
def test_a_corrupt_line_is_named(run, bad):
    rows = [*prompts(3), bad, *prompts(6)[3:]]
    code, found, said = run(rows)
    assert code == 2 and "line 4" in said.splitlines()[-1]
    assert len(found) == 3, "the lines before it are answered"
    code, found, said = run(rows, "--on-error", "skip")
    assert code == 0 and "line 4 passed over" in said and "1 passed over" in said
    assert len(found) == 6
    assert [r["prompt"] for r in found] == [r["prompt"] for r in prompts(6)]


def test_equal_ids_are_refused(run):
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"}]
    code, found, said = run(rows)
    assert code == 2 and "line 3" in said and "that of line 1" in said and len(found) == 2


def test_a_prompt_over_the_context_and_a_row_that_fails(run, monkeypatch):
    rows = [*prompts(2), {"prompt": "the cat " * 900}, *prompts(4)[2:]]
    code, found, said = run(rows)
    assert code == 2 and "line 3" in said and len(found) == 2
    code, found, said = run(rows, "--on-error", "skip")
    assert code == 0 and len(found) == 4 and "line 3 passed over" in said


def test_other_options_or_other_files_are_not_touched(run, tmp_path):
    rows, out = prompts(3), tmp_path / "out.jsonl"
    run(rows)
    before = out.read_bytes()
    code, _, said = run(rows, "--max-new-tokens", "4")
    assert code == 2 and "max_new_tokens=8, now it is 4" in said and out.read_bytes() == before
    code, found, _ = run(rows, "--max-new-tokens", "4", "--overwrite")
    assert code == 0 and all(len(r["token_ids"]) <= 4 for r in found)
    diary = tmp_path / "diary.txt"
    diary.write_text("dear diary\n")
    code, _, said = run(rows, out=diary)
    assert code == 2 and "was not written by" in said and diary.read_text() == "dear diary\n"


def test_answers_to_other_prompts_are_not_taken_for_these(run, tmp_path):
    rows, out = prompts(3), tmp_path / "out.jsonl"
    run(rows)
    before = out.read_bytes()
    for flags in ([], ["--on-error", "skip"]):
        code, _, said = run([rows[0], {"prompt": "another"}, rows[2]], *flags)
        assert code == 2 and "line 2" in said and "to another prompt" in said.splitlines()[-1]
        assert out.read_bytes() == before


def test_a_batch_is_resumed_for_the_same_bodies_only(run, tmp_path):
    rows, out = [batch(0, temperature=0), batch(1, max_tokens=-1)], tmp_path / "out.jsonl"
    _, whole, _ = run(rows)
    before = out.read_bytes()
    assert run(rows)[1] == whole and out.read_bytes() == before
    for other in ([rows[0], batch(1, max_tokens=2)], [batch(0, temperature=1), rows[1]]):
        code, _, said = run(other)
        assert code == 2 and "to another prompt" in said.splitlines()[-1]
        assert out.read_bytes() == before


def test_a_run_goes_on_with_the_same_model_wherever_it_lies(run, folder, tmp_path):
    rows, out, source = prompts(4), tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    _, whole, _ = run(rows[:2])
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-i", str(source), "-o", str(out), *FIXED]
    moved = shutil.copytree(folder, tmp_path / "moved" / folder.name)
    assert cli.run(["generate", str(moved), *command]) == 0
    before = out.read_bytes()
    assert [json.loads(line) for line in before.splitlines()][:2] == whole
    assert before.count(b"\n") == 4


def test_a_model_that_was_trained_further_is_another(run, folder, tmp_path, capfd):
    rows, out, source = prompts(2), tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    run(rows)
    before = out.read_bytes()
    other = shutil.copytree(folder, tmp_path / "other" / folder.name)
    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[0]
    save_file(
        {**weights, name: weights[name] * 1.01}, other / "model.safetensors", {"format": "pt"}
    )
    code = cli.run(["generate", str(other), "-i", str(source), "-o", str(out), *FIXED])
    assert code == 2 and out.read_bytes() == before
    assert "was begun with model='tiny " in capfd.readouterr().err.splitlines()[-1]


def test_two_runs_never_share_an_output(tmp_path):
    first = OutputFile(tmp_path / "out.jsonl", {}, {})
    with pytest.raises(ConfigurationError, match="by another run"):
        OutputFile(tmp_path / "out.jsonl", {}, {})
    first.close()
    OutputFile(tmp_path / "out.jsonl", {}, {}).close()


def test_a_full_disk_is_one_line(run, monkeypatch):
    from retort.batch import output

    rows, wrote, whole = prompts(6), [], output._line

    def line(row):
        wrote.append(row)
        if len(wrote) == 4:
            raise OSError(28, "No space left on device")
        return whole(row)

    with monkeypatch.context() as patch:
        patch.setattr(output, "_line", line)
        code, found, said = run(rows)
    assert code == 2 and len(found) == 3 and "No space left" in said.splitlines()[-1]
    code, found, _ = run(rows)
    assert code == 0 and len(found) == 6


def test_unwritable_places(run, tmp_path):
    for out in (tmp_path / "no" / "out.jsonl", tmp_path):
        code, _, said = run(prompts(1), out=out)
        assert code == 2 and "it must be a file in a folder" in said.splitlines()[-1]
    code, _, said = run(prompts(1), out=tmp_path / "in.jsonl")
    assert code == 2 and "is the input" in said


def test_from_standard_input_to_standard_output(folder, monkeypatch, capfdbinary):
    lines = b'{"prompt": "the cat"}\nthe old house\n\n{"id": 7, "prompt": "don\'t"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert cli.run(["generate", str(folder), "-i", "-", *FIXED]) == 0
    found = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [r["id"] for r in found] == [0, 1, 7]
    assert [r["prompt"] for r in found] == ["the cat", "the old house", "don't"]


def test_prompts_of_the_command_line_go_to_a_file_as_they_stand(folder, tmp_path, capfd):
    out, texts = tmp_path / "out.jsonl", ["the\ncat", '{"prompt": "dog"}', " \n", "\u2028the"]
    flags = [flag for text in texts for flag in ("-p", text)]
    assert cli.run(["generate", str(folder), *flags, "-o", str(out), *FIXED]) == 0
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [r["prompt"] for r in found] == texts
    with tiny.load_engine(folder, drafter=None) as engine:
        outputs = engine.generate(texts, max_new_tokens=8)
    assert [r["token_ids"] for r in found] == [o.token_ids for o in outputs]


@pytest.mark.parametrize("text", ["", "\udcff"])
def test_a_prompt_of_the_command_line_that_is_no_text_is_named(folder, tmp_path, capfd, text):
    out = tmp_path / "out.jsonl"
    assert cli.run(["generate", str(folder), "-p", text, "-o", str(out), *FIXED]) == 2
    assert "line 1" in capfd.readouterr().err.splitlines()[-1]


def test_lone_surrogates_end_no_run(run, tmp_path):
    rows = [
        {"id": "\ud800", "prompt": "the cat"},
        {"id": "a", "prompt": "the \ud800"},
        {"id": "b", "messages": [{"role": "\ud800", "content": "x"}]},
        {**batch(0, seed=1), "custom_id": "\udfff"},
        {**batch(1), "custom_id": "\udffe"},
    ]
    code, found, said = run(rows, "--on-error", "skip")
    assert code == 0 and said.count(" passed over: ") == 2
    assert [r.get("id") if i < 1 else r["custom_id"] for i, r in enumerate(found)] == [
        *("\ud800", "\udfff", "\udffe")
    ]
    before = (tmp_path / "out.jsonl").read_bytes()
    code, found, said = run(rows, "--on-error", "skip")
    assert code == 0 and (tmp_path / "out.jsonl").read_bytes() == before


def batch(i, url="/v1/chat/completions", **body):
    message = {"messages": [{"role": "user", "content": f"the cat {i}"}]}
    given = message if "chat" in url else {"prompt": f"the cat {i}"}
    body = {"max_tokens": 6, **given, **body}
    return {"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}


def test_openais_batch_format_is_answered_as_by_the_server(run, folder):
    text = "/v1/completions"
    rows = [
        batch(0, temperature=0),
        batch(1, text, temperature=0, logprobs=2, n=2, echo=True),
        batch(2, seed=5, logprobs=True, top_logprobs=3),
        batch(3, text, stop=["T"], seed=9, presence_penalty=1.0),
        batch(4, text, max_tokens=-1),
        batch(5, tools=[{"type": "function"}]),
        batch(6, temperature=1.0),
    ]
    code, found, _ = run(rows)
    assert code == 0 and [r["custom_id"] for r in found] == [r["custom_id"] for r in rows]
    changing = {"id", "created", "usage", "model", "system_fingerprint"}
    with tiny.in_process(folder) as served:
        for row, answer in zip(rows[:6], found, strict=False):
            expected = served.post(row["url"], **row["body"])
            assert answer["response"]["status_code"] == expected.status_code
            mine, theirs = answer["response"]["body"], expected.json()
            for name in theirs.keys() - changing:
                assert mine[name] == theirs[name]
            if "usage" in theirs:
                assert mine["usage"]["total_tokens"] == theirs["usage"]["total_tokens"]
    again = run([batch(6, temperature=1.0)], "--overwrite")[1]
    assert again[0]["response"]["body"]["choices"] == found[6]["response"]["body"]["choices"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"url": "/v1/embeddings", "body": {}, "custom_id": "a"}, "is not a POST to"),
        ({"url": "/v1/completions", "body": {}}, "has no custom_id"),
        ({**batch(1), "method": "GET"}, "is not a POST to"),
    ],
)
def test_wrong_batch_lines(run, row, text):
    code, _, said = run([row])
    assert code == 2 and text in said and "line 1" in said


def test_wrong_flags(run):
    assert run(prompts(1), "--on-error", "panic")[0] == 2
    assert run([], name="empty.jsonl")[0] == 2
