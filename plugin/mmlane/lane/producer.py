"""The producing side of a lane: the arena, the readers that have joined it, and `put`."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from math import inf
from types import TracebackType

import torch

from mmlane.lane import memory, points, wire
from mmlane.lane.control import Control
from mmlane.lane.errors import Cause, LaneError, LaneUnavailable, Refused, needed
from mmlane.lane.ledger import Extent, Ledger
from mmlane.lane.share import Held, Share
from mmlane.lane.space import Space
from mmlane.lane.status import LaneStats
from mmlane.lane.ticket import DIMENSIONS, NAMES, Content, digest, read, write

logger = logging.getLogger("mmlane.lane")

SEGMENT = 4 << 20
SLOTS = 1 << 16  # tickets that can be out at a time
_AHEAD = 8 << 20  # bytes at most to commit ahead of need
_DRAIN = 16  # puts after which give-backs are handled, needed or not
_STEP = 16  # segments to commit for good before looking again at what memory is left
_PAUSE = 0.0005  # seconds between them, for puts that want to commit, too: the lock alone would not let them in
_AT_A_TIME = 4096  # segments to hand back in one look: more would not fit into the readers' sockets

_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()


class _Books:
    """Goes with the lane's lock where the books are written. What interrupts that may leave them half written."""

    def __init__(self, spoiled: Callable[[BaseException], None]) -> None:
        self._spoiled = spoiled

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._spoiled(error)


