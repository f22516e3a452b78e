"""The lock of a lane's state, and what becomes of the lane when an interrupt breaks into a change of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Guard:
    """Goes with the lock while the state is changed: `with guard.lock, guard:`. To read it, the lock is enough.

    What interrupts a change may leave the state half changed: it is poisoned. The next thread to get here sees it
    by `_is_under_way`, however often the one before was interrupted.
    """

    def __init__(self, poison: Callable[[str], None]) -> None:
        self.lock = threading.Lock()
        self._poison = poison
        self._is_under_way = False

    def __enter__(self) -> None:
        if self._is_under_way:
            self._poison("an exception")
        self._is_under_way = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._is_under_way = False
        else:
            self._poison(repr(error))
