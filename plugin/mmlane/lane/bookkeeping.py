"""Which tickets are out, who still owes each, and what holds the extents that they are for. Pure logic.

The numbers in brackets are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from mmlane.lane.allocator import Allocator


class Member(NamedTuple):
    """A reader's place: its group, and its number there."""

    group: str
    number: int

    def __str__(self) -> str:
        return f"reader {self.number} of {self.group!r}"


@dataclass(eq=False, slots=True)
class Extent:
    """A range of the lane that holds one tensor. kept: by a hold. published: it has had a ticket."""

    offset: int
    nbytes: int
    tickets: int = 0
    kept: bool = True
    published: bool = False


class Hold:
    """Keeps an extent until it is let go, or dropped.

    end: called in the latter case with what `Bookkeeping.dropped` wants, wherever Python runs. It has to be one
    that is written in C, like the `append` of a deque: no signal handler can interrupt that, so nothing is lost.
    """

    __slots__ = ("__weakref__", "end", "extent", "kept")

    def __init__(self, end: Callable[[Kept], object]) -> None:
        self.end = end
        self.extent: Extent | None = None
        self.kept: Kept | None = None


Kept: TypeAlias = "weakref.ref[Hold]"  # stands for a hold that may be gone


@dataclass(eq=False, slots=True)
class Live:
    """A ticket that is out. `owed`: by group, the numbers that still have it; one group once that is known."""

    slot: int
    serial: int
    extent: Extent
    issued: float
    owed: Mapping[str, frozenset[int]]
    claimed: bool = False
    unseen_in: tuple[str, ...] = ()  # groups with members that never had it

    def debtors(self) -> list[Member]:
        """The members that have yet to release the ticket, of all groups that it may have gone to."""
        return [Member(group, number) for group, numbers in self.owed.items() for number in numbers]


class Bookkeeping:
    """Extents and tickets of one lane, all of whose members have joined.

    allocator: where extents are placed. slots: how many tickets can be out at a time. members: by group, the
    numbers that owe each ticket. on_end: called with a ticket's slot when it ends, before its extent is free (5).
    """

    def __init__(
        self,
        allocator: Allocator,
        slots: int,
        members: Mapping[str, frozenset[int]],
        on_end: Callable[[int], None] = lambda slot: None,
    ) -> None:
        self.allocator = allocator
        self.slots = slots
        self.members = members
        self.live: dict[int, Live] = {}  # by slot, oldest first
        self.lost = 0  # tickets that at least one member never saw
        self._on_end = on_end
        self._kept: dict[Kept, Extent] = {}
        self._unused: list[int] = []  # slots
        self._highest = 0
        # Serials of two lanes do not meet, even if one should have the other's name.
        self._first = self._serial = secrets.randbits(62)

    def allocate(self, offset: int, nbytes: int, hold: Hold) -> Extent:
        """An extent for `nbytes` at a place that the allocator has found, kept by a hold."""
        self.allocator.use(offset, nbytes)
        hold.extent = Extent(offset, self.allocator.rounded(nbytes))
        hold.kept = weakref.ref(hold, hold.end)
        self._kept[hold.kept] = hold.extent
        return hold.extent

    def hold_of(self, offset: int, nbytes: int) -> tuple[Hold, int] | None:
        """What keeps an extent that a range lies in as a whole, and where it lies there."""
        for kept, extent in self._kept.items():
            at = offset - extent.offset
            if 0 <= at <= extent.nbytes - nbytes:
                hold = kept()
                return None if hold is None else (hold, at)
        return None

    def let_go(self, hold: Hold) -> None:
        """A hold keeps its extent no longer."""
        kept, hold.kept, hold.extent = hold.kept, None, None
        if kept is not None:
            self.dropped(kept)

    def dropped(self, kept: Kept) -> None:
        """A hold is gone."""
        extent = self._kept.pop(kept)
        extent.kept = False
        self._settle(extent)

    def _settle(self, extent: Extent) -> None:
        if not extent.tickets and not extent.kept:
            self.allocator.free(extent.offset)

    def issue(self, extent: Extent, now: float) -> Live | None:
        """A ticket on an extent, owed by every member; None when all slots are out."""
        if self._unused:
            slot = self._unused.pop()
        elif self._highest < self.slots:
            slot = self._highest
            self._highest += 1
        else:
            return None
        self._serial += 1
        extent.tickets += 1
        ticket = self.live[slot] = Live(slot, self._serial, extent, now, self.members)
        return ticket

    def release(self, member: Member, slot: int, serial: int) -> bool:
        """A member is done with a ticket; its group becomes the ticket's (2). False: no such ticket was issued.

        What is said again is true, and changes nothing.
        """
        ticket = self._owed_by(member, slot, serial)
        if ticket is not None:
            if not ticket.claimed:
                ticket.claimed = True
                ticket.owed = {member.group: ticket.owed[member.group]}
            self._strike(ticket, member)
        return self._was_issued(serial)

    def not_seen(self, member: Member, slot: int, serial: int) -> bool:
        """A member never had a ticket and will never take it. False: no such ticket was issued."""
        ticket = self._owed_by(member, slot, serial)
        if ticket is not None:
            ticket.unseen_in += (member.group,)
            self._strike(ticket, member)
        return self._was_issued(serial)

    def withdraw(self, slot: int, serial: int) -> None:
        """The producer has not sent a ticket and never will (3). No-op if it is not out, or was taken."""
        ticket = self.live.get(slot)
        if ticket is not None and ticket.serial == serial and not ticket.claimed:
            self._end(ticket)

    def _was_issued(self, serial: int) -> bool:
        return self._first < serial <= self._serial

    def _owed_by(self, member: Member, slot: int, serial: int) -> Live | None:
        ticket = self.live.get(slot)
        if ticket is None or ticket.serial != serial or member.number not in ticket.owed.get(member.group, ()):
            return None
        return ticket

    def _strike(self, ticket: Live, member: Member) -> None:
        ticket.owed = {**ticket.owed, member.group: ticket.owed[member.group] - {member.number}}
        if not any(ticket.owed.values()):
            self.lost += not ticket.owed.keys().isdisjoint(ticket.unseen_in)
            self._end(ticket)

    def _end(self, ticket: Live) -> None:
        self._on_end(ticket.slot)
        del self.live[ticket.slot]
        self._unused.append(ticket.slot)
        ticket.extent.tickets -= 1
        self._settle(ticket.extent)