class Lane:
    """One producer's arena. Open it, hand `address` to the readers, put tensors, send the tickets.

    Thread-safe. Not usable in a forked child. `put` never waits for anybody.

    Args:
        readers: group -> number of readers expected. A group is the readers that receive the same tickets.
        capacity: address room in bytes, rounded up to segments; by default a quarter of the memory of the machine
            or control group. Memory is committed only as it is used.
        pinned: bytes of it that are committed for good once the lane is open, rounded up to segments, at most the
            capacity: readers on CUDA register them as pinned memory. Committed memory is used first.
        segment: bytes in which memory is committed and handed back.
        idle: seconds between looks for unused memory; it goes back two to three of them after its last use.
        orphan: seconds after which the readers are asked about a ticket that none of them has been heard of.

    Raises:
        ValueError: no reader expected, or a size that is not positive.
        LaneUnavailable: this machine or sandbox cannot carry a lane.
    """

    def __init__(
        self,
        readers: Mapping[str, int],
        *,
        capacity: int | None = None,
        pinned: int = 0,
        segment: int = SEGMENT,
        idle: float = 60.0,
        orphan: float = 1800.0,
    ) -> None:
        if not readers or any(count < 1 for count in readers.values()):
            raise ValueError(f"readers={dict(readers)!r}: name at least one group, each of at least one reader")
        if segment <= 0 or (capacity is not None and capacity <= 0) or idle <= 0 or orphan <= 0:
            raise ValueError(f"{segment=}, {capacity=}, {idle=}, {orphan=}: all must be positive")
        if pinned < 0:
            raise ValueError(f"{pinned=}: it must not be negative")
        segment = memory.round_up(segment)
        capacity = memory.round_up(memory.default_capacity() if capacity is None else capacity, segment)
        pinned = min(memory.round_up(pinned, segment), capacity)
        self._pid = os.getpid()
        self._orphan = orphan
        self._closed = ""
        self._lock = threading.Lock()
        self._books = _Books(self._spoiled)
        self._opened = threading.Condition(self._lock)
        self._committing = threading.Lock()
        self._withdrawn: deque[tuple[int, int]] = deque()
        self._recalled: deque[tuple[int, int]] = deque()
        self._ended: deque[Held] = deque()  # shares that were closed
        self._refused: Counter[Cause] = Counter()
        self._puts = self._shared = self._copied = self._strays = 0
        self._copy_seconds = 0.0
        self._ahead = 0  # bytes to have ready for the next put, as large as the largest since the last look
        self._undrained = 0  # puts since the last drain
        self._promised = 0  # bytes that puts under way are about to commit
        self._starved = False  # memory could not be had; not asked for ahead of need until the next look
        self._cooling: dict[
            int, set[int]
        ] = {}  # segments about to be handed back -> readers that have yet to agree
        self._reused: set[int] = (
            set()
        )  # those of them that were used since: asked about again once all have agreed
        self._never_cools = False  # memory cannot be handed back here
        self._keeping = False  # a thread commits what readers may pin, or has
        self._kept = False  # it is committed, for good
        self._told: set[int] = set()  # the readers that know
        self._users = 1  # the control thread, and whoever copies: the last one frees the memory of a closed lane

        self.expected = dict(readers)
        self.address = f"mmlane-{self._pid}-{secrets.token_hex(8)}"
        self._base = SLOTS * 8  # the directory's size: where extents begin
        self._ledger = Ledger(Space(capacity, segment, memory.PAGE, pinned), SLOTS, self.expected, self._clear)
        self._backing = memory.Backing(self._base + capacity)
        try:
            with needed("fallocate"):
                self._backing.reserve(0, self._base)
            with needed("mmap"):
                self._mapping = memory.Mapping(self._backing.fd, self._base + capacity, writable=True)
            if not self._mapping.populate(0, self._base, write=True):
                self._backing.degraded.append(
                    "MADV_POPULATE_WRITE: not in this kernel; pages are faulted in one by one"
                )
            self._directory = self._mapping.words(SLOTS)
            welcome = wire.welcome(self._base + capacity, SLOTS, f"/proc/{self._pid}/fd/{self._backing.shared_fd}")
            self._control = Control(self, self.address, welcome, self._backing.shared_fd, idle)
        except OSError as error:
            self._backing.close()
            raise LaneUnavailable(
                f"a lane of {capacity} bytes could not be set up ({error}): ask for a smaller capacity, raise"
                " `ulimit -v` or `ulimit -n`, or allow in the sandbox what is named here"
            ) from error
        for line in self._backing.degraded:
            logger.warning("lane %s goes without %s", self.address, line)
        try:
            self._control.start()
        except RuntimeError as error:
            self._control.abandon()
            self._release()
            raise LaneUnavailable(
                f"no thread for a lane ({error}): raise `ulimit -u`, or the limit on pids"
            ) from error
        _lanes.add(self)

    # --- for the producing process -------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether all expected readers have mapped the memory, so that `put` can issue tickets."""
        self._check_process()
        with self._lock:
            return self._is_open()

    @property
    def is_closed(self) -> bool:
        """Whether the lane has ended, by `close` or by itself."""
        return bool(self._closed)

    def wait_open(self, timeout: float | None = None) -> bool:
        """Wait until the lane is open; False after `timeout` seconds, or when it is closed."""
        self._check_process()
        with self._opened:
            self._opened.wait_for(lambda: self._closed or self._is_open(), timeout)
            return self._is_open()

    def put(self, tensor: torch.Tensor, *, share: Share | None = None) -> bytes | Refused:
        """Copy a tensor into the lane and return a ticket for it, for the readers of one group to take or discard.

        tensor: any shape, strides and dtype of whole bytes, dense, on the CPU; readers get it contiguous.
        share: of this lane, made for this tensor (see `Lane.share`): only its first put copies.

        Returns a Refused where no ticket can be had; never waits for readers. Raises LaneError in a forked child,
        ValueError for a share that is not for this tensor or lane.
        """
        self._check_process()
        held = None if share is None or share.closed else self._held(share)
        problem = _unsupported(tensor)
        if problem:
            with self._lock, self._books:
                self._spend(held)
                return self._refuse("unsupported", problem)
        nbytes = tensor.numel() * tensor.itemsize
        extent: Extent | None = None
        try:
            with self._lock:
                _check_content(held, tensor)
                with self._books:
                    placed = self._place(tensor, nbytes, held)
                    if not isinstance(placed, Extent):
                        return placed
                    cold = self._ledger.space.cold(placed.offset, placed.nbytes)
                    mapping = self._mapping
                    self._users += 1
                    extent = placed
            points.reached("put.allocated")
            # Nobody else knows the extent yet, so memory is committed and filled without the lock.
            if cold:
                self._commit(mapping, cold)
            points.reached("put.reserved")
            began = time.perf_counter()
            memory.copy(tensor, nbytes, mapping.owner(self._base + placed.offset))
            took = time.perf_counter() - began
            points.reached("put.copied")
            with self._lock, self._books:
                extent = None
                self._copied += nbytes
                self._copy_seconds += took
                self._release()
                return self._publish(tensor, nbytes, placed, held)
        except BaseException as error:
            with self._lock, self._books:
                if extent is not None:
                    self._ledger.settle(extent)
                    self._release()
            if not isinstance(error, OSError) or error.errno is None:  # a TimeoutError is one, of a signal handler
                raise
            with self._lock:
                return self._refuse("full", f"no memory for {nbytes} bytes: {error}")

    def share(self, uses: int) -> Share:
        """One copy for `uses` puts of one tensor, whatever becomes of their tickets meanwhile.

        The copy is held until the uses are spent, or the share is closed or dropped. Raises ValueError unless
        `uses` is positive.
        """
        if uses < 1:
            raise ValueError(f"{uses=}: a share is for at least one put")
        return Share(Held(self, uses), self._ended.append)

    def withdraw(self, ticket: bytes) -> None:
        """Take back a ticket that was never sent and never will be; its bytes can be used again.

        For no other: a reader that holds it would see them change. Can be called wherever Python runs, finalizers
        included. Raises MalformedTicket.
        """
        content = read(ticket)
        if content.address == self.address:
            self._withdrawn.append((content.slot, content.serial))  # the next drain does it: it takes no lock here

    def recall(self, ticket: bytes) -> None:
        """Have a ticket reclaimed that was probably never sent, or got lost: once no reader says it has it.

        Within two periods (`idle`) instead of after `orphan` seconds; a reader that has it keeps it, one that sees
        it later refuses it. Can be called wherever Python runs, finalizers included. Raises MalformedTicket.
        """
        content = read(ticket)
        if content.address == self.address:
            self._recalled.append((content.slot, content.serial))

    def drain(self) -> None:
        """Handle what readers have given back so far. `put` does so when it needs room, and now and then."""
        self._check_process()
        with self._lock, self._books:
            if not self._closed:
                self._drain()

    def stats(self) -> LaneStats:
        """The lane as it is now, everything drained."""
        self._check_process()
        with self._lock, self._books:
            ledger = self._ledger
            if not self._closed:
                self._drain()
            return LaneStats(
                address=self.address,
                pid=self._pid,
                is_open=self._is_open(),
                capacity=ledger.space.capacity,
                warm=ledger.space.warm_bytes,
                pinned=self._for_good,
                taken=ledger.space.taken_bytes,
                extents=ledger.space.taken_count,
                tickets=len(ledger.live),
                expected=dict(self.expected),
                readers=dict(Counter(ledger.readers.values())),
                puts=self._puts,
                shared=self._shared,
                copied=self._copied,
                copy_seconds=self._copy_seconds,
                refused=dict(self._refused),
                orphans=ledger.orphans,
                strays=self._strays,
                strangers=self._control.strangers,
                degraded=tuple(self._backing.degraded),
            )

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """End the lane. Tensors that readers hold stay valid; tickets on their way can be taken for a while.

        Does nothing in a forked child, and nothing while Python itself ends: other threads stand still by then,
        with whatever locks they hold, and the kernel tells the readers.
        """
        if _ending() or os.getpid() != self._pid:
            return
        with self._lock:
            if not self._closed:
                self._closed = "the lane was closed"
                self._control.stop()
        self._control.join()

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lane {self.address}>"

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LaneError(
                f"{self!r} belongs to process {self._pid}: a forked child has to open a lane of its own"
            )

    def _spoiled(self, error: BaseException) -> None:
        """Readers must never be given what half-written books say is free: the lane ends here."""
        if not self._closed:
            self._closed = f"the lane was interrupted while it kept its books: {error!r}"
            logger.error("lane %s is closed: %r interrupted it while it kept its books", self, error)
            self._control.stop()

    # --- put and drain, in pieces; all with the lock held --------------------------------------------------

    def _is_open(self) -> bool:
        return not self._closed and self._ledger.is_open()

    @property
    def _for_good(self) -> int:
        """Bytes that are committed and will not be handed back."""
        return self._ledger.space.pinned if self._kept else 0

    def _refuse(self, cause: Cause, detail: str) -> Refused:
        self._refused[cause] += 1
        return Refused(cause, detail)

    def _shut(self) -> Refused:
        if self._closed:
            return self._refuse("closed", self._closed)
        have = Counter(self._ledger.readers.values())
        wanted = ", ".join(f"{have[group]} of {count} in {group!r}" for group, count in self.expected.items())
        return self._refuse("not_open", f"readers that have joined: {wanted}; the lane opens when all have")

    def _held(self, share: Share) -> Held:
        if share.held.lane is not self:
            raise ValueError(f"a share of {share.held.lane!r}, put into {self!r}")
        return share.held

    def _place(self, tensor: torch.Tensor, nbytes: int, held: Held | None) -> bytes | Extent | Refused:
        """A ticket on the copy that a share holds already, or an extent to copy to, or neither."""
        space = self._ledger.space
        self._ahead = max(self._ahead, min(nbytes, _AHEAD))
        self._undrained += 1
        if (self._undrained >= _DRAIN or len(self._ledger.live) >= SLOTS) and not self._closed:
            self._drain()
        if held is not None and held.extent is not None:
            issued = self._issue(tensor, nbytes, held.extent, shared=True) if self._is_open() else self._shut()
            self._spend(held)
            return issued
        self._spend(held)
        if not self._is_open():
            return self._shut()
        if nbytes > space.capacity:
            return self._refuse(
                "oversize", f"{nbytes} bytes, more than the lane's capacity of {space.capacity}: raise it"
            )
        offset = space.find(nbytes)
        if offset is None or space.cold(offset, nbytes):
            self._drain()  # before memory is committed, use what has come back
            offset = space.find(nbytes)
        if offset is None:
            return self._refuse(
                "full",
                f"{nbytes} bytes wanted, {space.taken_bytes} of {space.capacity} are held by"
                f" {len(self._ledger.live)} tickets: readers must let tensors go, or the capacity be raised",
            )
        return self._ledger.allocate(offset, nbytes)

    def _publish(self, tensor: torch.Tensor, nbytes: int, extent: Extent, held: Held | None) -> bytes | Refused:
        if not self._is_open():  # any more
            self._ledger.settle(extent)
            return self._shut()
        if held is not None and held.uses > 0 and held.extent is None:  # else another thread was first
            held.extent, held.content = extent, (tensor.dtype, tensor.shape)
            self._ledger.hold(extent)
        return self._issue(tensor, nbytes, extent, shared=False)

    def _spend(self, held: Held | None) -> None:
        """One use of a share less, if there is a share."""
        if held is not None:
            held.uses -= 1
            if held.uses < 1:
                self._end(held)

    def _end(self, held: Held) -> None:
        """The copy that a share holds is held no longer, and no other will be."""
        held.uses = 0
        extent, held.extent = held.extent, None
        if extent is not None:
            self._ledger.let_go(extent)

    def _issue(self, tensor: torch.Tensor, nbytes: int, extent: Extent, *, shared: bool) -> bytes | Refused:
        live = self._ledger.issue(extent, time.monotonic())
        if live is None:
            self._ledger.settle(extent)
            return self._refuse(
                "full", f"{SLOTS} tickets are out, more there cannot be: readers must let tensors go"
            )
        ticket = write(
            Content(self.address, live.slot, live.serial, extent.offset, nbytes, tensor.dtype, tuple(tensor.shape))
        )
        self._directory[live.slot] = digest(ticket)
        self._puts += 1
        self._shared += shared
        self._control.watch()
        points.reached("put.published")
        return ticket

    def _clear(self, slot: int) -> None:
        self._directory[slot] = 0

    def _drain(self) -> None:
        self._undrained = 0
        for reader, message in self._control.received():
            self._heard(reader, message)
        while self._withdrawn:
            self._ledger.withdraw(*self._withdrawn.popleft())
        while self._ended:
            self._end(self._ended.popleft())
        self._look_ahead()

    def _heard(self, reader: int, message: bytes) -> None:
        if not message:
            self._ledger.leave(reader)
            self._told.discard(reader)
            for waiting in self._cooling.values():
                waiting.discard(reader)
            return
        try:
            kind, items = wire.kind(message), wire.read_pairs(message)
        except wire.ProtocolError:
            kind, items = wire.SORRY, []
        size = self._ledger.space.segment
        for first, second in items or [(0, 0)]:
            if kind == wire.DONE:
                known = self._ledger.give_back(reader, first, second)
            elif kind == wire.FORGONE:
                known = self._forgone(reader, first, second)
            elif kind == wire.COOLED:
                at = first - self._base
                known = second == size and at in range(0, self._ledger.space.capacity, size)
                self._cooling.get(at, set()).discard(reader)
            else:
                known = False
            if not known:
                # The reader may hold tensors, so whatever it says, it is not cut off: its end frees what it has.
                self._strays += 1
                if self._strays == 1:
                    logger.warning(
                        "lane %s: a reader said what made no sense, which is ignored: %r", self, message[:32]
                    )

    def _forgone(self, reader: int, slot: int, serial: int) -> bool:
        orphans = self._ledger.orphans
        known = self._ledger.forgo(reader, slot, serial)
        if self._ledger.orphans > orphans:
            logger.warning(
                "lane %s: a ticket that a reader never saw was reclaimed after %g s; it was lost, or is late"
                " (`orphan` says how long to wait)",
                self,
                self._orphan,
            )
        return known

    # --- memory --------------------------------------------------------------------------------------------

    def _commit(self, mapping: memory.Mapping, cold: list[tuple[int, int]], *, pause: float = 0.0) -> None:
        """Have memory behind ranges of segments; without the lock. Raises OSError when there is none to be had.

        pause: seconds after each segment in which others may commit.
        """
        space = self._ledger.space
        wanted = sum(size for _, size in cold)
        with self._lock:
            self._promised += wanted
            promised = self._promised
        try:
            self._backing.check(promised)
            for start, size in cold:
                for at in range(start, start + size, space.segment):
                    # One segment at a time, and one thread: who needs one waits for one at most, and a reservation
                    # that fails takes back pages of its range that somebody else may have been promised.
                    with self._committing:
                        with self._lock:
                            if not space.cold(at, space.segment):
                                continue
                        self._backing.reserve(self._base + at, space.segment)
                        points.reached("grow.reserved")
                        with self._lock:
                            space.warmed(at, space.segment)
                            self._promised -= space.segment
                            wanted -= space.segment
                    if pause:
                        time.sleep(pause)
                mapping.populate(self._base + start, size, write=True)
                points.reached("grow.populated")
        finally:
            with self._lock:
                self._promised -= wanted
        with self._lock:
            self._control.send(wire.WARM, [(self._base + start, size) for start, size in cold])
            self._control.watch()
        points.reached("grow.announced")

    def _look_ahead(self) -> None:
        """Have memory ready for another tensor like those of late, and what readers may pin."""
        space = self._ledger.space
        if self._ahead and not self._starved:
            offset = space.find(self._ahead)
            if offset is not None and space.cold(offset, self._ahead):
                self._control.wants_memory()
        if space.pinned and self._is_open():
            self._keep()

    def _keep(self) -> None:
        """Have what readers may pin committed, in a thread of its own, and let each know once it is."""
        if self._kept:
            kept = [(self._base, self._ledger.space.pinned)]
            for reader in self._ledger.readers.keys() - self._told:
                if self._control.send(wire.KEPT, kept, [reader]):  # else when it hears again
                    self._told.add(reader)
        elif not self._keeping:
            self._keeping = True
            self._users += 1
            try:
                threading.Thread(target=self._commit_for_good, name="mmlane-keeping", daemon=True).start()
            except RuntimeError as error:
                self._users -= 1
                self._give_up_keeping(error)

    def _commit_for_good(self) -> None:
        space = self._ledger.space
        step = _STEP * space.segment
        problem: OSError | None = None
        try:
            for start in range(0, space.pinned, step):
                if self._closed:
                    return
                with self._lock:
                    cold = space.cold(start, min(step, space.pinned - start))
                if cold:
                    self._commit(self._mapping, cold, pause=_PAUSE)
        except OSError as error:
            problem = error
        finally:
            with self._lock:
                if problem is not None:
                    self._give_up_keeping(problem)
                elif not self._closed:
                    self._kept = True
                    self._keep()
                self._release()

    def _give_up_keeping(self, error: Exception) -> None:
        """Before any reader has been told: what was committed goes back when it is idle."""
        logger.warning(
            "lane %s: no memory for %d bytes to pin (%s), so readers copy from pageable memory; make `pinned`"
            " smaller, or 0 to silence this",
            *(self, self._ledger.space.pinned, error),
        )
        self._ledger.space.pinned = 0

    def _release(self) -> None:
        """One user less; the last one of a closed lane frees its memory."""
        self._users -= 1
        if self._users == 0:
            del self._directory
            self._mapping.unmap()
            self._backing.close()

    # --- called by the control thread, without the lock ----------------------------------------------------

    def joined(self, reader: int, group: str, connection: socket.socket) -> None:
        """A reader has mapped the memory."""
        with self._opened:
            self._control.admit(reader, connection)
            serial = self._ledger.join(reader, group)
            self._control.send(wire.JOINED, [(serial, 0)], [reader])  # before any ticket that it owes
            self._opened.notify_all()
            self._look_ahead()  # first what matters more: the next may be more than its socket holds
            self._control.send(
                wire.WARM,
                [  # not what is about to go without this reader being asked
                    (self._base + at, size)
                    for at, size in self._ledger.space.warm()
                    if at not in self._cooling or at in self._reused
                ],
                [reader],
            )

    def grow(self) -> None:
        """Commit memory ahead of need."""
        with self._lock:
            offset = None if self._closed else self._ledger.space.find(self._ahead)
            cold = [] if offset is None else self._ledger.space.cold(offset, self._ahead)
        if cold:
            try:
                self._commit(self._mapping, cold)
            except OSError as error:
                logger.debug("lane %s: no memory ahead of need: %s", self, error)
                self._starved = True

    def look(self) -> None:
        """Once a period: hand back memory that nobody has used, and ask after tickets that nobody has seen."""
        with self._lock:
            if self._closed:
                return
            self._drain()
            self._starved = False
            self._ahead = 0
            self._ask_after_orphans()
            cold = self._cool()
            if not self._ledger.live and (self._never_cools or self._ledger.space.warm_bytes == self._for_good):
                self._control.rest()
        self._hand_back(cold)

    def ended(self, problem: str) -> None:
        """The control thread is about to end."""
        with self._opened:
            self._closed = self._closed or problem
            self._control.silence()
            self._opened.notify_all()
            self._release()

    def _ask_after_orphans(self) -> None:
        now = time.monotonic()
        while self._recalled:
            slot, serial = self._recalled.popleft()
            recalled = self._ledger.live.get(slot)
            if recalled is not None and recalled.serial == serial:
                recalled.issued = -inf
        for ticket in self._ledger.issued_before(now - self._orphan):
            ticket.issued = now  # asked again later, should somebody hold it
            self._control.send(wire.REVOKE, [(ticket.slot, ticket.serial)], ticket.debtors())
            points.reached("revoke.announced")

    def _cool(self) -> list[int]:
        """Announce the segments that have been idle for a period, and return those that all readers agreed to."""
        if self._never_cools:
            return []
        idle = self._ledger.space.idle()
        again = [at for at in self._cooling if at not in idle and at not in self._reused]
        self._reused.update(again)
        agreed = sorted(at for at, waiting in self._cooling.items() if not waiting)
        for at in self._reused.intersection(agreed):
            del self._cooling[at]
        agreed = [at for at in agreed if at in self._cooling]
        self._reused.intersection_update(self._cooling)
        fresh = sorted(idle - set(self._cooling))[:_AT_A_TIME]
        size = self._ledger.space.segment
        self._control.send(wire.WARM, [(self._base + at, size) for at in again])
        if self._control.send(wire.COLD, [(self._base + at, size) for at in fresh]):
            self._cooling |= {at: set(self._ledger.readers) for at in fresh}
        points.reached("hand_back.announced")
        return agreed

    def _hand_back(self, segments: list[int]) -> None:
        space = self._ledger.space
        for at in segments:
            with self._committing, self._lock:
                del self._cooling[at]
                if space.is_free(at, space.segment) and not space.cold(at, space.segment):
                    try:
                        self._backing.hand_back(self._base + at, space.segment)
                    except OSError as error:
                        self._stop_cooling(error)
                        return
                    space.cooled(at, space.segment)
        points.reached("hand_back.punched")

    def _stop_cooling(self, error: OSError) -> None:
        self._never_cools = True
        self._cooling.clear()
        self._backing.degraded.append(
            f"hole punching: {error}; memory that was committed is kept until the lane ends"
        )
        logger.warning("lane %s goes without %s", self, self._backing.degraded[-1])

    # --- fork ----------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """In a forked child: let go of what was inherited, so that readers can notice the parent's end."""
        self._closed = "forked"
        self._control.abandon()
        self._backing.close()
        self._mapping.unmap()


