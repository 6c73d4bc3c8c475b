"""One table out of many runs: cells kept by hash, verdicts, a page, bad input."""

import json
import math

import pytest
import torch

from retort.cli import run as command
from retort.errors import ConfigurationError
from retort.evaluate import runs as evaluating
from retort.evaluate.cells import Judge
from retort.evaluate.comparing import compare
from retort.evaluate.perplexity import perplexity
from retort.evaluate.runs import EvaluationSettings, evaluate_runs
from retort.evaluate.scores import STATISTICS
from tests.decode.toys import toy
from tests.distill.tokenizers import byte_level
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
    wanted = {"rouge_l", "exact_match", "reference_perplexity", "distinct_1", "distinct_2"}
    wanted |= {"tokens"}
    taught = {"acceptance", "exposure_bias", "tokens_per_step"}
    assert set(qa["metrics"]) == wanted | taught and set(plain["metrics"]) == {"perplexity"}
    assert qa["seed"] == 1 and qa["run"].endswith("first") and len(qa["scores"]["rouge_l"]) == 4
    assert 1 <= qa["metrics"]["tokens_per_step"] <= 5 and 0 < qa["metrics"]["acceptance"] <= 1
    assert [c["seed"] for c in found["cells"]] == [1, 1, 2, 2]
    assert set(qa["scored"].values()) == {4} and plain["scored"] == {"perplexity": 1}


def test_what_a_row_lacks_is_left_out_of_that_number_alone(place, tmp_path):
    """Four rows as above, one without a reference, one without an answer, and a plain text."""
    rows = [*map(dict, ROWS), {"text": "the cat sat on the mat"}]
    rows[1] |= {"reference": " "}
    rows[2] |= {"reference": ["", "2 cats"], "answer": " "}
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [place / "qa.jsonl", place / "plain.jsonl", tmp_path / "mixed.jsonl"]
    found = evaluate_runs([str(place / "first")], data, tmp_path, SETTINGS)
    whole, plain, mixed = found["cells"]
    kept = {"rouge_l": [0, 2, 3], "exact_match": [0, 1, 3], "reference_perplexity": [0, 2, 3]}
    for metric, places in kept.items():
        scores = mixed["scores"][metric]
        assert [i for i, score in enumerate(scores) if score is not None] == places
        assert [scores[i] for i in places] == [whole["scores"][metric][i] for i in places]
        assert mixed["scored"][metric] == 3
    assert mixed["metrics"]["perplexity"] == plain["metrics"]["perplexity"]
    assert mixed["scores"]["perplexity"][:4] == [None] * 4 and mixed["scored"]["tokens"] == 4
    assert mixed["metrics"]["rouge_l"] == sum(whole["scores"]["rouge_l"][i] for i in (0, 2, 3)) / 3


