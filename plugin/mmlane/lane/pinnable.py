"""The part of a lane that stays committed once the lane is open, so that readers on CUDA can pin it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from mmlane.lane import protocol
from mmlane.lane.bookkeeping import Member
from mmlane.lane.committing import Committer, Memory
from mmlane.lane.guard import Guard
from mmlane.lane.inbox import Inbox

logger = logging.getLogger("mmlane.lane")

_STEP = 4  # segments to commit in one turn of the control thread


class Pinnable:
    """Commits that part step by step, then tells the members. The control thread's alone, without the lane's lock.

    name: the lane's. Attributes: `nbytes`, that are committed and stay so; `uninformed`, members that have yet to
    hear of them.
    """

    def __init__(self, name: str, committer: Committer, guard: Guard, inbox: Inbox) -> None:
        self.nbytes = 0
        self.uninformed: set[Member] = set()
        self._name = name
        self._allocator = committer.allocator
        self._committer = committer
        self._guard = guard
        self._inbox = inbox

    def begin(self, members: Iterable[Member]) -> bool:
        """The lane has opened; False if no part of it is to stay committed."""
        if self._allocator.pinned:
            self.uninformed.update(members)
        return bool(self._allocator.pinned)

    def work(self, memory: Memory) -> bool:
        """Commit a part of it, and tell readers once all of it is there; True: there is more."""
        wanted = self._allocator.pinned
        if self.nbytes < wanted:
            step = min(_STEP * self._allocator.segment, wanted - self.nbytes)
            try:
                with self._guard.lock, self._guard:
                    ranges = self._allocator.uncommitted(self.nbytes, step)
                self._committer.commit(memory, ranges)
            except OSError as error:
                logger.warning(
                    "lane %s: no memory for %d bytes to pin (%s), so readers copy from pageable memory; make"
                    " `pinned` smaller, or 0 to silence this",
                    *(self._name, wanted, str(error)),
                )
                self._allocator.pinned = self.nbytes = 0  # no reader was told: it is decommitted when it is idle
                self.uninformed.clear()
                return False
            self.nbytes += step
        if self.nbytes < wanted:
            return True
        if wanted:
            pinned = [(self._committer.base, wanted)]
            self.uninformed = {
                member for member in self.uninformed if not self._inbox.send(protocol.PINNED, pinned, member)
            }
        return False
