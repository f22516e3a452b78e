"""A lane and its readers in the process of the test: real memory and sockets, and every step can be looked at."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from mmlane.lane import Lane, LaneStats, Reader, Refused, Reservation
from mmlane.lane.memory import Backing
from mmlane.lane.ticket import read
from tests.lane.harness import kernel
from tests.lane.harness.waiting import DEADLINE, eventually

PAGE = 4096
SEGMENT = 64 << 10


@dataclass
class LaneWithReaders:
    """An open lane, the readers of its only group `tp`, and what is at hand of both."""

    lane: Lane
    readers: list[Reader] = field(default_factory=list)

    @property
    def reader(self) -> Reader:
        """The first one."""
        return self.readers[0]

    def put(self, tensor: torch.Tensor) -> bytes:
        """A ticket; a refusal is a failure."""
        return put(self.lane, tensor)

    def copy(self, tensor: torch.Tensor) -> Reservation:
        """A copy that is kept; a refusal is a failure."""
        copy = self.lane.copy(tensor)
        assert isinstance(copy, Reservation), copy
        return copy

    def discard(self, ticket: bytes) -> None:
        """Have the only reader discard a ticket, and wait for its end: the reader's thread does it."""
        before = self.lane.stats().tickets
        self.reader.discard(ticket)
        eventually(lambda: self.lane.stats().tickets < before, "the ticket is discarded")

    def refused(self, tensor: Any, *, kept: bool = False) -> Refused:
        """A refusal, of a put or of a copy that would be kept, which is counted and changes nothing else."""
        before = self.lane.stats()
        refused = self.lane.copy(tensor) if kept else self.lane.put(tensor)
        assert isinstance(refused, Refused)
        after = self.lane.stats()
        assert after.fallbacks.get(refused.cause, 0) == before.fallbacks.get(refused.cause, 0) + 1
        assert figures(after) == figures(before)
        return refused

    def figures(self) -> dict[str, Any]:
        """What is out and held now."""
        return figures(self.lane.stats())

    def nothing_is_out(self) -> bool:
        """Whether all tickets have ended, and no extent is held."""
        stats = self.lane.stats()
        return (stats.tickets, stats.extents, stats.used_bytes) == (0, 0, 0)

    def wait_until_nothing_is_out(self) -> None:
        """Releases may wait for a device or a reader's thread."""
        eventually(self.nothing_is_out, "all extents are back")


def figures(stats: LaneStats) -> dict[str, Any]:
    """All that a request that fails must not change: it may change its own count, and memory committed."""
    return {
        "tickets": stats.tickets,
        "extents": stats.extents,
        "used_bytes": stats.used_bytes,
        "joined": stats.joined,
        "puts": stats.puts,
        "shared": stats.shared,
        "lost_tickets": stats.lost_tickets,
        "malformed_messages": stats.malformed_messages,
        "rejected_peers": stats.rejected_peers,
    }


@contextmanager
def lane_with_readers(
    readers: int = 1, *, linger: float = 30.0, device: str | None = None, **options: Any
) -> Iterator[LaneWithReaders]:
    """A lane, of 16 small segments by default. Nothing of it is left in this process when all is well."""
    before = kernel.lane_files(os.getpid())
    options = {"capacity": 16 * SEGMENT, "segment": SEGMENT, **options}
    pair = LaneWithReaders(Lane({"tp": readers}, **options))
    try:
        for number in range(readers):
            pair.readers.append(Reader("tp", number, linger=linger, device=device))
            pair.readers[-1].join(pair.lane.invitation, DEADLINE)
        assert pair.lane.wait_open(DEADLINE)
        yield pair
        assert pair.lane.stats().malformed_messages == 0
    finally:
        for reader in pair.readers:
            reader.close()
        pair.lane.close()
    gc.collect()
    eventually(lambda: kernel.lane_files(os.getpid()) <= before, "the lane's memory is let go")


def held(stats: LaneStats) -> tuple[int, int, int]:
    """What is out: tickets, extents, pages."""
    return stats.tickets, stats.extents, stats.used_bytes // PAGE


def offset(ticket: bytes) -> int:
    """Where in the lane a ticket's tensor is."""
    return read(ticket).offset


# --- a lane alone ------------------------------------------------------------------------------------------

_numbers = count()


def backing(lane: Lane) -> Backing:
    """The memory of a lane that has not ended."""
    assert lane._committer.memory is not None
    return lane._committer.memory.backing


def copy(lane: Lane, tensor: torch.Tensor) -> Reservation:
    """A copy that is kept; a refusal is a failure."""
    room = lane.copy(tensor)
    assert isinstance(room, Reservation), room
    return room


def put(lane: Lane, tensor: torch.Tensor) -> bytes:
    """A ticket; a refusal is a failure."""
    ticket = lane.put(tensor)
    assert isinstance(ticket, bytes), ticket
    return ticket


def published(copy: Reservation) -> bytes:
    """A ticket for all of it; a refusal is a failure."""
    ticket = copy.publish()
    assert isinstance(ticket, bytes), ticket
    return ticket


def new_tensor(elements: int = 3000) -> torch.Tensor:
    """A tensor like no other."""
    return torch.arange(elements, dtype=torch.int64) * 1000 + next(_numbers)


def serves(lane: Lane, *readers: Reader) -> None:
    """A tensor travels to these readers, or to one that joins for it: the lane has come to no harm."""
    with ExitStack() as scope:
        if not readers:
            readers = (scope.enter_context(Reader("tp")),)
            readers[0].join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        tensor = new_tensor()
        ticket = put(lane, tensor)
        for reader in readers:
            assert torch.equal(reader.take(ticket), tensor)
        eventually(lambda: lane.stats().tickets == 0, "the tensor is released")
