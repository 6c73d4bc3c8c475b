"""One table out of many runs: cells kept by hash, verdicts, a page, bad input."""

import json

import pytest

from retort.cli import run as command
from retort.errors import ConfigurationError
from retort.evaluate import runs as evaluating
from retort.evaluate.cells import Judge
from retort.evaluate.runs import EvaluationSettings, compare, evaluate_runs
from tests.distill.toys import llama, tokenizer

SETTINGS = EvaluationSettings(max_new_tokens=4)
ROWS = [{"prompt": f"count {i}", "reference": f"{i} cats", "answer": str(i)} for i in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs with seeds, a teacher, a set of questions and one of plain texts."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in ("first", 1), ("second", 2), ("teacher", 3):
        llama(seed).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        (folder / name / "provenance.json").write_text(json.dumps({"seeds": {"seed": seed}}))
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "plain.jsonl").write_text('{"text": "the cat sat on the mat"}\n')
    return folder


def table(place, output, teacher=None):
    names = [str(place / n) for n in ("first", "second")]
    data = [place / "qa.jsonl", place / "plain.jsonl"]
    return evaluate_runs(names, data, output, SETTINGS, teacher)


def test_cells_hold_what_their_rows_allow_and_link_run_and_seed(place, tmp_path):
    found = table(place, tmp_path, str(place / "teacher"))
    qa, plain = found["cells"][:2]
    wanted = {"rouge_l", "exact_match", "perplexity", "distinct_1", "distinct_2", "tokens"}
    taught = {"acceptance", "exposure_bias", "tokens_per_step"}
    assert set(qa["metrics"]) == wanted | taught and set(plain["metrics"]) == {"perplexity"}
    assert qa["seed"] == 1 and qa["run"].endswith("first") and len(qa["scores"]["rouge_l"]) == 4
    assert 1 <= qa["metrics"]["tokens_per_step"] <= 5 and 0 < qa["metrics"]["acceptance"] <= 1
    assert [c["seed"] for c in found["cells"]] == [1, 1, 2, 2]


def test_a_killed_evaluation_judges_only_what_is_missing(place, tmp_path, monkeypatch):
    judged, alive, real = [], [True], Judge.judge

    def counted(self, rows):
        judged.append((self.folder.name, len(rows)))
        if len(judged) == 3 and alive:
            alive.clear()
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(Judge, "judge", counted)
    with pytest.raises(KeyboardInterrupt):
        table(place, tmp_path)
    assert [name for name, _ in judged] == ["first", "first", "second"]
    found = table(place, tmp_path)
    assert [name for name, _ in judged[3:]] == ["second", "second"] and len(found["cells"]) == 4


@pytest.mark.parametrize("text", ["", '{"metrics": {', "[]", '{"metrics": {}}'])
def test_a_damaged_cell_is_judged_again(place, tmp_path, text):
    whole = table(place, tmp_path)["cells"]
    files = sorted((tmp_path / "cells").iterdir())
    files[0].write_text(text)
    assert table(place, tmp_path)["cells"] == whole
    assert json.loads(files[0].read_text())["metrics"]


def test_a_cell_belongs_to_model_data_teacher_and_settings(place, tmp_path):
    names = {evaluating.cell_hash(place / "first", place / "qa.jsonl", None, SETTINGS)}
    names.add(evaluating.cell_hash(place / "second", place / "qa.jsonl", None, SETTINGS))
    names.add(evaluating.cell_hash(place / "first", place / "plain.jsonl", None, SETTINGS))
    names.add(
        evaluating.cell_hash(place / "first", place / "qa.jsonl", place / "teacher", SETTINGS)
    )
    other = EvaluationSettings(max_new_tokens=5)
    names.add(evaluating.cell_hash(place / "first", place / "qa.jsonl", None, other))
    assert len(names) == 5


def test_verdicts_are_better_worse_or_not_separable():
    def cell(run, scores):
        return {"run": run, "dataset": "d", "scores": {"rouge_l": scores}}

    base, noise = [float(i) for i in range(40)], [(-1.0) ** i for i in range(40)]
    up, same = [x + 1 for x in base], [x + n for x, n in zip(base, noise, strict=True)]
    cells = [cell("b", base), cell("up", up), cell("same", same)]
    found = {c.run: c.verdict for c in compare({"cells": cells}, "b")}
    assert found == {"up": "better", "same": "not separable"}
    assert {c.run: c.verdict for c in compare({"cells": cells}, "up")}["b"] == "worse"
    with pytest.raises(ConfigurationError, match="none of the runs"):
        compare({"cells": cells}, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("{}\n", "row 1"),
        ('{"prompt": "a"}\n[]\n', "row 2"),
        ("x\n", "row 1"),
        ('{"prompt": ["a"]}\n', "row 1: 'prompt' must be text"),
        ('{"prompt": "a"}\n{"text": 3}\n', "row 2: 'text' must be text"),
        ('{"prompt": "a", "reference": [1]}\n', "row 1: 'reference'"),
    ],
)
def test_data_that_cannot_be_judged_is_refused(place, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        evaluate_runs([str(place / "first")], [tmp_path / "bad.jsonl"], tmp_path, SETTINGS)


def test_a_row_may_hold_a_line_separator(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a\u2028b\u0085c"}\n\n{"text": "d"}\n', "utf-8")
    rows = [{"prompt": "a\u2028b\u0085c"}, {"text": "d"}]
    assert evaluating.read_rows(file, None) == rows and evaluating.read_rows(file, 1) == rows[:1]


def test_runs_and_sets_have_names_of_their_own(place, tmp_path):
    run, data = str(place / "first"), place / "qa.jsonl"
    for names, sets in ([run, run], [data]), ([run], [data, data]), ([run], []):
        with pytest.raises(ConfigurationError, match="once"):
            evaluate_runs(names, sets, tmp_path, SETTINGS)
    with pytest.raises(ConfigurationError, match="no file"):
        evaluate_runs([run], [place / "none.jsonl"], tmp_path, SETTINGS)


def test_the_command_prints_a_table_and_writes_json_and_a_page(place, tmp_path, capsys):
    names = [str(place / n) for n in ("first", "second")]
    more = ["--data", str(place / "qa.jsonl"), "--output", str(tmp_path), "--max-new-tokens", "4"]
    assert command(["evaluate", *names, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["data", "metric", "run"] and len(lines) == 1 + 2 * 6
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    page = (tmp_path / "evaluation.html").read_text()
    for cell in stored["cells"]:
        assert f"cells/{cell['cell']}.json" in page and (tmp_path / "cells").is_dir()
        assert f"seed {cell['seed']}" in page
    assert {c["metric"] for c in stored["comparisons"]} == {"rouge_l", "exact_match"}
    assert command(["evaluate", *names, *more, "--baseline", "other"]) == 2