def _check_content(held: Held | None, tensor: torch.Tensor) -> None:
    content = (tensor.dtype, tensor.shape)
    if held is not None and held.content not in (None, content):
        raise ValueError(f"a share for a tensor of {held.content}, put with one of {content}")


def _unsupported(tensor: torch.Tensor) -> str:
    """Why a tensor cannot travel by lane; empty when it can."""
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return f"{type(tensor).__name__}: only plain tensors travel by lane"
    if not tensor.is_cpu:
        return f"a tensor on {tensor.device}: only CPU tensors travel by lane"
    if tensor.layout is not torch.strided or tensor.dtype not in NAMES or tensor.is_nested:
        return f"{tensor.dtype}, {tensor.layout}: only dense tensors of ordinary dtypes travel by lane"
    if tensor.dim() > DIMENSIONS:
        return f"{tensor.dim()} dimensions: at most {DIMENSIONS} travel by lane"
    try:
        is_there = tensor.data_ptr() or not tensor.numel()
    except RuntimeError as error:  # one inside of torch.vmap, torch.func.grad, ...
        return f"a tensor that has no memory ({error}): only plain tensors travel by lane"
    return "" if is_there else "a tensor whose memory is gone, or never was: only plain tensors travel by lane"


def _after_fork() -> None:
    for lane in list(_lanes):
        lane._forget()
    _lanes.clear()


os.register_at_fork(after_in_child=_after_fork)
