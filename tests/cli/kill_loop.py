"""Runs a command again and again and kills it at random, until it ends by itself.

    python kill_loop.py KILLS LOG ARGUMENTS...

The libraries are loaded once; every run is a fork that has used no thread yet. A step takes at
least STEP seconds, so that a run is still at work when it is to be killed; the last run is left
alone. LOG gets a line of the output's size at each kill.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

STEP = 0.02


def main() -> int:
    kills, log, *arguments = sys.argv[1:]
    output = Path(arguments[arguments.index("-o") + 1])
    from retort import cli
    from retort.batch import openai, runner  # noqa: F401

    draws, sizes = random.Random(5), []
    while len(sizes) < int(kills):
        before = output.stat().st_size if output.exists() else 0
        child = start(cli, arguments)
        while output.stat().st_size == before if output.exists() else True:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit(f"the run ended before it could be killed {kills} times")
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 3 * STEP))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sizes.append(output.stat().st_size)
    Path(log).write_text(" ".join(map(str, sizes)))
    return os.waitstatus_to_exitcode(os.waitpid(start(cli, arguments, 0.0), 0)[1])


def start(cli, arguments, seconds: float = STEP) -> int:
    child = os.fork()
    if child == 0:
        slow_down(seconds)
        os._exit(cli.run(arguments))
    return child


def slow_down(seconds: float) -> None:
    from retort.decode.engine import Engine

    step = Engine.step

    def call(self):
        time.sleep(seconds)
        return step(self)

    Engine.step = call


if __name__ == "__main__":
    sys.exit(main())
