"""Who holds what in a lane: extents, the tickets on them, and the readers that have yet to give each back. Pure
logic.

The numbers in brackets are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from mmlane.lane.space import Space


@dataclass(eq=False, slots=True)
class Extent:
    """A range of the lane that holds one tensor. `shared`: a share holds it, it stays without tickets."""

    offset: int
    nbytes: int
    tickets: int = 0
    shared: bool = False


@dataclass(eq=False, slots=True)
class Live:
    """A ticket that is out. `owed`: by group, the readers that still have it; one group once that is known."""

    slot: int
    serial: int
    extent: Extent
    issued: float
    owed: dict[str, frozenset[int]]
    claimed: bool = False

    def debtors(self) -> frozenset[int]:
        """The readers that have yet to give the ticket back, of all groups that it may have gone to."""
        return frozenset().union(*self.owed.values())


@dataclass
class Ledger:
    """The books of one lane.

    space: where extents are placed. slots: how many tickets can be out at a time. expected: group -> readers.
    on_end: called with a ticket's slot when the ticket ends, before its extent can be taken again (5).
    """

    space: Space
    slots: int
    expected: dict[str, int]
    on_end: Callable[[int], None] = lambda slot: None
    readers: dict[int, str] = field(default_factory=dict)
    live: dict[int, Live] = field(default_factory=dict)  # by slot, oldest first
    orphans: int = 0
    _everyone: dict[str, frozenset[int]] = field(default_factory=dict)  # group -> its readers
    _unused: list[int] = field(default_factory=list)
    _highest: int = 0
    # Serials of two lanes do not meet, even if one should have the other's address.
    _serial: int = field(default_factory=lambda: secrets.randbits(62))

    # --- readers -------------------------------------------------------------------------------------------

    def is_open(self) -> bool:
        """Whether every expected reader has mapped the memory (1)."""
        return all(len(self._everyone.get(group, ())) >= wanted for group, wanted in self.expected.items())

    def join(self, reader: int, group: str) -> int:
        """A reader has mapped the memory. It owes the tickets of its group after the returned serial."""
        self.readers[reader] = group
        self._everyone = {**self._everyone, group: self._everyone.get(group, frozenset()) | {reader}}
        return self._serial

    def leave(self, reader: int) -> None:
        """A reader is dead or gone: what it held is free (4)."""
        group = self.readers.pop(reader, None)
        if group is None:
            return
        self._everyone = {**self._everyone, group: self._everyone[group] - {reader}}
        for ticket in list(self.live.values()):
            if reader in ticket.owed.get(group, ()):
                self._settle(ticket, group, reader)

    # --- extents -------------------------------------------------------------------------------------------

    def allocate(self, offset: int, nbytes: int) -> Extent:
        """An extent for `nbytes` at a place that the space has found."""
        self.space.take(offset, nbytes)
        return Extent(offset, self.space.rounded(nbytes))

    def settle(self, extent: Extent) -> None:
        """An extent is free when it has no ticket and no share holds it."""
        if not extent.tickets and not extent.shared:
            self.space.give(extent.offset)

    def hold(self, extent: Extent) -> None:
        """A share holds an extent: it stays when its last ticket ends."""
        extent.shared = True

    def let_go(self, extent: Extent) -> None:
        """The share has ended: the extent is free without a ticket, else with its last one."""
        extent.shared = False
        self.settle(extent)

    # --- tickets -------------------------------------------------------------------------------------------

    def issue(self, extent: Extent, now: float) -> Live | None:
        """A ticket on an extent, owed by every reader there is; None when all slots are out."""
        if self._unused:
            slot = self._unused.pop()
        elif self._highest < self.slots:
            slot = self._highest
            self._highest += 1
        else:
            return None
        self._serial += 1
        extent.tickets += 1
        ticket = self.live[slot] = Live(slot, self._serial, extent, now, self._everyone)
        return ticket

    def give_back(self, reader: int, slot: int, serial: int) -> bool:
        """A reader lets a ticket go; its group becomes the ticket's (2). False: it does not owe this ticket."""
        ticket = self._owed_by(reader, slot, serial)
        if ticket is None:
            return False
        group = self.readers[reader]
        if not ticket.claimed:
            ticket.claimed = True
            ticket.owed = {group: ticket.owed[group]}
        self._settle(ticket, group, reader)
        return True

    def forgo(self, reader: int, slot: int, serial: int) -> bool:
        """A reader never had a ticket and will never take it. False: it does not owe this ticket."""
        ticket = self._owed_by(reader, slot, serial)
        if ticket is None:
            return False
        if len(ticket.debtors()) == 1:
            self.orphans += 1
        self._settle(ticket, self.readers[reader], reader)
        return True

    def withdraw(self, slot: int, serial: int) -> bool:
        """The producer has not sent a ticket and never will (3). False: it is not out, or a reader has had it."""
        ticket = self.live.get(slot)
        if ticket is None or ticket.serial != serial or ticket.claimed:
            return False
        self._end(ticket)
        return True

    def issued_before(self, time: float) -> list[Live]:
        """Tickets issued before a time, that some reader may never have seen (3)."""
        return [ticket for ticket in self.live.values() if ticket.issued < time]

    def _owed_by(self, reader: int, slot: int, serial: int) -> Live | None:
        ticket = self.live.get(slot)
        group = self.readers.get(reader)
        if ticket is None or ticket.serial != serial or group is None or reader not in ticket.owed.get(group, ()):
            return None
        return ticket

    def _settle(self, ticket: Live, group: str, reader: int) -> None:
        ticket.owed = {**ticket.owed, group: ticket.owed[group] - {reader}}
        if not any(ticket.owed.values()):
            self._end(ticket)

    def _end(self, ticket: Live) -> None:
        self.on_end(ticket.slot)
        del self.live[ticket.slot]
        self._unused.append(ticket.slot)
        extent = ticket.extent
        extent.tickets -= 1
        self.settle(extent)
