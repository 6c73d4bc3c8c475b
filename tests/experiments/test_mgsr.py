"""The experiment's runner at toy size: cells chain, are not repeated, and record what they took."""

import json
import sys
from pathlib import Path

import pytest

from tests.distill.toys import llama, tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "mgsr"
MODULES = ("cells", "settings", "training", "judging", "run", "table")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def experiment(monkeypatch):
    """The experiment's modules, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cells
    import run
    import settings
    import table

    yield {"cells": cells, "run": run, "settings": settings, "table": table}
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def toy(experiment, tmp_path):
    """(settings, places) of a tiny model on a few rows."""
    made, words = tokenizer(), ("cat", "dog", "house", "tree", "sun", "road")
    made.chat_template = TEMPLATE
    llama(1, layers=3).save_pretrained(tmp_path / "model")
    made.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    names = ("dolly_train", "dolly_valid", *experiment["settings"].SETS)
    for name in names:
        rows = [{"id": f"{name}/{w}", "prompt": f"A {w}?", "reference": f"the {w}"} for w in words]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = experiment["settings"].Settings(
        model=str(tmp_path / "model"),
        student_layers=2,
        teacher_tokens=200,
        base_tokens=200,
        method_tokens=300,
        tuning_tokens=100,
        max_length=64,
        max_completion_length=6,
        batch_size=2,
        prompts=2,
        max_new_tokens=4,
    )
    places = experiment["settings"].Places(data, tmp_path / "work", tmp_path / "results")
    return settings, places


def cell(experiment, name):
    return next(c for c in experiment["cells"].plan() if c.name == name)


def test_names_are_unique_and_the_first_seed_of_the_main_table_comes_first(experiment):
    cells = experiment["cells"]
    plan = cells.plan()
    assert len({c.name for c in plan}) == len(plan)
    order = [c.name for c in plan]
    first = [order.index(f"main-{m}-seed1") for m in cells.METHODS]
    assert max(first) < min(order.index(f"main-{m}-seed2") for m in cells.METHODS)
    assert max(first) < min(i for i, c in enumerate(plan) if c.stage in ("ablation", "variant"))
    for index, each in enumerate(plan):  # what a cell reads comes before it
        if each.learning_rate is None and not each.retnet:
            assert all(order.index(t.name) < index for t in cells.tuning(each.method))


def test_cells_chain_and_tuning_chooses_the_rate(experiment, toy):
    settings, places = toy
    rates = experiment["cells"].LEARNING_RATES
    tuned = [f"tune-mgsr-{rate:g}-seed0" for rate in rates]
    names = ["teacher-sft-seed0", "base-sft-seed0", *tuned, "main-mgsr-seed1"]
    for name in names:
        experiment["run"].run_cell(cell(experiment, name), settings, places)
    record = json.loads(places.result("main-mgsr-seed1").read_text())
    trials = [json.loads(places.result(name).read_text()) for name in tuned]
    best = max(trials, key=lambda trial: trial["validation"]["mean"])
    assert record["learning_rate"] == best["learning_rate"]
    assert 300 <= record["training"]["student_tokens"] < 500
    assert set(record["tests"]["sets"]) == set(experiment["settings"].SETS)
    assert all(len(s["scores"]) == 2 for s in record["tests"]["sets"].values())
    text = json.dumps(record)
    assert str(places.work) not in text and str(places.data) not in text
    assert record["provenance"]["versions"]["torch"]
    table = experiment["table"].markdown(places.results)
    assert "| mgsr | 1 |" in table and "| teacher | 1 |" in table


def test_every_cell_is_a_configuration_that_holds(experiment, toy):
    """A preset or override that contradicts another one is found here, not after hours."""
    from dataclasses import replace

    import training

    settings = replace(toy[0], tuning_tokens=0)
    toy[1].work.mkdir()
    for name in ("teacher-sft-seed0", "base-sft-seed0", "retnet-base-kd-seed0"):
        toy[1].model(name).symlink_to(settings.model)
    for each in experiment["cells"].plan():
        chosen = toy[0] if each.stage == "tune" else settings
        config = training.configuration(each, chosen, toy[1])
        assert config.method == each.method and config.max_steps > 0


def test_a_killed_cell_goes_on_and_a_finished_one_is_left(experiment, toy, monkeypatch):
    settings, places = toy
    run, teacher = experiment["run"], cell(experiment, "teacher-sft-seed0")
    import judging

    monkeypatch.setattr(judging, "tests", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        run.run_cell(teacher, settings, places)  # trained, not judged
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(FOLDER))
    run.run_cell(teacher, settings, places)
    assert places.result(teacher.name).is_file()
    started = []
    monkeypatch.setattr(run, "start", started.append)
    arguments = ["run.py", "--data", str(places.data), "--work-dir", str(places.work)]
    arguments += ["--results", str(places.results)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "teacher", "base"])
    run.main()
    assert [c.name for c in started] == ["base-sft-seed0"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--prompts", "7"])
    with pytest.raises(SystemExit, match="prompts"):
        run.main()


def test_a_method_that_is_not_there_yet_is_named(experiment, toy):
    from dataclasses import replace

    unknown = replace(cell(experiment, "main-kd-seed1"), method="nothing")
    with pytest.raises(SystemExit, match="no method 'nothing' yet"):
        experiment["run"].run_cell(unknown, *toy)
