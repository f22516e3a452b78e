"""What happens at the lane's named points: a thread is held up, or the process stops or dies."""

from __future__ import annotations

import itertools
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any, Literal

from mmlane.lane import failpoints
from tests.lane.harness.waiting import DEADLINE

Action = Literal["kill", "stop"]
Where = Literal["anywhere", "main", "beside"]


def _is_here(where: Where) -> bool:
    main = threading.current_thread() is threading.main_thread()
    return where == "anywhere" or main == (where == "main")


class Gate:
    """Holds up the threads of this process at a point, from the nth time on, until it is opened."""

    def __init__(self, point: str, where: Where = "anywhere", nth: int = 1) -> None:
        self._point, self._where, self._nth = point, where, nth
        self._times = itertools.count(1)
        self._reached, self._open = threading.Event(), threading.Event()
        failpoints.probe = self

    def __call__(self, name: str) -> None:
        if name == self._point and _is_here(self._where) and next(self._times) >= self._nth:
            self._reached.set()
            assert self._open.wait(DEADLINE)

    def wait(self) -> None:
        """Wait until a thread is there."""
        assert self._reached.wait(DEADLINE), f"no thread has come to {self._point}"

    def open(self) -> None:
        """Let all go on, now and later."""
        failpoints.probe = None
        self._open.set()


class _Probe:
    """Kills or stops this process when it is at a point for the nth time, after saying so."""

    def __init__(self, words: Connection, point: str, nth: int, action: Action, where: Where) -> None:
        self._words, self._point, self._nth, self._where = words, point, nth, where
        self._signal = signal.SIGKILL if action == "kill" else signal.SIGSTOP
        self._times = itertools.count(1)

    def __call__(self, name: str) -> None:
        if name == self._point and _is_here(self._where) and next(self._times) == self._nth:
            self._words.send_bytes(name.encode())
            signal.pthread_kill(threading.get_ident(), self._signal)  # this very thread goes no step further


class _Probes(list[_Probe]):
    """All that this process is armed with."""

    def __call__(self, name: str) -> None:
        for probe in self:
            probe(name)


def arm(words: Connection, arguments: tuple[Any, ...]) -> None:
    """Arm this process with one more (point, nth, action, where), or disarm it: no arguments."""
    armed = failpoints.probe if isinstance(failpoints.probe, _Probes) else _Probes()
    failpoints.probe = _Probes([*armed, _Probe(words, *arguments)]) if arguments else None
