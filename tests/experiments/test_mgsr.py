"""The experiment's runner at toy size: cells chain, are not repeated, and record what they took."""

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.experiments.toys import save_model, save_rows

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "mgsr"
MODULES = [path.stem for path in FOLDER.glob("*.py")]


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
    save_model(tmp_path / "model", layers=4)
    (tmp_path / "data").mkdir()
    for name in ("dolly_train", "dolly_valid", *experiment["settings"].SETS):
        save_rows(tmp_path / "data" / f"{name}.jsonl")
    settings = experiment["settings"].Settings(
        model=str(tmp_path / "model"),
        student_layers=2,
        retnet_layers=2,
        teacher_tokens=200,
        base_tokens=200,
        retnet_tokens=200,
        method_tokens=300,
        tuning_tokens=100,
        max_length=64,
        max_completion_length=12,
        rows=2,
        least_step_tokens=6,
        bf16=0,
        prompts=2,
        validation_prompts=2,
        max_new_tokens=4,
        joint_prompts=3,
        joint_timed=2,
    )
    places = experiment["settings"].Places(
        tmp_path / "data", tmp_path / "work", tmp_path / "results"
    )
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
    joint = order.index("joint-drafters-seed1")
    assert all(order.index(f"retnet-main-{m}-seed1") < joint for m in cells.RETNET_METHODS)
    for index, each in enumerate(plan):  # what a cell reads comes before it
        assert cells.needs(each) <= set(order[:index])
        if each.learning_rate is None and each.stage != "joint":
            assert {t.name for t in cells.tuning(each.method)} <= cells.needs(each)


def test_cells_run_side_by_side_once_what_they_read_is_done(experiment):
    import lanes

    plan, lock = experiment["cells"].plan(), threading.Lock()
    running, ended, most = set(), [], 0

    def start(each):
        nonlocal most
        with lock:
            running.add(each.name)
            most = max(most, len(running))
            assert experiment["cells"].needs(each) <= set(ended)
        time.sleep(0.002)
        with lock:
            running.remove(each.name)
            ended.append(each.name)

    lanes.run_all(plan, 3, start)
    assert sorted(ended) == sorted(c.name for c in plan) and most == 3
    with pytest.raises(SystemExit, match="teacher"):
        lanes.run_all(plan, 2, start=lambda each: sys.exit(each.name))


def test_a_cell_whose_model_is_gone_is_trained_again_for_those_that_read_it(experiment, toy):
    run, places, plan = experiment["run"], toy[1], experiment["cells"].plan()
    places.results.mkdir()
    for each in plan:
        if each.name != "main-kd-seed2":
            places.result(each.name).write_text("{}")
    places.model("base-sft+kd-seed0").mkdir(parents=True)
    found = [c.name for c in run.unfinished(plan, places)]
    assert found == ["teacher-sft-seed0", "main-kd-seed2"]
    places.result("main-kd-seed2").write_text("{}")
    assert run.unfinished(plan, places) == []


@pytest.mark.parametrize("tuning_tokens", [100, 300])
def test_cells_chain_and_tuning_chooses_the_rate(experiment, toy, tuning_tokens, monkeypatch):
    """In bf16, as the real run is. Tuning runs of the whole budget are not trained again."""
    settings, places = replace(toy[0], bf16=1, tuning_tokens=tuning_tokens), toy[1]
    rates = experiment["cells"].LEARNING_RATES
    tuned = [f"tune-mgsr-{rate:g}-seed1" for rate in rates]
    names = ["teacher-sft-seed0", "base-sft+kd-seed0", *tuned, "main-mgsr-seed1"]
    for name in names:
        if name == names[-1] and tuning_tokens == settings.method_tokens:
            monkeypatch.setattr("training.run", lambda *_: pytest.fail("trained again"))
        experiment["run"].run_cell(cell(experiment, name), settings, places)
    assert not any(places.model(name).is_dir() for name in tuned)
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
    assert "| mgsr | [1](main-mgsr-seed1.json) |" in table
    assert "| teacher | [0](teacher-sft-seed0.json) |" in table


