"""Moments at which Python may run a signal handler, or another thread: a test does something at each in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


class Interrupted(Exception):
    """What a signal handler raises."""


def interrupt() -> None:
    """Do as a signal handler that raises."""
    raise Interrupted


class Moment:
    """Does something at the nth moment, in this thread, in the code of some modules.

    That is where a function begins, and where one that is not written in Python has returned. `came`: it was so.
    """

    def __init__(self, nth: int, act: Callable[[], object], modules: tuple[ModuleType, ...]) -> None:
        self._left = nth
        self._act = act
        self._files = {module.__file__ for module in modules}
        self.came = False

    def __enter__(self) -> Moment:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename in self._files and event in ("call", "c_return"):
            self._left -= 1
            if self._left == 0:
                self.came = True
                self._act()
