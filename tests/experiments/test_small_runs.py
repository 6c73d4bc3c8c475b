"""The experiments of one short run, from their command line to their JSON, at toy size."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.experiments.toys import save_model, save_rows

FOLDER = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Run a script of the folder on a toy teacher and return its record."""
    monkeypatch.syspath_prepend(str(FOLDER))
    teacher = save_model(tmp_path / "teacher", layers=4)
    rows = [str(save_rows(tmp_path / f"{name}.jsonl")) for name in ("train", "valid")]
    made = []

    def run(name, *flags):
        made.append(name)
        output = tmp_path / f"{name}.json"
        arguments = [f"{name}.py", *rows, "--teacher", str(teacher), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [*arguments, "--layers", "2", *flags])
        importlib.import_module(name).main()
        text = output.read_text()
        assert str(tmp_path) not in text
        return json.loads(text)

    yield run
    for name in (*made, "small_run"):
        sys.modules.pop(name, None)


def test_the_band_is_asked_on_held_out_text_before_and_after(launch):
    found = launch("dac_band", "--steps", "12", "--valid-rows", "5", "--learning-rate", "0.01")
    before, after = found["untrained"], found["trained"]
    assert before["tokens"] == after["tokens"] > 20 and len(after["by_entropy"]) == 5
    assert before["coverage"] > 0.97  # the band begins full
    entropies = [part["entropy"] for part in after["by_entropy"]]
    assert entropies == sorted(entropies) and entropies[0] < entropies[-1]
    assert after["width"] != before["width"] and after["acceptance"] != before["acceptance"]
    assert len(found["dual"]) == 2


def test_both_arms_of_a_warm_start_are_recorded_before_during_and_after(launch):
    found = launch("warm_start", "--steps", "6", "--valid-rows", "4")
    for arm in found["arms"].values():
        assert [record["step"] for record in arm] == [0, 2, 4, 6]
        assert arm[-1]["eval_loss"] < arm[0]["eval_loss"]
    assert set(found["arms"]) == {"cold", "warm"}
