"""The experiment: which distillation method teaches a half-depth student most, token for token?

    OMP_NUM_THREADS=2 python experiments/mgsr/run.py --data FOLDER --work-dir runs/mgsr

Each cell is a process of its own and leaves ``results/<cell>.json``. A cell that was killed goes
on from its newest checkpoint when the command is given again; finished cells are not repeated.
Methods that this version of Retort does not have yet are named and passed over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cells import TEACHER, Cell, plan
from settings import Places, Settings, add_settings, from_options

HERE = Path(__file__).resolve().parent


def main() -> None:
    options = arguments()
    settings = from_options(options)
    places = Places(options.data.resolve(), options.work_dir.resolve(), options.results.resolve())
    if options.cell:
        run_cell(next(c for c in plan() if c.name == options.cell), settings, places)
        return
    check_settings(settings, places)
    for cell in plan():
        if options.only and not cell.name.startswith(tuple(options.only)):
            continue
        if cell.stage == "tune" and not settings.tuning_tokens:
            continue
        if not places.result(cell.name).is_file():
            start(cell)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dolly_*.jsonl, …")
    parser.add_argument("--work-dir", type=Path, required=True, help="models and checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="+", help="cells whose names start like this")
    parser.add_argument("--cell", help="run this one cell, in this process")
    add_settings(parser)
    return parser.parse_args()


def check_settings(settings: Settings, places: Places) -> None:
    """Cells of one results folder share their settings; others are refused."""
    path = places.results / "settings.json"
    if not path.is_file():
        places.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings.record(), indent=2) + "\n", "utf-8")
    kept = json.loads(path.read_text("utf-8"))
    different = sorted(k for k, v in settings.record().items() if kept.get(k) != v)
    if different:
        sys.exit(f"{path} has other values of {different}: name another --results folder")


def start(cell: Cell) -> None:
    """Run a cell in a process of its own; one that fails leaves no record and others go on."""
    print(f"{cell.name} ...", flush=True)
    started = time.monotonic()
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, *sys.argv, "--cell", cell.name]
    code = subprocess.run(command, env={**os.environ, **quiet}, check=False).returncode
    print(f"{cell.name}: exit {code} after {time.monotonic() - started:.0f} s", flush=True)
    if code and cell == TEACHER:
        sys.exit("without its teacher the experiment cannot go on")


def run_cell(cell: Cell, settings: Settings, places: Places) -> None:
    """Train, judge, and write the record."""
    from judging import tests, validation
    from training import configuration, train

    from retort.distill.presets import PRESETS
    from retort.provenance import Provenance, write_json

    if cell.method not in PRESETS:
        sys.exit(f"{cell.name}: this version has no method {cell.method!r} yet; passed over")
    started = time.time()
    trained = train(cell, settings, places)
    folder = places.model(cell.name)
    config = configuration(cell, settings, places)
    record: dict[str, Any] = {
        "cell": cell.name,
        "stage": cell.stage,
        "label": cell.label,
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": config.learning_rate,
        "overrides": cell.overrides,
        "settings": settings.record(),
        "training": trained,
    }
    if cell.stage == "tune":
        record["validation"] = validation(folder, settings, places)
        shutil.rmtree(folder)  # only the number is needed
    else:
        record["tests"] = tests(folder, settings, places)
        remove_checkpoints(folder)
    provenance = Provenance.collect({}, {"seed": cell.seed}).to_dict()
    provenance.pop("command")
    record |= {"seconds": round(time.time() - started), "provenance": provenance}
    write_json(places.result(cell.name), record)


def remove_checkpoints(folder: Path) -> None:
    """Keep the model, let its optimiser states go."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
