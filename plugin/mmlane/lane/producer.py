"""The producing side of a lane: its memory, the readers that have joined it, and `put`."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import threading
import time
import weakref
from collections import Counter, abc, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from math import prod
from operator import index
from types import TracebackType
from typing import NamedTuple

import torch

from mmlane.lane import arguments, failpoints, memory, protocol
from mmlane.lane.allocator import Allocator
from mmlane.lane.bookkeeping import Bookkeeping, Hold, Kept, Live, Member
from mmlane.lane.control import Control
from mmlane.lane.errors import Cause, LaneError, LaneUnavailable, Refused, needed
from mmlane.lane.invitation import Invitation
from mmlane.lane.mapping import PAGE, Mapping, Owner, copy_tensor, round_up, tensor_at
from mmlane.lane.reservation import Reservation
from mmlane.lane.status import LaneStats, State
from mmlane.lane.ticket import DIMENSIONS, NAMES, Content, digest, read, unsupported, write

logger = logging.getLogger("mmlane.lane")

SEGMENT = 4 << 20
SLOTS = 1 << 16  # tickets that can be out at a time
_AHEAD = 8 << 20  # bytes at most to commit ahead of need
_DRAIN = 16  # puts after which releases are handled, needed or not
_AT_ONCE = 64  # messages to handle then
_STEP = 4  # segments to commit in one turn of the control thread, for readers to pin


class _Change:
    """Goes with the lane's lock while its state is changed. What interrupts that may leave it half changed.

    The next thread to get here sees it by `is_under_way`, however often the one before was interrupted.
    """

    def __init__(self, poison: Callable[[str], None]) -> None:
        self._poison = poison
        self._is_under_way = False

    def __enter__(self) -> None:
        if self._is_under_way:
            self._poison("an exception")
        self._is_under_way = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._is_under_way = False
        else:
            self._poison(repr(error))


class _Place(NamedTuple):
    """Where an extent is, and the (offset, nbytes) ranges that have to be committed for it."""

    offset: int
    uncommitted: list[tuple[int, int]]


class _Copied(NamedTuple):
    """A copy that was made, and has to be counted."""

    owner: Owner
    nbytes: int
    seconds: float


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
        self.lock = threading.Lock()
        self._change = _Change(self._poison)
        self._pid = os.getpid()
        self._orphan = orphan
        self._closed = ""  # why it is
        self._is_off = self._has_opened = False
        self._joined: set[Member] = set()
        self._waiting: deque[threading.Lock | _Task] = deque()  # one of each thread or task, for it to open
        self._lines: deque[tuple[int, str, tuple[object, ...]]] = deque()  # to be logged by the control thread
        self._withdrawn: deque[tuple[int, int]] = deque()
        self._recalled: deque[tuple[int, int]] = deque()
        self._dropped: deque[Kept] = deque()  # for holds that were dropped
        self._refused: Counter[Cause] = Counter()
        self._puts = self._shared = self._copied = self._malformed = 0
        self._copy_seconds = 0.0
        self._ahead = 0  # bytes to have ready for the next put, as large as the largest since the last look
        self._undrained = 0  # puts since the last drain
        self._starved = False  # memory could not be had; not asked for ahead of need until the next look
        self._committing = threading.Lock()
        self._never_decommits = False  # it cannot be done here
        self._lost = 0  # tickets of which a line has told
        self._pinned = 0  # bytes that are committed and stay so
        self._uninformed: set[Member] = set()  # members that have yet to hear of them

        self._base = SLOTS * 8  # the directory's size: where extents begin
        groups = {group: frozenset(range(number)) for group, number in self.expected.items()}
        self._allocator = Allocator(capacity, segment, PAGE, pinned)
        self._tickets = Bookkeeping(self._allocator, SLOTS, groups, self._clear)
        backing = memory.Backing(self._base + capacity)
        try:
            with needed("fallocate"):
                backing.reserve(0, self._base)
            with needed("mmap"):
                mapping = Mapping(backing.fd, self._base + capacity, writable=True)
            if not mapping.populate(0, self._base):
                backing.degraded.append("MADV_POPULATE_WRITE: not in this kernel; pages are faulted in one by one")
            path = f"/proc/{self._pid}/fd/{backing.shared_fd}"
            self._control = Control(
                self, self.invitation, (self._base + capacity, SLOTS, path), backing.shared_fd, idle
            )
        except OSError as error:
            backing.close()  # the error's traceback keeps the object
            raise LaneUnavailable(
                f"a lane of {capacity} bytes could not be set up ({error}): ask for a smaller capacity, raise"
                " `ulimit -v` or `ulimit -n`, or allow in the sandbox what is named here"
            ) from error
        # Both go with the last thread that uses them.
        self._backing: memory.Backing | None = backing
        self._mapping: Mapping | None = mapping
        self._directory = mapping.words(SLOTS)
        self._degraded = backing.degraded
        for line in self._degraded:
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
            self._end("the lane was interrupted while it was made")
            raise

    # --- for the producing process -------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """`waiting` for readers, `open`, `off` (see `switch`), or `closed` for ever."""
        self._check_process()
        if self._closed:
            return "closed"
        if self._is_off:
            return "off"
        return "open" if self._has_opened else "waiting"

    @property
    def is_open(self) -> bool:
        """Whether all expected readers have joined, so that `put` can issue tickets."""
        return self.state == "open"

    @property
    def is_closed(self) -> bool:
        """Whether the lane has ended, by `close`, with one of its readers, or by a failure."""
        return bool(self._closed)

    def wait_open(self, timeout: float | None = None) -> bool:
        """Wait until the lane has opened; False after `timeout` seconds, or when it is closed."""
        self._check_process()
        waiting = threading.Lock()  # no Condition, no Event: a signal handler that raises can break those
        waiting.acquire()
        self._waiting.append(waiting)
        if not self._closed and not self._has_opened:
            waiting.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        with suppress(ValueError):  # it was woken
            self._waiting.remove(waiting)
        return self._has_opened and not self._closed

    async def wait_open_async(self, timeout: float | None = None) -> bool:
        """As `wait_open`, for a task: the event loop goes on meanwhile. Cancelled, it leaves nothing behind."""
        self._check_process()
        waiting = _Task()
        self._waiting.append(waiting)
        try:
            if not self._closed and not self._has_opened:
                await asyncio.wait([waiting.woken], timeout=timeout)
        finally:
            with suppress(ValueError):  # it was woken
                self._waiting.remove(waiting)
        return self._has_opened and not self._closed

    def put(self, tensor: torch.Tensor) -> bytes | Refused:
        """Copy a tensor into the lane and return a ticket for it, for the readers of one group to take or discard.

        tensor: any shape, strides and dtype of whole bytes, dense, on the CPU; readers get it contiguous.

        Returns a Refused where no ticket can be had; never waits for readers. Raises TypeError for what is no
        tensor at all, LaneError in a forked child.
        """
        hold = Hold(self._dropped.append)
        copied = self._copy(tensor, hold)
        if isinstance(copied, Refused):
            return copied
        with self.lock, self._change:
            self._count(copied)
            ticket = self._issue(tensor, hold, 0)
            if isinstance(ticket, bytes):  # else the lane may have been interrupted in the middle of anything
                self._tickets.let_go(hold)
            return ticket

    def copy(self, tensor: torch.Tensor) -> Reservation | Refused:
        """Copy a tensor into the lane once, for several tickets: `publish` of what this returns issues each.

        It is kept until the reservation is closed or dropped, whatever becomes of the tickets. Else as `put`.
        """
        hold = Hold(self._dropped.append)
        copied = self._copy(tensor, hold)
        if isinstance(copied, Refused):
            return copied
        with self.lock, self._change:
            self._count(copied)
        return Reservation(self, hold, tensor_at(copied.owner, tensor.dtype, tensor.shape))

    def reserve(self, shape: Sequence[int], dtype: torch.dtype) -> Reservation | Refused:
        """Room for a contiguous tensor, to be filled by anybody, and published in one piece or several.

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
        hold = Hold(self._dropped.append)
        owner = self._reserve(prod(sizes) * dtype.itemsize, hold)
        if isinstance(owner, Refused):
            return owner
        return Reservation(self, hold, tensor_at(owner, dtype, sizes))

    def withdraw(self, ticket: bytes) -> None:
        """Take back a ticket that was never sent and never will be; its bytes can be used again.

        For no other: a reader that holds it would see them change. Can be called wherever Python runs, finalizers
        included. Raises MalformedTicket.
        """
        content = read(ticket)
        if content.lane == self.name:
            self._withdrawn.append((content.slot, content.serial))  # the next drain does it: it takes no lock here

    def recall(self, ticket: bytes) -> None:
        """Have a ticket reclaimed that was probably never sent, or got lost: once no reader says it has it.

        Within two periods (`idle`) instead of after `orphan` seconds; a reader that has it keeps it, one that sees
        it later refuses it. Can be called wherever Python runs, finalizers included. Raises MalformedTicket.
        """
        content = read(ticket)
        if content.lane == self.name:
            self._recalled.append((content.slot, content.serial))

    def drain(self) -> None:
        """Handle what readers have released so far. `put` does so when it needs room, and now and then."""
        self._check_process()
        with self.lock, self._change:
            self._drain()

    def switch(self, off: bool) -> None:
        """Refuse puts from now on (cause `off`), or accept them again. What is out can be taken and released.

        Raises TypeError for what is not a bool.
        """
        self._check_process()
        if not isinstance(off, bool):
            raise arguments.wrong("off", off, "True to refuse puts, or False to accept them again")
        if off != self._is_off and not self._closed:
            logger.info("lane %s was switched %s", self.name, "off" if off else "on")
        self._is_off = off

    def stats(self) -> LaneStats:
        """The lane as it is now, everything drained."""
        self._check_process()
        with self.lock, self._change:
            self._drain()
            return LaneStats(
                name=self.name,
                pid=self._pid,
                state=self.state,
                capacity_bytes=self._allocator.capacity,
                committed_bytes=self._allocator.committed_bytes,
                pinned_bytes=self._pinned,
                used_bytes=self._allocator.used_bytes,
                extents=len(self._allocator.used),
                tickets=len(self._tickets.live),
                expected_readers=dict(self.expected),
                joined_readers={
                    group: sorted(n for g, n in self._joined if g == group) for group in self.expected
                },
                puts=self._puts,
                shared_puts=self._shared,
                copied_bytes=self._copied,
                copy_seconds=self._copy_seconds,
                fallbacks=dict(self._refused),
                lost_tickets=self._tickets.lost,
                malformed_messages=self._malformed,
                rejected_peers=self._control.rejected,
                degraded=tuple(self._degraded),
            )

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """End the lane. Tensors that readers hold stay valid; tickets on their way can be taken for a while.

        Does nothing in a forked child, and nothing while Python itself ends: other threads stand still by then,
        with whatever locks they hold, and the kernel tells the readers.
        """
        if _ending() or os.getpid() != self._pid:
            return
        self._end("the lane was closed")
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

    # --- states --------------------------------------------------------------------------------------------

    def _end(self, problem: str) -> None:
        """The lane is closed from now on: nothing is issued any more, and no memory used again. Takes no lock."""
        if not self._closed:
            self._closed = problem
        self._control.stop()

    def _poison(self, error: str) -> None:
        """Readers must never be given what half-written state says is free: the lane ends here."""
        if not self._closed:
            self._log(
                logging.ERROR, "lane %s is closed: %s interrupted it while it changed its state", self.name, error
            )
        self._end(f"the lane was interrupted while it changed its state: {error}")

    def _log(self, level: int, line: str, *args: object) -> None:
        """Have the control thread log a line: a handler may be slow, and no put is to wait for it."""
        self._lines.append((level, line, args))
        self._control.has_work()

    def _refuse(self, cause: Cause, detail: str) -> Refused:
        self._refused[cause] += 1
        return Refused(cause, detail)

    def _why_not_open(self) -> Refused | None:
        if self._closed:
            return self._refuse("closed", self._closed)
        if self._has_opened and not self._is_off:
            return None
        if self._is_off:
            return self._refuse("off", "the lane was switched off; `mmlane on` switches it on again")
        missing = ", ".join(str(member) for member in self.members if member not in self._joined)
        return self._refuse("not_open", f"the lane opens when all its readers have joined; missing: {missing}")

    # --- putting, in pieces; without the lock --------------------------------------------------------------

    def _copy(self, tensor: torch.Tensor, hold: Hold) -> _Copied | Refused:
        """A copy of a tensor in an extent that the hold keeps."""
        self._check_process()
        if problem := unsupported(tensor):
            if not isinstance(tensor, torch.Tensor):
                wanted = "a torch.Tensor, like torch.zeros(3, 224, 224)"
                raise arguments.wrong("tensor", tensor, wanted, quoted=False)
            with self.lock, self._change:
                return self._refuse("unsupported", problem)
        nbytes = tensor.numel() * tensor.itemsize
        owner = self._reserve(nbytes, hold)
        if isinstance(owner, Refused):
            return owner
        began = time.perf_counter()
        copy_tensor(tensor, nbytes, owner)
        took = time.perf_counter() - began
        failpoints.reached("put.copied")
        return _Copied(owner, nbytes, took)

    def _reserve(self, nbytes: int, hold: Hold) -> Owner | Refused:
        """An extent that the hold keeps, with memory behind it."""
        with self.lock, self._change:
            self._drain_now_and_then()
            placed = self._find(nbytes, hold)
            if isinstance(placed, Refused):
                return placed
            self._ahead = max(self._ahead, min(nbytes, _AHEAD))
            backing, mapping = self._backing, self._mapping
        assert backing is not None and mapping is not None  # it is open
        failpoints.reached("put.allocated")
        # Nobody else knows the extent yet, so memory is committed and filled without the lock.
        try:
            self._commit(backing, mapping, placed.uncommitted)
        except OSError as error:
            if error.errno is None:  # a TimeoutError of a signal handler
                raise
            with self.lock, self._change:
                return self._refuse("full", f"no memory for {nbytes} bytes: {error}")
        failpoints.reached("put.committed")
        return mapping.owner(self._base + placed.offset, keeps=(mapping, hold))

    # --- with the lock held --------------------------------------------------------------------------------

    def _drain_now_and_then(self) -> None:
        self._undrained += 1
        if self._undrained >= _DRAIN:
            self._drain(_AT_ONCE)

    def _count(self, copied: _Copied) -> None:
        self._copied += copied.nbytes
        self._copy_seconds += copied.seconds

    def _find(self, nbytes: int, hold: Hold) -> _Place | Refused:
        """An extent of that size, for the hold to keep."""
        if (refused := self._why_not_open()) is not None:
            return refused
        if nbytes > self._allocator.capacity:
            return self._refuse(
                "oversize",
                f"{nbytes} bytes, more than the lane's capacity of {self._allocator.capacity}: raise it",
            )
        offset, uncommitted = self._place(nbytes)
        if offset is None or uncommitted:
            self._drain()  # before memory is committed, use what was released
            offset, uncommitted = self._place(nbytes)
        if offset is None:
            return self._refuse(
                "full",
                f"{nbytes} bytes wanted, {self._allocator.used_bytes} of {self._allocator.capacity} are used by"
                f" {len(self._tickets.live)} tickets: readers must let tensors go, or the capacity be raised",
            )
        self._tickets.allocate(offset, nbytes, hold)
        return _Place(offset, uncommitted)

    def _place(self, nbytes: int) -> tuple[int | None, list[tuple[int, int]]]:
        """Where an extent would go, and what has to be committed for it."""
        offset = self._allocator.find(nbytes)
        return offset, [] if offset is None else self._allocator.uncommitted(offset, nbytes)

    def _issue(self, tensor: torch.Tensor, hold: Hold, at: int) -> bytes | Refused:
        """A ticket for what lies at a place in an extent and looks like a tensor."""
        if (refused := self._why_not_open()) is not None:  # any more
            return refused
        extent = hold.extent
        assert extent is not None  # the hold keeps it
        if len(self._tickets.live) >= SLOTS:
            self._drain()
        live = self._tickets.issue(extent, time.monotonic())
        if live is None:
            return self._refuse(
                "full", f"{SLOTS} tickets are out, more there cannot be: readers must let tensors go"
            )
        nbytes = tensor.numel() * tensor.itemsize
        ticket = write(
            Content(
                self.name, live.slot, live.serial, extent.offset + at, nbytes, tensor.dtype, tuple(tensor.shape)
            )
        )
        self._directory[live.slot] = digest(ticket)
        self._puts += 1
        self._shared += extent.published
        extent.published = True
        self._control.watch()
        failpoints.reached("put.published")
        return ticket

    def publish(self, part: torch.Tensor, hold: Hold, at: int) -> bytes | Refused:
        """For a reservation: a ticket for a part of what its hold keeps, `at` bytes from its begin."""
        self._check_process()
        with self.lock, self._change:
            self._drain_now_and_then()
            return self._issue(part, hold, at)

    def _clear(self, slot: int) -> None:
        self._directory[slot] = 0

    def _drain(self, limit: int | None = None) -> None:
        if self._closed:
            return
        self._undrained = 0
        for member, message in self._control.received(limit):
            self._handle(member, message)
        failpoints.reached("drain.received")
        while self._withdrawn:
            self._tickets.withdraw(*self._withdrawn.popleft())
        while self._dropped:
            self._tickets.dropped(self._dropped.popleft())
        if self._ahead and not self._starved and self._place(self._ahead)[1]:
            self._control.has_work()

    def _handle(self, member: Member, message: bytes) -> None:
        kind = message[0]
        try:
            items = protocol.read_pairs(message)
        except protocol.ProtocolError:
            items = []
        known = bool(items)
        if kind == protocol.RELEASE:
            for slot, serial in items:
                known = self._tickets.release(member, slot, serial) and known
        elif kind == protocol.NOT_SEEN:
            for slot, serial in items:
                known = self._tickets.not_seen(member, slot, serial) and known
        else:
            known = kind == protocol.MAPPED  # a join that was interrupted, and resumed
        if not known:
            # The reader may hold tensors, so whatever it writes, it is not cut off: that would end the lane.
            self._malformed += 1
            if self._malformed == 1:
                self._log(
                    logging.WARNING,
                    "lane %s ignores a malformed message of %s: %r",
                    self.name,
                    member,
                    message[:32],
                )

    # --- memory, without the lock --------------------------------------------------------------------------

    def _commit(self, backing: memory.Backing, mapping: Mapping, ranges: Sequence[tuple[int, int]]) -> None:
        """Have memory behind ranges of whole segments. Raises OSError when there is none to be had."""
        allocator = self._allocator
        if not ranges:
            return
        with self._committing:
            grant = backing.grant(sum(size for _, size in ranges))  # for all of it, or none is committed
        for start, size in ranges:
            for at in range(start, start + size, allocator.segment):
                # One segment at a time, and one thread: a put that needs one waits for one at most, and a
                # reservation that fails takes back pages of its range that another thread may rely on.
                with self._committing:
                    grant.nbytes -= allocator.segment
                    if allocator.is_committed(at):
                        continue
                    backing.reserve(self._base + at, allocator.segment)
                    failpoints.reached("commit.reserved")
                    with self.lock, self._change:
                        allocator.note_committed(at, allocator.segment)
                        self._control.watch()
            mapping.populate(self._base + start, size)
            failpoints.reached("commit.populated")

    def _decommit(self, segments: Sequence[int]) -> None:
        """Return the memory of idle segments to the system. Readers have nothing there, and need not be asked."""
        allocator, backing = self._allocator, self._backing
        for at in segments:
            with self._committing:
                with self.lock, self._change:
                    if self._closed or backing is None:
                        return
                    if not allocator.is_free(at, allocator.segment):  # any more
                        continue
                    allocator.note_decommitted(at, allocator.segment)  # a put that wants it waits for us
                try:
                    backing.decommit(self._base + at, allocator.segment)
                except OSError as error:
                    self._never_decommits = True
                    self._degraded.append(
                        f"hole punching: {error}; memory that was committed is kept until the lane ends"
                    )
                    self._log(logging.WARNING, "lane %s goes without %s", self.name, self._degraded[-1])
                    with self.lock, self._change:
                        allocator.note_committed(at, allocator.segment)
                    return
            failpoints.reached("decommit.punched")

    # --- called by the control thread, without the lock ----------------------------------------------------

    def joined(self, member: Member) -> None:
        """A reader has mapped the memory, and is a member from now on."""
        with self.lock, self._change:
            self._joined.add(member)
            if len(self._joined) < len(self.members) or self._has_opened:
                return
            self._has_opened = True
            if self._allocator.pinned:
                self._uninformed.update(self._joined)
                self._control.has_work()
        self._wake_waiting()

    def left(self, member: Member) -> None:
        """A member's connection has ended. Once the lane has opened, that ends it."""
        with self.lock, self._change:
            self._joined.discard(member)
        if self._has_opened and not self._closed:
            self._end(f"{member} has ended")
            logger.info("lane %s is closed: %s has ended", self.name, member)

    def work(self) -> bool:
        """What other threads have left to this one; True: there is more."""
        while self._lines:
            level, line, args = self._lines.popleft()
            logger.log(level, line, *args)
        backing, mapping = self._backing, self._mapping
        if self._closed or backing is None or mapping is None:
            return False
        try:
            with self.lock, self._change:
                if self._closed:
                    return False
                ranges = self._place(self._ahead)[1] if self._ahead and not self._starved else []
            self._commit(backing, mapping, ranges)
        except OSError as error:
            logger.debug("lane %s: no memory ahead of need: %s", self.name, str(error))
            self._starved = True
        return self._has_opened and self._pin(backing, mapping)

    def _pin(self, backing: memory.Backing, mapping: Mapping) -> bool:
        """Commit a part of what readers may pin, and tell them once all of it is there; True: there is more."""
        wanted = self._allocator.pinned
        if self._pinned < wanted:
            step = min(_STEP * self._allocator.segment, wanted - self._pinned)
            try:
                with self.lock, self._change:
                    ranges = self._allocator.uncommitted(self._pinned, step)
                self._commit(backing, mapping, ranges)
            except OSError as error:
                logger.warning(
                    "lane %s: no memory for %d bytes to pin (%s), so readers copy from pageable memory; make"
                    " `pinned` smaller, or 0 to silence this",
                    *(self.name, wanted, str(error)),
                )
                self._allocator.pinned = self._pinned = 0  # no reader was told: it is decommitted when it is idle
                self._uninformed.clear()
                return False
            self._pinned += step
        if self._pinned < wanted:
            return True
        if wanted:
            pinned = [(self._base, wanted)]
            self._uninformed = {
                member for member in self._uninformed if not self._control.send(protocol.PINNED, pinned, member)
            }
        return False

    def look(self) -> None:
        """Once a period: decommit memory that nobody has used, and ask after tickets that may be lost."""
        with self.lock, self._change:
            self._drain()
            if self._closed:
                return
            self._starved = False
            self._ahead = 0
            recalled = {self._recalled.popleft() for _ in range(len(self._recalled))}
            live = list(self._tickets.live.values())
            idle = [] if self._never_decommits else self._allocator.idle()
            lost = self._tickets.lost
        failpoints.reached("decommit.chosen")
        self._decommit(idle)
        self._ask_after(live, recalled)
        if lost > self._lost:
            logger.warning(
                "lane %s: %d tickets that a reader never saw were reclaimed: they were lost, recalled, or come"
                " after more than %g s (`orphan`)",
                *(self.name, lost - self._lost, self._orphan),
            )
            self._lost = lost
        with self.lock:
            kept = 0 if self._never_decommits else self._allocator.committed_bytes - self._pinned
            if not self._tickets.live and not kept and not self._uninformed:
                self._control.rest()
        if self._uninformed:
            self._control.has_work()

    def _ask_after(self, live: Sequence[Live], recalled: Collection[tuple[int, int]]) -> None:
        """Ask the members that owe tickets which were recalled, or have been out for long, who has seen them."""
        now = time.monotonic()
        asked: dict[Member, list[tuple[int, int]]] = {}
        for ticket in live:
            if ticket.issued < now - self._orphan or (ticket.slot, ticket.serial) in recalled:
                ticket.issued = now  # asked again later, should somebody hold it
                for member in ticket.debtors():
                    asked.setdefault(member, []).append((ticket.slot, ticket.serial))
        for member, tickets in asked.items():
            if not self._control.send(protocol.RECALL, tickets, member):
                self._recalled.extend(tickets)  # it is behind: at the next look
            failpoints.reached("recall.sent")

    def ended(self, problem: str) -> None:
        """The control thread is about to end."""
        self._closed = self._closed or problem
        with self.lock:
            # Whoever still copies has these, too; the memory goes with the last of them.
            self._backing = self._mapping = None
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        with suppress(IndexError):  # not `while self._waiting`: another thread may take the last one away
            while True:
                self._waiting.popleft().release()

    # --- fork ----------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """In a forked child: let go of what was inherited, so that readers can notice the parent's end."""
        self._closed = "forked"
        self._control.abandon()
        if self._backing is not None:
            self._backing.close()
        self._mapping = None  # it goes with the last tensor that was reserved


_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()


def _after_fork() -> None:
    for lane in list(_lanes):
        lane._forget()
    _lanes.clear()


os.register_at_fork(after_in_child=_after_fork)
