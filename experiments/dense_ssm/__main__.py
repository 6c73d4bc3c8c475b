"""The experiment by one command, which goes on where it stopped:

python -m experiments.dense_ssm --data FOLDER --out FOLDER

Finished cells lie in experiments/dense_ssm/results and are not run again; unfinished ones go on
from their checkpoint in --out. The table and the plot are written again after each cell.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from experiments.dense_ssm import cells, table
from experiments.dense_ssm.training import run_cell

HERE = Path(__file__).parent


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm_*.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--family", choices=cells.FAMILIES, help="only these models")
    parser.add_argument("--list", action="store_true", help="only write the table")
    given = parser.parse_args()
    torch.set_num_threads(1)  # several processes may share the machine; results depend on it
    table.write(given.results)
    if given.list:
        return
    families = (given.family,) if given.family else cells.FAMILIES
    for cell in cells.plan(lambda *at: table.best_rate(given.results, *at), families=families):
        if (given.results / f"{cell.name}.json").is_file():
            continue
        began = time.monotonic()
        found = run_cell(cell, given.data, given.out, given.results)["evaluation"]
        spent = time.monotonic() - began
        print(f"{cell.name}: loss {found['eval_loss']:.4f} ({spent:.0f} s)", flush=True)
        table.write(given.results)


if __name__ == "__main__":
    main()
