"""The producer's control thread: lets readers in, notices their end, and does what the lane leaves to it.

It sleeps unless a process connects, a member ends, the lane has work for it, or a look is due. Releases do not
wake it: they wait in the members' sockets until the producer drains them.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mmlane.lane.admission import Admission, listen
from mmlane.lane.agenda import Agenda
from mmlane.lane.errors import needed
from mmlane.lane.inbox import Inbox

if TYPE_CHECKING:
    from mmlane.lane.producer import Lane

logger = logging.getLogger("mmlane.lane")


class Control:
    """Sockets and thread of one lane, whose `housekeeping` the thread calls without the lane's lock.

    memory: bytes, slots and path, which a reader is told. descriptor: which it is given. period: seconds between
    looks while there is something to look after. Raises OSError when the lane's name cannot be had.

    Attributes: `admission`, which lets processes in; `inbox`, the members' connections; `agenda`, what to do next.
    """

    def __init__(self, lane: Lane, memory: tuple[int, int, str], descriptor: int, period: float) -> None:
        self._lane = lane
        with ExitStack() as scope:  # closes what there is, should the rest not be had
            listener = listen(lane.name, scope)
            with needed("epoll"):
                self._events = scope.enter_context(select.epoll())  # what wakes the thread
                self._events.register(listener, select.EPOLLIN)
                self.inbox = Inbox()
                scope.callback(self.inbox.close)
            with needed("eventfd"):
                self.agenda = Agenda(period)
                self._events.register(self.agenda.wakeup.fd, select.EPOLLIN)
            scope.pop_all()
        self.admission = Admission(lane, memory, descriptor, listener, self._events, self.inbox)
        self._thread = threading.Thread(target=self._run, name=lane.name, daemon=True)

    def start(self) -> None:
        """Let readers in from now on. Raises RuntimeError where no thread can be had."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's end, unless this is the thread."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """Close all sockets: at the end, and in a forked child, where they would hide the parent's death."""
        self.admission.close()
        self._events.close()
        self.inbox.close()

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            while not self.agenda.is_over:
                self._turn()
        except Exception as error:  # noqa: BLE001 - whatever it is, the lane ends, and says so last
            failure = error
        finally:
            try:
                self._lane.housekeeping.ended(f"the lane's control thread has failed: {failure!r}")
            finally:
                with self._lane.guard.lock:  # no other thread reads from a connection
                    self.abandon()
        if failure is not None:
            logger.error("lane %s is closed: its control thread has failed", self._thread.name, exc_info=failure)
        self.agenda.write_lines()

    def _turn(self) -> None:
        agenda, admission = self.agenda, self.admission
        deadlines = admission.deadlines()
        if (due := agenda.next_look) is not None:
            deadlines.append(due)
        timeout = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
        for number, _ in self._events.poll(0.0 if agenda.has_work else timeout):
            if number == agenda.wakeup.fd:
                os.eventfd_read(number)
            else:
                admission.handle(number)
        now = time.monotonic()
        admission.tidy(now)
        if agenda.has_work:
            agenda.has_work = False
            agenda.write_lines()
            if self._lane.housekeeping.work():
                agenda.has_work = True
        if agenda.next_look is not None and agenda.next_look <= now:
            agenda.next_look = now + agenda.period
            self._lane.housekeeping.look()
