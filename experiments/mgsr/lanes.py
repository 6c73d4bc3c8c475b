"""Runs the plan's cells, some at a time: one waits for those whose models or results it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from cells import Cell, needs


def run_all(cells: Sequence[Cell], jobs: int, start: Callable[[Cell], None]) -> None:
    """Call ``start`` for each cell, ``jobs`` of them at a time, in the plan's order.

    A cell that is read by others ends before they start, whether it succeeded or not: they then
    say themselves what they miss. An error of ``start`` ends the run once its neighbours are done.
    """
    waiting, running = list(cells), dict[Future[None], Cell]()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            free = jobs - len(running)
            for cell in ready(waiting, list(running.values()))[:free]:
                waiting.remove(cell)
                running[pool.submit(start, cell)] = cell
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                done.result()


def ready(waiting: Sequence[Cell], running: Sequence[Cell]) -> list[Cell]:
    """Waiting cells that need no unfinished one."""
    unfinished = {cell.name for cell in (*waiting, *running)}
    return [cell for cell in waiting if not needs(cell) & unfinished]
