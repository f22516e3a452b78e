"""What the lane's control thread is to do next, as the other threads say it."""

from __future__ import annotations

import logging
import os
import time
from collections import deque

from mmlane.lane.descriptor import Descriptor

logger = logging.getLogger("mmlane.lane")


class Agenda:
    """Work, looks, lines to log, and the thread's end. Any thread may say so: nothing here waits.

    period: seconds between looks while there is something to look after. Raises OSError.

    Attributes, for the thread: `wakeup`, an eventfd that is readable when there is something new; `has_work`;
    `next_look`, when that is due; `is_over`, it is to end.
    """

    def __init__(self, period: float) -> None:
        self.wakeup = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self.has_work = self.is_over = False
        self.next_look: float | None = None
        self.period = period
        self._lines: deque[tuple[int, str, tuple[object, ...]]] = deque()

    def wake(self) -> None:
        """Have the thread take a turn."""
        os.eventfd_write(self.wakeup.fd, 1)

    def work(self) -> None:
        """There is work for the thread."""
        if not self.has_work:
            self.has_work = True
            self.wake()

    def log(self, level: int, line: str, *args: object) -> None:
        """Have the thread log a line: a handler may be slow, and no put is to wait for it."""
        self._lines.append((level, line, args))
        self.work()

    def watch(self) -> None:
        """There is something to look after: look once a period, until `rest`. With the lane's lock held."""
        if self.next_look is None:
            self.next_look = time.monotonic() + self.period
            self.wake()

    def rest(self) -> None:
        """There is nothing to look after any more. With the lane's lock held."""
        self.next_look = None

    def end(self) -> None:
        """Have the thread end."""
        self.is_over = True
        self.wake()

    def write_lines(self) -> None:
        """For the thread: log what it was given."""
        while self._lines:
            level, line, args = self._lines.popleft()
            logger.log(level, line, *args)