def test_every_cell_is_a_configuration_that_holds(experiment, toy):
    """A preset or override that contradicts another one is found here, not after hours."""
    import training

    settings = replace(toy[0], tuning_tokens=0)
    toy[1].work.mkdir()
    for name in ("teacher-sft-seed0", "base-sft+kd-seed0", "retnet-base-sft+kd-seed0"):
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
    assert [c.name for c in started] == ["base-sft+kd-seed0"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--prompts", "7"])
    with pytest.raises(SystemExit, match="prompts"):
        run.main()


def test_a_teacher_with_drafters_writes_what_it_writes_alone(experiment, toy):
    """The joint claim: α, agreement, speed and break-even of every DenseRetNet student."""
    import joint

    settings, places = toy
    settings = replace(settings, tuning_tokens=0)
    names = ["teacher-sft-seed0", "retnet-base-sft+kd-seed0"]
    names += [f"retnet-main-{method}-seed1" for method in experiment["cells"].RETNET_METHODS]
    for name in (*names, "joint-drafters-seed1"):
        experiment["run"].run_cell(cell(experiment, name), settings, places)
    record = json.loads(places.result("joint-drafters-seed1").read_text())["joint"]
    assert list(record["arms"]) == [joint.PLAIN, joint.LOOKUP, "sft+kd", "sft", "kd", "mgsr"]
    assert (record["prompts"], record["timed"]) == (3, 2)
    for label in ("sft+kd", "sft", "kd", "mgsr"):
        arm = record["arms"][label]
        assert 0 < arm["acceptance"] < 1 and 0 <= arm["agreement"] <= 1
        assert 1 <= arm["tokens_per_step"] <= 1 + settings.joint_draft
        assert arm["step_cost"] * arm["ratio"] == pytest.approx(arm["tokens_per_step"])
    assert str(places.work) not in json.dumps(record)
    table = experiment["table"].markdown(places.results)
    assert "break-even α" in table and "| mgsr | 0." in table
    assert "[1](retnet-main-kd-seed1.json)" in table


def test_a_drafter_that_changes_the_text_is_an_error(experiment, toy, monkeypatch):
    import joint

    settings, places = toy
    teacher, made = places.data.parent / "model", joint.compare

    def changed(*arguments, **keywords):
        return [replace(arm, equal_to_plain=False) for arm in made(*arguments, **keywords)]

    monkeypatch.setattr(joint, "compare", changed)
    model, words = joint.zoo.load_model(teacher), joint.zoo.load_tokenizer(teacher)
    with pytest.raises(joint.RetortError, match="changed the teacher's text"):
        joint.decoding(model, words, {"student": teacher}, [[5, 6, 7]], settings)


def test_rows_are_kept_whole_and_grouped_by_length(experiment, toy):
    import rows

    settings, places = toy
    fitting = rows.fitting_rows(replace(settings, max_length=64), places)
    assert len(fitting) == 6 and all(len(ids) <= 64 for _, ids in fitting)
    shortest = min(len(ids) for _, ids in fitting)
    assert rows.fitting_rows(replace(settings, max_length=shortest - 1), places) == []
    made = [({"id": i}, [0] * (i % 7 + 1)) for i in range(100)]
    ordered = rows.in_groups(made, 4, seed=1)
    assert len(ordered) == 100 and len({row["id"] for row, _ in ordered}) == 100
    spreads = [
        max(len(ids) for _, ids in ordered[i : i + 4])
        - min(len(ids) for _, ids in ordered[i : i + 4])
        for i in range(0, 100, 4)
    ]
    assert max(spreads) <= 1
    assert ordered == rows.in_groups(made, 4, seed=1) != rows.in_groups(made, 4, seed=2)


def test_the_rate_warms_up_and_falls_over_the_tokens(experiment):
    import pace

    assert 0 < pace.rate(0) < pace.rate(0.03) < pace.rate(0.05) <= 1
    falling = [pace.rate(done) for done in (0.06, 0.3, 0.6, 0.9, 1.0)]
    assert falling == sorted(falling, reverse=True)
    assert pace.rate(1.0) == pace.rate(1.2) == pytest.approx(pace.FLOOR)


def test_every_method_reads_as_many_sequences_a_step(experiment, toy):
    import training

    settings = replace(toy[0], tuning_tokens=0, rows=8)
    toy[1].work.mkdir()
    for name in ("teacher-sft-seed0", "base-sft+kd-seed0"):
        toy[1].model(name).symlink_to(settings.model)
    prompts = {
        each.label: training.configuration(each, settings, toy[1]).per_device_train_batch_size
        for each in experiment["cells"].plan()
        if each.stage in ("main", "other")
    }
    halves = {label for label, count in prompts.items() if count == 4}
    assert halves == {"mgsr", "distillm2"} and set(prompts.values()) == {4, 8}


def test_the_time_that_is_left_follows_the_time_that_cells_took(experiment, toy):
    import progress

    settings, places = toy
    cells = experiment["cells"].plan()[:3]
    said = progress.Progress(cells, settings, places)
    assert str(said).startswith("0 of 3 cells done")
    assert said.pace([]) == 1.0
    places.results.mkdir()
    hoped = progress.expected(cells[0], settings)
    places.result(cells[0].name).write_text(json.dumps({"seconds": 2 * hoped}))
    assert said.pace(cells[:1]) == pytest.approx(2) and str(said).startswith("1 of 3")
    every = progress.Progress(experiment["cells"].plan(), experiment["settings"].Settings(), places)
    assert len(every.cells) > 40


def test_the_plan_can_end_early(experiment, toy, monkeypatch, capsys):
    _, places = toy
    arguments = ["run.py", "--data", str(places.data), "--work-dir", str(places.work), "--cells"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--until", "main-sft-seed1"])
    experiment["run"].main()
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert listed[0] == "teacher-sft-seed0" and listed[-1] == "main-sft-seed1"
    monkeypatch.setattr(sys, "argv", [*arguments, "--until", "nothing"])
    with pytest.raises(SystemExit, match="no such cell"):
        experiment["run"].main()
