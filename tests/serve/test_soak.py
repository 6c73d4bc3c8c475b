"""FAULTS.md S18: memory, descriptors, threads and tasks stay flat.

``-m slow`` soaks for ten minutes, or for ``RETORT_SOAK_SECONDS``.
"""

import asyncio
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve import tiny

ROUNDS = 12
SECONDS = float(os.environ.get("RETORT_SOAK_SECONDS", "600"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mixed(served, number: int) -> None:
    """Good, bad, streamed, left and refused requests."""
    body = {"prompt": f"the cat {number}", "max_tokens": 12, "seed": number}
    served.post("/v1/completions", **body)
    served.post("/v1/completions", **body, stream=True, logprobs=2)
    served.post("/v1/completions", **body, temperature=99)
    with served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())


def settle(served) -> tuple[int, int, int]:
    served.wait_idle()
    tiny.eventually(lambda: tasks(served) <= 4)
    gc.collect()
    return descriptors(), threading.active_count(), tasks(served)


def tasks(served) -> int:
    async def count():
        return len(asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), served.state["loop"]).result(60)


def soak(folder, seconds: float, rounds: int) -> None:
    with tiny.in_process(folder) as served, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: mixed(served, n), range(16)))
        before, memory = settle(served), resident()
        end, number = time.monotonic() + seconds, 0
        while number < rounds or time.monotonic() < end:
            list(pool.map(lambda n: mixed(served, n), range(4)))
            number += 1
        after = settle(served)
        assert all(now <= then + 2 for now, then in zip(after, before, strict=True))
        assert resident() - memory < 48 * 2**20
        assert served.state["client"]._live == {} and served.worker._rows == {}
        assert served.engine._roster.requests == {} and served.engine.target.cache.rows == ()


def test_s18_nothing_grows(folder):
    soak(folder, 0, ROUNDS)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_s18_nothing_grows_for_long(folder):
    soak(folder, SECONDS, ROUNDS)
