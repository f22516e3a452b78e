"""The state of a lane: which extents are used, which tickets are out, and what has come of them so far."""

from __future__ import annotations

import ctypes
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

import torch

from mmlane.lane import failpoints, protocol
from mmlane.lane.agenda import Agenda
from mmlane.lane.bookkeeping import Bookkeeping, Hold, Kept, Member
from mmlane.lane.committing import Committer
from mmlane.lane.errors import Cause, Refused
from mmlane.lane.inbox import ALL, Inbox
from mmlane.lane.lifecycle import Lifecycle
from mmlane.lane.ticket import Content, digest, write

SLOTS = 1 << 16  # tickets that can be out at a time
_DRAIN = 16  # puts after which releases are handled, needed or not
_AT_ONCE = 32  # messages of each reader to handle then


class Allocation(NamedTuple):
    """Where an extent is, and the (offset, nbytes) ranges that have to be committed for it."""

    offset: int
    uncommitted: list[tuple[int, int]]


class Issuer:
    """Finds extents, issues tickets, and ends them as readers release them. All with the lane's lock held.

    But `withdrawn` and `dropped` take appends at any time: tickets (slot, serial) that were never sent, and holds
    that are gone. The next drain sees to them.
    name: the lane's. directory: SLOTS numbers that readers have mapped, one for each ticket that is out.
    groups: number of readers by group.

    Other attributes: `tickets`; what `LaneStats` tells: `puts`, `shared_puts`, `copied_bytes`, `copy_seconds`,
    `fallbacks`, `malformed_messages`.
    """

    def __init__(
        self,
        name: str,
        directory: ctypes.Array[ctypes.c_uint64],
        groups: Mapping[str, int],
        committer: Committer,
        lifecycle: Lifecycle,
        inbox: Inbox,
        agenda: Agenda,
    ) -> None:
        members = {group: frozenset(range(number)) for group, number in groups.items()}
        self.tickets = Bookkeeping(committer.allocator, SLOTS, members, self._clear)
        self.withdrawn: deque[tuple[int, int]] = deque()
        self.dropped: deque[Kept] = deque()
        self.puts = self.shared_puts = self.copied_bytes = self.malformed_messages = 0
        self.copy_seconds = 0.0
        self.fallbacks: Counter[Cause] = Counter()
        self._name = name
        self._directory = directory
        self._allocator = committer.allocator
        self._committer = committer
        self._lifecycle = lifecycle
        self._inbox = inbox
        self._agenda = agenda
        self._undrained = 0  # puts since the last drain

    def refuse(self, cause: Cause, detail: str, *, counts: bool = True) -> Refused:
        """A put is refused; whether it counts as one that goes another way."""
        if counts:
            self.fallbacks[cause] += 1
        return Refused(cause, detail)

    def _why_not_open(self, *, counts: bool = True) -> Refused | None:
        refused = self._lifecycle.refusal()
        return None if refused is None else self.refuse(refused.cause, refused.detail, counts=counts)

    def find(self, nbytes: int, hold: Hold, *, counts: bool) -> Allocation | Refused:
        """An extent of that size, for the hold to keep. counts: as for `refuse`."""
        if (refused := self._why_not_open(counts=counts)) is not None:
            if refused.cause == "not_open":
                self._committer.came_early(nbytes)
            return refused
        if nbytes > self._allocator.capacity:
            return self.refuse(
                "oversize",
                f"{nbytes} bytes, more than the lane's capacity of {self._allocator.capacity}: raise it",
                counts=counts,
            )
        offset, uncommitted = self._allocator.place(nbytes)
        if offset is None or uncommitted:
            self.drain()  # before memory is committed, use what was released
            offset, uncommitted = self._allocator.place(nbytes)
        if offset is None:
            return self.refuse(
                "full",
                f"{nbytes} bytes wanted, {self._allocator.used_bytes} of {self._allocator.capacity} are used by"
                f" {len(self.tickets.live)} tickets: readers must let tensors go, or the capacity be raised",
                counts=counts,
            )
        self.tickets.allocate(offset, nbytes, hold)
        return Allocation(offset, uncommitted)

    def issue(self, tensor: torch.Tensor, hold: Hold, at: int) -> bytes | Refused:
        """A ticket for what lies at a place in an extent and looks like a tensor."""
        if (refused := self._why_not_open()) is not None:  # any more
            return refused
        extent = hold.extent
        assert extent is not None  # the hold keeps it
        if len(self.tickets.live) >= SLOTS:
            self.drain()
        live = self.tickets.issue(extent, time.monotonic())
        if live is None:
            return self.refuse(
                "full", f"{SLOTS} tickets are out, more there cannot be: readers must let tensors go"
            )
        nbytes = tensor.numel() * tensor.itemsize
        ticket = write(
            Content(
                self._name, live.slot, live.serial, extent.offset + at, nbytes, tensor.dtype, tuple(tensor.shape)
            )
        )
        self._directory[live.slot] = digest(ticket)
        self.puts += 1
        self.shared_puts += extent.published
        extent.published = True
        self._agenda.watch()
        failpoints.reached("put.published")
        return ticket

    def _clear(self, slot: int) -> None:
        self._directory[slot] = 0

    def count(self, nbytes: int, seconds: float) -> None:
        """A tensor was copied."""
        self.copied_bytes += nbytes
        self.copy_seconds += seconds

    def drain_now_and_then(self) -> None:
        """There is one more put."""
        self._undrained += 1
        if self._undrained >= _DRAIN:
            self.drain(_AT_ONCE)

    def drain(self, limit: int = ALL) -> None:
        """Handle what was withdrawn or dropped, and up to `limit` messages of each reader."""
        if self._lifecycle.closed:
            return
        self._undrained = 0
        for member, message in self._inbox.received(limit):
            self._handle(member, message)
        failpoints.reached("drain.received")
        while self.withdrawn:
            self.tickets.withdraw(*self.withdrawn.popleft())
        while self.dropped:
            self.tickets.dropped(self.dropped.popleft())
        if self._committer.ahead():
            self._agenda.work()

    def _handle(self, member: Member, message: bytes) -> None:
        kind = message[0]
        try:
            items = protocol.read_pairs(message)
        except protocol.ProtocolError:
            items = []
        known = bool(items)
        if kind == protocol.RELEASE:
            for slot, serial in items:
                known = self.tickets.release(member, slot, serial) and known
        elif kind == protocol.NOT_SEEN:
            for slot, serial in items:
                known = self.tickets.not_seen(member, slot, serial) and known
        else:
            known = kind == protocol.MAPPED  # a join that was interrupted, and resumed
        if not known:
            # The reader may hold tensors, so whatever it writes, it is not cut off: that would end the lane.
            self.malformed_messages += 1
            if self.malformed_messages == 1:
                self._agenda.log(
                    logging.WARNING,
                    "lane %s ignores a malformed message of %s: %r",
                    self._name,
                    member,
                    message[:32],
                )
