"""A lane's life: it waits for its readers, is open, may be off for a while, and is closed permanently."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from mmlane.lane.agenda import Agenda
from mmlane.lane.bookkeeping import Member
from mmlane.lane.errors import Refused
from mmlane.lane.status import State


class _Task:
    """A task of an event loop that waits for a lane to open; to be woken like the lock that a thread waits for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.woken: asyncio.Future[None] = self._loop.create_future()

    def release(self) -> None:
        """Wake it; for any thread."""
        with suppress(RuntimeError):  # its loop is closed, and the task is gone
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


class Lifecycle:
    """Which members have joined, whether the lane is open, and which threads and tasks wait for that.

    Members join and leave with the lane's lock held. All else takes no lock: an interrupt may break in anywhere.
    name: the lane's. members: those that have to join.

    Attributes: `joined`, the members that have; `has_opened`, once all had; `is_off`; `closed`, why it is, or "".
    """

    def __init__(self, name: str, members: Sequence[Member], agenda: Agenda) -> None:
        self.joined: set[Member] = set()
        self.has_opened = self.is_off = False
        self.closed = ""
        self._name = name
        self._members = members
        self._agenda = agenda
        self._waiting: deque[threading.Lock | _Task] = deque()  # one of each thread or task

    @property
    def state(self) -> State:
        """What `Lane.state` is."""
        if self.closed:
            return "closed"
        if self.is_off:
            return "off"
        return "open" if self.has_opened else "waiting"

    def refusal(self) -> Refused | None:
        """Why no ticket can be issued now; None when it can."""
        if self.closed:
            return Refused("closed", self.closed)
        if self.has_opened and not self.is_off:
            return None
        if self.is_off:
            return Refused("off", "the lane was switched off; `mmlane on` switches it on again")
        missing = ", ".join(str(member) for member in self._members if member not in self.joined)
        return Refused("not_open", f"the lane opens when all its readers have joined; missing: {missing}")

    def join(self, member: Member) -> bool:
        """A reader is a member from now on; True if the lane opens with it, and what waits is to be woken."""
        self.joined.add(member)
        if len(self.joined) < len(self._members) or self.has_opened:
            return False
        self.has_opened = True
        return True

    def leave(self, member: Member) -> None:
        """A member has ended."""
        self.joined.discard(member)

    def end(self, problem: str) -> None:
        """The lane is closed from now on: nothing is issued any more, and no memory used again."""
        if not self.closed:
            self.closed = problem
        self._agenda.end()

    def poison(self, error: str) -> None:
        """Readers must never be given what half-written state says is free: the lane ends here."""
        if not self.closed:
            self._agenda.log(
                logging.ERROR, "lane %s is closed: %s interrupted it while it changed its state", self._name, error
            )
        self.end(f"the lane was interrupted while it changed its state: {error}")

    def wait_open(self, timeout: float | None) -> bool:
        """As `Lane.wait_open`."""
        waiting = threading.Lock()  # no Condition, no Event: a signal handler that raises can break those
        waiting.acquire()
        self._waiting.append(waiting)
        if not self.closed and not self.has_opened:
            waiting.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        with suppress(ValueError):  # it was woken
            self._waiting.remove(waiting)
        return self.has_opened and not self.closed

    async def wait_open_async(self, timeout: float | None) -> bool:
        """As `Lane.wait_open_async`."""
        waiting = _Task()
        self._waiting.append(waiting)
        try:
            if not self.closed and not self.has_opened:
                await asyncio.wait([waiting.woken], timeout=timeout)
        finally:
            with suppress(ValueError):  # it was woken
                self._waiting.remove(waiting)
        return self.has_opened and not self.closed

    def wake_waiting(self) -> None:
        """The lane has opened, or has closed: no thread waits any more."""
        with suppress(IndexError):  # not `while self._waiting`: another thread may take the last one away
            while True:
                self._waiting.popleft().release()