def test_what_is_longer_than_the_context_is_read_within_it(tmp_path):
    """Learned positions: one token beyond them cannot be read at all."""
    model = toy(
        "gpt2", 1, torch.float32, vocab_size=258, eos_token_id=0, max_position_embeddings=16
    )
    model.save_pretrained(tmp_path / "run")
    tokenizer().save_pretrained(tmp_path / "run")
    rows = [{"text": "abc " * 20}, {"prompt": "count", "reference": "xyz " * 20}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate_runs(
        [str(tmp_path / "run")], [tmp_path / "long.jsonl"], tmp_path / "o", SETTINGS
    )
    scores = found["cells"][0]["scores"]
    whole = perplexity(model, tokenizer(), [rows[0]["text"]], max_length=16)
    assert scores["perplexity"][0] == [pytest.approx(whole.nll * 79), 79]
    assert scores["reference_perplexity"][1][1] == 16 - len("count")


def test_a_chat_without_a_template_is_refused(place, tmp_path):
    chats = EvaluationSettings(max_new_tokens=4, as_chat=True)
    with pytest.raises(ConfigurationError, match="first has no chat template"):
        evaluate_runs([str(place / "first")], [place / "qa.jsonl"], tmp_path, chats)


def test_texts_without_a_token_to_predict_are_refused(place, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigurationError, match="no token to predict"):
        evaluate_runs([str(place / "first")], [tmp_path / "short.jsonl"], tmp_path, SETTINGS)


def test_every_mean_over_rows_is_compared(place, tmp_path):
    compared = compare(table(place, tmp_path, str(place / "teacher")), str(place / "first"))
    found = {c.metric: c for c in compared}
    assert set(found) == set(STATISTICS) and {c.prompts for c in compared} == {1, 4}
    cells = table(place, tmp_path, str(place / "teacher"))["cells"]
    for one in compared:
        base, ours = (c["metrics"] for c in cells if c["dataset"] == one.dataset)
        gain = ours[one.metric] - base[one.metric]
        assert one.difference == pytest.approx(gain) and one.low <= gain <= one.high


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


LISTED = '{"prompts": 4, "metrics": [], "scored": {}, "scores": {}}'


@pytest.mark.parametrize("text", ["", '{"metrics": {', "[]", '{"metrics": {}}', LISTED])
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


def test_a_teacher_of_another_vocabulary_is_refused_in_terms_of_evaluation(place, tmp_path):
    llama(3).save_pretrained(tmp_path / "stranger")
    byte_level().save_pretrained(tmp_path / "stranger")
    judge = Judge(place / "first", tmp_path / "stranger", SETTINGS)
    with pytest.raises(ConfigurationError, match="tokenizers differ at id") as caught:
        judge.judge(ROWS)
    assert "leave the teacher out" in str(caught.value) and "sft" not in str(caught.value)


def cells(metric, **runs):
    made = [{"run": r, "dataset": "d", "scores": {metric: scores}} for r, scores in runs.items()]
    return {"cells": made}


def test_verdicts_are_better_worse_or_not_separable():
    base, noise = [float(i) for i in range(40)], [(-1.0) ** i for i in range(40)]
    up, same = [x + 1 for x in base], [x + n for x, n in zip(base, noise, strict=True)]
    made = cells("rouge_l", b=base, up=up, same=same)
    found = {c.run: c.verdict for c in compare(made, "b")}
    assert found == {"up": "better", "same": "not separable"}
    assert {c.run: c.verdict for c in compare(made, "up")}["b"] == "worse"
    with pytest.raises(ConfigurationError, match="none of the runs"):
        compare(made, "x")


def test_a_higher_perplexity_or_exposure_bias_is_worse():
    nll = [[float(n), n] for n in range(1, 41)]
    dearer = [[1.2 * total, n] for total, n in nll]
    for metric in ("perplexity", "reference_perplexity"):
        (found,) = compare(cells(metric, b=nll, dearer=dearer), "b")
        assert found.verdict == "worse"
        assert found.difference == pytest.approx(math.exp(1.2) - math.exp(1))
    (found,) = compare(cells("acceptance", b=nll, more=dearer), "b")
    assert found.verdict == "better" and found.difference == pytest.approx(0.2)
    errs = [[[0.1 * (1 + i % 3)] * 4, [0.1 * (1 + i % 3)] * 4] for i in range(40)]
    more = [[[2 * kl for kl in own], oracle] for own, oracle in errs]
    (found,) = compare(cells("exposure_bias", b=errs, more=more), "b")
    assert found.verdict == "worse" and found.difference == pytest.approx(100)


def test_rows_that_only_one_run_has_a_score_of_are_left_out_of_the_comparison():
    base, ours = [1.0, None, 5.0, 2.0], [2.0, 9.0, None, 3.0]
    (found,) = compare(cells("rouge_l", b=base, ours=ours), "b")
    assert (found.difference, found.prompts, found.verdict) == (1.0, 2, "better")
    assert compare(cells("rouge_l", b=[1.0, None], ours=[None, 1.0]), "b") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("{}\n", "row 1"),
        (r'{"text": "a\ud800"}', "row 1: a lone surrogate"),
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
    judged = {"rouge_l", "exact_match", "reference_perplexity"}
    assert {c["metric"] for c in stored["comparisons"]} == judged
    assert command(["evaluate", *names, *more, "--baseline", "other"]) == 2


def test_the_table_says_how_many_rows_were_left_out(place, tmp_path, capsys):
    rows = [*ROWS[:3], {**ROWS[3], "reference": ""}]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--data", str(tmp_path / "qa.jsonl"), "--output", str(tmp_path / "out")]
    assert command(["evaluate", str(place / "first"), *more, "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    of = {line.split()[1]: " ".join(line.split()[4:7]) for line in lines[1:]}
    assert of["rouge_l"] == "3 of 4" and of["exact_match"] == "4 of 4"
    assert "of 3 of 4 rows" in (tmp_path / "out" / "evaluation.html").read_text()
