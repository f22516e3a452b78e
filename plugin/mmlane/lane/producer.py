"""The producing side of a lane: what a program calls, and which objects it consists of."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import weakref
from collections import abc
from collections.abc import Callable, Sequence
from math import prod
from operator import index
from types import TracebackType

import torch

from mmlane.lane import arguments, memory
from mmlane.lane.allocator import Allocator
from mmlane.lane.bookkeeping import Hold, Member
from mmlane.lane.committing import Committer, Memory
from mmlane.lane.control import Control
from mmlane.lane.errors import LaneError, LaneUnavailable, Refused, needed
from mmlane.lane.filling import Filler
from mmlane.lane.guard import Guard
from mmlane.lane.housekeeping import Housekeeping
from mmlane.lane.invitation import Invitation
from mmlane.lane.issuing import SLOTS, Issuer
from mmlane.lane.lifecycle import Lifecycle
from mmlane.lane.mapping import PAGE, Mapping, round_up, tensor_at
from mmlane.lane.reservation import Reservation
from mmlane.lane.status import LaneStats, State
from mmlane.lane.ticket import DIMENSIONS, NAMES, read

logger = logging.getLogger("mmlane.lane")

SEGMENT = 4 << 20


class Lane:
    """One producer's memory. Make it, send `invitation` to the readers, put tensors, send the tickets.

    Thread-safe, but a signal handler, which may have broken into a call, may call `withdraw` and `recall` alone.
    Not usable in a forked child. `put` never waits for another process. A lane opens once, when all its readers
    have joined, and ends with the first of them that ends.

    Args:
        readers: group -> number of readers, which are numbered from 0. A group is the readers that receive the
            same tickets.
        capacity: address room in bytes, rounded up to segments; by default a quarter of the memory of the machine
            or control group. Memory is committed only as it is used.
        pinned: bytes of it that stay committed once the lane is open, rounded up to segments: readers on CUDA
            register them as pinned memory. Committed memory is used first.
        segment: bytes in which memory is committed and decommitted.
        idle: seconds between looks for unused memory; it is decommitted one to two of them after its last use.
        orphan: seconds after which readers are asked about a ticket that they have not released.

    Raises:
        ValueError: no reader expected, a size or time that is not positive, or more pinned than the capacity.
        TypeError: an argument of another type.
        LaneUnavailable: this machine or sandbox cannot carry a lane.
    """

    def __init__(
        self,
        readers: abc.Mapping[str, int],
        *,
        capacity: int | None = None,
        pinned: int = 0,
        segment: int = SEGMENT,
        idle: float = 60.0,
        orphan: float = 1800.0,
    ) -> None:
        self.expected = arguments.readers(readers)
        segment = round_up(arguments.whole("segment", segment, least=1, example="4 << 20 (4 MiB)"))
        pinned = arguments.whole("pinned", pinned, least=0, example="1 << 30 (1 GiB)")
        idle, orphan = arguments.seconds("idle", idle), arguments.seconds("orphan", orphan)
        if capacity is None:
            capacity = memory.default_capacity()
        else:
            capacity = arguments.whole("capacity", capacity, least=1, example="4 << 30 (4 GiB), or None")
        if pinned > capacity:
            raise ValueError(f"{pinned=} is more than {capacity=}: wanted no more bytes pinned than there are")
        capacity, pinned = round_up(capacity, segment), round_up(pinned, segment)
        self.members = tuple(
            Member(group, number) for group, count in self.expected.items() for number in range(count)
        )
        self.invitation = Invitation.make(f"mmlane-{os.getpid()}-{secrets.token_hex(8)}")
        self.name = self.invitation.name
        self._pid = os.getpid()
        base = SLOTS * 8  # the directory's size: where extents begin
        allocator = Allocator(capacity, segment, PAGE, pinned)
        backing = memory.Backing(base + capacity)
        try:
            with needed("fallocate"):
                backing.reserve(0, base)
            with needed("mmap"):
                mapping = Mapping(backing.fd, base + capacity, writable=True)
            if not mapping.populate(0, base):
                backing.degraded.append("MADV_POPULATE_WRITE: not in this kernel; pages are faulted in one by one")
            path = f"/proc/{self._pid}/fd/{backing.shared_fd}"
            self._control = Control(self, (base + capacity, SLOTS, path), backing.shared_fd, idle)
        except OSError as error:
            backing.close()  # the error's traceback keeps the object
            raise LaneUnavailable(
                f"a lane of {capacity} bytes could not be set up ({error}): ask for a smaller capacity, raise"
                " `ulimit -v` or `ulimit -n`, or allow in the sandbox what is named here"
            ) from error
        inbox, agenda = self._control.inbox, self._control.agenda
        self._lifecycle = Lifecycle(self.name, self.members, agenda)
        self.guard = Guard(self._lifecycle.poison)
        self._committer = Committer(
            self.name, Memory(backing, mapping), base, allocator, self._lifecycle, self.guard, agenda
        )
        self._issuer = Issuer(
            self.name, mapping.words(SLOTS), self.expected, self._committer, self._lifecycle, inbox, agenda
        )
        self.housekeeping = Housekeeping(
            self.name, orphan, self._lifecycle, self._issuer, self._committer, self.guard, inbox, agenda
        )
        self._filler = Filler(self._issuer, self._committer, self.housekeeping.registration, self.guard)
        for line in self._committer.degraded:
            logger.warning("lane %s goes without %s", self.name, line)
        _lanes.add(self)
        try:
            self._control.start()
        except RuntimeError as error:
            self._control.abandon()
            raise LaneUnavailable(
                f"no thread for a lane ({error}): raise `ulimit -u`, or the limit on pids"
            ) from error
        except BaseException:  # a signal handler raised; the thread may run
            self._lifecycle.end("the lane was interrupted while it was made")
            raise

    @property
    def state(self) -> State:
        """`waiting` for readers, `open`, `off` (see `switch`), or `closed` permanently."""
        self._check_process()
        return self._lifecycle.state

    @property
    def is_open(self) -> bool:
        """Whether all expected readers have joined, so that `put` can issue tickets."""
        return self.state == "open"

    @property
    def is_closed(self) -> bool:
        """Whether the lane has ended, by `close`, with one of its readers, or by a failure."""
        return bool(self._lifecycle.closed)

    def wait_open(self, timeout: float | None = None) -> bool:
        """Wait until the lane has opened; False after `timeout` seconds, or when it is closed."""
        self._check_process()
        return self._lifecycle.wait_open(timeout)

    async def wait_open_async(self, timeout: float | None = None) -> bool:
        """As `wait_open`, for a task: the event loop goes on. Cancelled, it leaves nothing behind."""
        self._check_process()
        return await self._lifecycle.wait_open_async(timeout)

    def put(self, tensor: torch.Tensor, *, in_place: bool = False) -> bytes | Refused:
        """Copy a tensor into the lane and return a ticket for it, for the readers of one group to take or discard.

        tensor: any shape, strides and dtype of whole bytes, dense, on the CPU; readers get it contiguous.
        in_place: if it lies in a reservation of this lane already, publish it there, without a copy; it must not
            be written to any more.

        Returns a Refused where no ticket can be had; never waits for readers. Raises TypeError for what is no
        tensor at all, LaneError in a forked child.
        """
        self._check_process()
        if in_place and (found := self._filler.hold_of(tensor)) is not None:
            return self.publish(tensor, *found)
        hold = Hold(self._issuer.dropped.append)
        copied = self._filler.copy(tensor, hold)
        if isinstance(copied, Refused):
            return copied
        with self.guard.lock, self.guard:
            self._issuer.count(copied.nbytes, copied.seconds)
            ticket = self._issuer.issue(tensor, hold, 0)
            if isinstance(ticket, bytes):  # else the lane may have been interrupted in the middle of anything
                self._issuer.tickets.let_go(hold)
            return ticket

    def copy(self, tensor: torch.Tensor, *, in_place: bool = False) -> Reservation | Refused:
        """Copy a tensor into the lane once, for several tickets: `publish` of what this returns issues each.

        It is kept until the reservation is closed or dropped, whatever becomes of the tickets. Else as `put`.
        """
        self._check_process()
        if in_place and (found := self._filler.hold_of(tensor)) is not None:
            hold, at = found
            return Reservation(self, hold, tensor, at)
        hold = Hold(self._issuer.dropped.append)
        copied = self._filler.copy(tensor, hold)
        if isinstance(copied, Refused):
            return copied
        with self.guard.lock, self.guard:
            self._issuer.count(copied.nbytes, copied.seconds)
        return Reservation(self, hold, tensor_at(copied.owner, tensor.dtype, tensor.shape))

    def reserve(self, shape: Sequence[int], dtype: torch.dtype, *, counts: bool = True) -> Reservation | Refused:
        """Room for a contiguous tensor, to be filled by the caller, and published in one piece or several.

        counts: whether a refusal counts in `LaneStats.fallbacks`; not so if the tensor is put later all the same.

        Returns a Refused as `put` does. Raises LaneError in a forked child, ValueError for a dtype that does not
        travel by lane or a shape that is none.
        """
        self._check_process()
        try:
            sizes = tuple(map(index, shape))  # of numpy's integers, say, plain ones
        except TypeError as error:
            raise ValueError(f"shape {shape!r}: not a sequence of integers") from error
        if dtype not in NAMES or len(sizes) > DIMENSIONS or any(size < 0 for size in sizes):
            raise ValueError(f"{dtype} of shape {sizes}: no tensor that travels by lane")
        hold = Hold(self._issuer.dropped.append)
        owner = self._filler.reserve(prod(sizes) * dtype.itemsize, hold, counts=counts)
        if isinstance(owner, Refused):
            return owner
        return Reservation(self, hold, tensor_at(owner, dtype, sizes))

    def pin(self, device: int) -> None:
        """Register what stays committed (`pinned`) with CUDA in this process, too, for that device.

        Then a copy from the device into a reservation goes at full speed. It is done in the background, once. Does
        nothing until all of that part is committed, a moment after the lane has opened: so call it again, before
        each copy. Call it where CUDA is in use already: it would make a context. What fails is one line in the
        log; copies then go by way of pageable memory.
        """
        self._check_process()
        self.housekeeping.registration.begin(device)

    def publish(self, part: torch.Tensor, hold: Hold, at: int) -> bytes | Refused:
        """For a reservation: a ticket for a part of what its hold keeps, `at` bytes from its begin."""
        self._check_process()
        with self.guard.lock, self.guard:
            self._issuer.drain_now_and_then()
            return self._issuer.issue(part, hold, at)

    def withdraw(self, ticket: bytes) -> None:
        """Take back a ticket that was never sent and never will be; its bytes can be used again.

        For no other: a reader that holds it would see them change. Can be called wherever Python runs, finalizers
        included. Raises MalformedTicket.
        """
        content = read(ticket)
        if content.lane == self.name:
            # The next drain does it: it takes no lock here.
            self._issuer.withdrawn.append((content.slot, content.serial))

    def recall(self, ticket: bytes) -> None:
        """Have a ticket reclaimed that was probably never sent, or got lost: once no reader says it has it.

        Within two periods (`idle`) instead of after `orphan` seconds; a reader that has it keeps it, one that sees
        it later refuses it. Can be called wherever Python runs, finalizers included. Raises MalformedTicket.
        """
        content = read(ticket)
        if content.lane == self.name:
            self.housekeeping.recalled.append((content.slot, content.serial))

    def drain(self) -> None:
        """Handle what readers have released so far. `put` does so when it needs room, and now and then."""
        self._check_process()
        with self.guard.lock, self.guard:
            self._issuer.drain()

    def switch(self, off: bool) -> None:
        """Refuse puts from now on (cause `off`), or accept them again. What is out can be taken and released.

        Raises TypeError for what is not a bool.
        """
        self._check_process()
        if not isinstance(off, bool):
            raise arguments.wrong("off", off, "True to refuse puts, or False to accept them again")
        if off != self._lifecycle.is_off and not self._lifecycle.closed:
            logger.info("lane %s was switched %s", self.name, "off" if off else "on")
        self._lifecycle.is_off = off

    def stats(self) -> LaneStats:
        """The lane as it is now, everything drained."""
        self._check_process()
        issuer, allocator = self._issuer, self._committer.allocator
        with self.guard.lock, self.guard:
            issuer.drain()
            return LaneStats(
                name=self.name,
                pid=self._pid,
                state=self.state,
                capacity_bytes=allocator.capacity,
                committed_bytes=allocator.committed_bytes,
                pinned_bytes=self.housekeeping.pinnable.nbytes,
                used_bytes=allocator.used_bytes,
                extents=len(allocator.used),
                tickets=len(issuer.tickets.live),
                expected_readers=dict(self.expected),
                joined_readers={
                    group: sorted(n for g, n in self._lifecycle.joined if g == group) for group in self.expected
                },
                puts=issuer.puts,
                shared_puts=issuer.shared_puts,
                copied_bytes=issuer.copied_bytes,
                copy_seconds=issuer.copy_seconds,
                fallbacks=dict(issuer.fallbacks),
                lost_tickets=issuer.tickets.lost,
                malformed_messages=issuer.malformed_messages,
                rejected_peers=self._control.admission.rejected,
                degraded=tuple(self._committer.degraded),
            )

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """End the lane. Tensors that readers hold stay valid; tickets on their way can be taken for a while.

        Does nothing in a forked child, and nothing while Python itself ends: other threads stand still by then,
        with whatever locks they hold, and the kernel tells the readers.
        """
        if _ending() or os.getpid() != self._pid:
            return
        self._lifecycle.end("the lane was closed")
        self._control.join()

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Lane:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)  # which waits for the control thread

    def __repr__(self) -> str:
        return f"<Lane {self.name}>"

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LaneError(
                f"{self!r} belongs to process {self._pid}: a forked child has to open a lane of its own"
            )

    def _forget(self) -> None:
        """In a forked child: let go of what was inherited, so that readers can notice the parent's end."""
        self._lifecycle.closed = "forked"
        self._control.abandon()
        if self._committer.memory is not None:
            self._committer.memory.backing.close()
        self._committer.memory = None  # it goes with the last tensor that was reserved


_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()


def _after_fork() -> None:
    for lane in list(_lanes):
        lane._forget()
    _lanes.clear()


os.register_at_fork(after_in_child=_after_fork)
