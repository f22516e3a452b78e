"""What a lane leaves to its control thread: members that come and go, memory, and tickets that are lost."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Sequence

from mmlane.lane import failpoints, protocol
from mmlane.lane.agenda import Agenda
from mmlane.lane.bookkeeping import Live, Member
from mmlane.lane.committing import Committer
from mmlane.lane.guard import Guard
from mmlane.lane.inbox import Inbox
from mmlane.lane.issuing import Issuer
from mmlane.lane.lifecycle import Lifecycle
from mmlane.lane.pinnable import Pinnable
from mmlane.lane.registration import Registration

logger = logging.getLogger("mmlane.lane")


class Housekeeping:
    """The control thread calls all of this, without the lane's lock.

    name: the lane's. orphan: seconds after which readers are asked about a ticket that they have not released.

    Attributes: `recalled`, tickets (slot, serial) to ask after at the next look, which any thread appends to;
    `pinnable`.
    """

    def __init__(
        self,
        name: str,
        orphan: float,
        lifecycle: Lifecycle,
        issuer: Issuer,
        committer: Committer,
        guard: Guard,
        inbox: Inbox,
        agenda: Agenda,
    ) -> None:
        self.orphan = orphan
        self.recalled: deque[tuple[int, int]] = deque()
        self.pinnable = Pinnable(name, committer, guard, inbox)
        self.registration = Registration(name, committer, self.pinnable)
        self._name = name
        self._lifecycle = lifecycle
        self._issuer = issuer
        self._committer = committer
        self._guard = guard
        self._inbox = inbox
        self._agenda = agenda
        self._lost = 0  # tickets of which a line has told

    def joined(self, member: Member) -> None:
        """A reader has mapped the memory, and is a member from now on."""
        with self._guard.lock, self._guard:
            if not self._lifecycle.join(member):
                return
            if self.pinnable.begin(self._lifecycle.joined) or self._committer.early:
                self._agenda.work()
        self._lifecycle.wake_waiting()

    def left(self, member: Member) -> None:
        """A member's connection has ended. Once the lane has opened, that ends it."""
        with self._guard.lock, self._guard:
            self._lifecycle.leave(member)
        if self._lifecycle.has_opened and not self._lifecycle.closed:
            self._lifecycle.end(f"{member} has ended")
            logger.info("lane %s is closed: %s has ended", self._name, member)

    def work(self) -> bool:
        """What other threads have left to this one; True: there is more."""
        memory = self._committer.memory
        if self._lifecycle.closed or memory is None:
            return False
        try:
            with self._guard.lock, self._guard:
                if self._lifecycle.closed:
                    return False
                ranges = self._committer.ahead()
                was_early = self._lifecycle.has_opened and self._committer.early
                if was_early:
                    self._committer.early = 0
            self._committer.commit(memory, ranges)
        except OSError as error:
            logger.debug("lane %s: no memory ahead of need: %s", self._name, str(error))
            self._committer.starved = not was_early  # less than that may be there
        return self._lifecycle.has_opened and self.pinnable.work(memory)

    def look(self) -> None:
        """Once a period: decommit unused memory, and ask after tickets that may be lost."""
        committer, tickets = self._committer, self._issuer.tickets
        with self._guard.lock, self._guard:
            self._issuer.drain()
            if self._lifecycle.closed:
                return
            committer.expect_nothing()
            recalled = {self.recalled.popleft() for _ in range(len(self.recalled))}
            live = list(tickets.live.values())
            idle = committer.idle()
            lost = tickets.lost
        failpoints.reached("decommit.chosen")
        committer.decommit(idle)
        self._ask_after(live, recalled)
        if lost > self._lost:
            logger.warning(
                "lane %s: %d tickets that a reader never saw were reclaimed: they were lost, recalled, or come"
                " after more than %g s (`orphan`)",
                *(self._name, lost - self._lost, self.orphan),
            )
            self._lost = lost
        with self._guard.lock:
            kept = 0 if committer.never_decommits else committer.allocator.committed_bytes - self.pinnable.nbytes
            if not tickets.live and not kept and not self.pinnable.uninformed:
                self._agenda.rest()
        if self.pinnable.uninformed:
            self._agenda.work()

    def _ask_after(self, live: Sequence[Live], recalled: Collection[tuple[int, int]]) -> None:
        """Ask members whether they have seen tickets of theirs that were recalled, or have been out for long."""
        now = time.monotonic()
        asked: dict[Member, list[tuple[int, int]]] = {}
        for ticket in live:
            if ticket.issued < now - self.orphan or (ticket.slot, ticket.serial) in recalled:
                ticket.issued = now  # asked again later, should a reader hold it
                for member in ticket.debtors():
                    asked.setdefault(member, []).append((ticket.slot, ticket.serial))
        for member, tickets in asked.items():
            if not self._inbox.send(protocol.RECALL, tickets, member):
                self.recalled.extend(tickets)  # it is behind: at the next look
            failpoints.reached("recall.sent")

    def ended(self, problem: str) -> None:
        """The control thread is about to end."""
        self._lifecycle.closed = self._lifecycle.closed or problem
        with self._guard.lock:
            self._committer.memory = None  # a thread that still copies has it, too
        self.registration.end()
        self._lifecycle.wake_waiting()
