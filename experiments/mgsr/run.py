"""The experiment: which distillation method teaches a half-depth student most, token for token?

    OMP_NUM_THREADS=1 python experiments/mgsr/run.py --data FOLDER --work-dir runs/mgsr --jobs 2

Each cell is a process of its own and leaves ``results/<cell>.json``. A cell that was killed goes
on from its newest checkpoint when the command is given again; finished cells are not repeated.
Before each cell stands how many are done and about how long the rest takes; ``--cells`` lists them.
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

from cells import TEACHER, Cell, needs, plan, tuning
from lanes import run_all
from progress import Progress, expected
from settings import Places, Settings, add_settings, from_options

HERE = Path(__file__).resolve().parent


def main() -> None:
    options = arguments()
    settings = from_options(options)
    places = Places(options.data.resolve(), options.work_dir.resolve(), options.results.resolve())
    if options.cell:
        run_cell(next(c for c in plan() if c.name == options.cell), settings, places)
        return
    cells = chosen(options, settings)
    if options.cells:
        for cell in cells:
            print(f"{expected(cell, settings) / 60:5.1f} min  {cell.name}")
        return
    check_settings(settings, places)
    progress = Progress(cells, settings, places, options.jobs)

    def announced(cell: Cell) -> None:
        print(f"{progress}; now {cell.name}", flush=True)
        start(cell)

    run_all(unfinished(cells, places), options.jobs, announced)
    print(progress)


def chosen(options: argparse.Namespace, settings: Settings) -> list[Cell]:
    """The cells of the plan that are wanted, in its order."""
    tuned = [c for c in plan() if c.stage != "tune" or settings.tuning_tokens]
    last = next((i for i, c in enumerate(tuned) if c.name == options.until), len(tuned))
    if options.until and last == len(tuned):
        sys.exit(f"--until {options.until}: no such cell; see --cells")
    wanted = tuple(options.only or [""])
    return [cell for cell in tuned[: last + 1] if cell.name.startswith(wanted)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dolly_*.jsonl, …")
    parser.add_argument("--work-dir", type=Path, required=True, help="models and checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="+", help="cells whose names start like this")
    parser.add_argument("--until", help="the last cell of the plan that is run")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (default: 1)")
    parser.add_argument("--cells", action="store_true", help="list the cells and what they take")
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


def unfinished(cells: list[Cell], places: Places) -> list[Cell]:
    """Cells without a result, and those whose model they read and that is gone."""
    found, read = list[Cell](), set[str]()
    for cell in reversed(cells):
        done = places.result(cell.name).is_file()
        gone = cell.keeps_model and not places.model(cell.name).is_dir()
        if not done or (cell.name in read and gone):
            found.insert(0, cell)
            read |= needs(cell)
    return found


def start(cell: Cell) -> None:
    """Run a cell in a process of its own; one that fails leaves no record and others go on."""
    started = time.monotonic()
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet |= {"TQDM_DISABLE": "1"}
    command = [sys.executable, *sys.argv, "--cell", cell.name]
    code = subprocess.run(command, env={**os.environ, **quiet}, check=False).returncode
    took = time.monotonic() - started
    print(f"{cell.name}: {'done' if not code else f'exit {code}'} after {took:.0f} s", flush=True)
    if code and cell == TEACHER:
        sys.exit("without its teacher the experiment cannot go on")


def run_cell(cell: Cell, settings: Settings, places: Places) -> None:
    """Train, judge, and write the record."""
    from retort.provenance import Provenance, write_json

    started = time.time()
    found = measure(cell, settings, places)
    provenance = Provenance.collect({}, {"seed": cell.seed}).to_dict()
    provenance.pop("command")
    record: dict[str, Any] = {
        "cell": cell.name,
        "stage": cell.stage,
        "label": cell.label,
        "method": cell.method,
        "seed": cell.seed,
        "overrides": cell.overrides,
        "settings": settings.record(),
        **found,
    }
    record |= {"seconds": round(time.time() - started), "provenance": provenance}
    write_json(places.result(cell.name), record)


def measure(cell: Cell, settings: Settings, places: Places) -> dict[str, Any]:
    """What a cell of its stage finds out."""
    from joint import joint
    from judging import tests, validation
    from training import learning_rate, train

    if cell.stage == "joint":
        return {"joint": joint(settings, places)}
    found = {
        "learning_rate": learning_rate(cell, settings, places),
        "training": train(cell, settings, places),
    }
    folder = places.model(cell.name)
    if not cell.keeps_model:
        found["validation"] = validation(folder, settings, places)
    else:
        found["tests"] = tests(folder, settings, places)
    remove_checkpoints(folder)
    if cell.stage in ("main", "other"):
        remove_tuned(cell, places)
    return found


def remove_checkpoints(folder: Path) -> None:
    """Keep the model, let its optimiser states go."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def remove_tuned(cell: Cell, places: Places) -> None:
    """Students of the rates that lost."""
    for each in tuning(cell.method):
        shutil.rmtree(places.model(each.name), ignore_errors=True)


if __name__ == "__main__":
    main()
