"""Has a process stand still at named points of the lane's protocol: those that the file $NOTES/stand names.

Its lines are `POINT ACTION [TITLE]`. ACTION is `stop` (SIGSTOP) or `hold`, which keeps the interpreter's lock for
longer than a reader waits for its producer; with a TITLE, only processes of that title do it. Each does so
once, and makes the empty file $NOTES/POINT.PID before.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path
from types import ModuleType

from when_imported import when_imported

HOLD_S = 12.0  # `Reader.join` waits 10 s


def reached(point: str) -> None:
    notes = Path(os.environ["NOTES"])
    try:
        lines = (notes / "stand").read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        name, action, title = f"{line} ".split(" ", 2)
        mark = notes / f"{point}.{os.getpid()}"
        if name != point or mark.exists() or title.strip() not in Path("/proc/self/cmdline").read_text():
            continue
        mark.touch()
        if action == "stop":
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this very thread goes no step further
        else:
            ctypes.PyDLL(None).usleep(int(HOLD_S * 1e6))  # a PyDLL's calls do not let go of the lock


def watch(module: ModuleType) -> None:
    module.probe = reached  # type: ignore[attr-defined]


when_imported("mmlane.lane.failpoints", watch)
