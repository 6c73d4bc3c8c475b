"""How a process that trained beside others ends."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave_group() -> None:
    """Part from the other processes, if any: the run is complete, and this process ends with 0.

    It ends behind its exit handlers without taking the interpreter apart. A thread of the group may
    still hold a tensor of the last exchange, also where the group was destroyed, and one that is
    freed while Python ends aborts the process: its run is complete, and the launcher says that it
    failed (pytorch/pytorch#179291).
    """
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes > 1:
        state.destroy_process_group()
        atexit.register(_end)


def _end() -> NoReturn:
    atexit.unregister(_end)
    atexit._run_exitfuncs()  # those of others, which were registered before
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
