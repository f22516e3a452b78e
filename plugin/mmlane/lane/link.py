"""One lane that a reader has joined: its connection, its memory, and which tickets were seen here.

Every step here can be interrupted by a signal handler that raises. What a ticket's claim owns is released when the
last reference to it goes.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial

from mmlane.lane import protocol
from mmlane.lane.descriptor import Descriptor
from mmlane.lane.device import Device
from mmlane.lane.errors import StaleHere, StaleTicket
from mmlane.lane.mapping import Mapping
from mmlane.lane.outbox import Outbox
from mmlane.lane.pinned import Pinned
from mmlane.lane.ticket import Content, digest

logger = logging.getLogger("mmlane.lane")


class _Promise:
    """Stands where a claim's watch would, for a ticket that this reader has promised not to take."""

    __slots__ = ("serial",)

    def __init__(self, serial: int) -> None:
        self.serial = serial


class Claim:
    """A ticket that this reader has taken: owned by the tensor's storage, or by a take that has not come so far.

    When the last reference goes, the ticket is released: at once, or once the device has read the memory.
    mapping: what the tensor lies in, which stays mapped as long as this.
    """

    watch: _Watch | None = None

    def __init__(self, link: Link, content: Content) -> None:
        self.link = link
        self.content = content
        self.mapping: Mapping = link.mapping
        self.watch = _Watch(self, link.dropped.append)
        self.watch.slot, self.watch.serial = content.slot, content.serial

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """At the end of the interpreter, the end of the connection tells it all."""
        if not ending() and self.watch is not None:
            self.link.let_go(self.watch, self.mapping)


class _Watch(weakref.ref[Claim]):
    """Stands for a claim where the claim itself would be kept alive, and is noted down when that is gone.

    The latter in C alone: should a signal handler raise in the claim's finalizer, the ticket is released later.
    is_lent: a device may read the memory. is_done: the ticket was released.
    """

    slot = serial = -1
    is_lent = is_done = False


class Link:
    """A lane that a reader has joined, or is about to.

    name: the lane's. nbytes, slots: of its memory, as its producer says. wake: has the reader's thread take a
    turn. device: what the tensors are copied to; None for a reader that stays on the CPU. Raises OSError where the
    memory cannot be mapped, or is not what the producer says.
    """

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        descriptor: Descriptor,
        nbytes: int,
        slots: int,
        wake: Callable[[], None],
        device: Device | None,
    ) -> None:
        if (size := os.fstat(descriptor.fd).st_size) != nbytes or not 0 <= slots * 8 <= nbytes:
            # Touching what is not there would end the process.
            raise OSError(errno.EINVAL, f"this is another file, of {size} bytes, for a directory of {slots} slots")
        self.name = name
        self.connection = connection
        self.outbox = Outbox(connection, wake)
        self.descriptor = descriptor
        self.mapping = Mapping(descriptor.fd, nbytes)
        self.device = device
        self.pinned: Pinned | None = None  # a part of the same, registered with CUDA
        self.pinning = threading.Event()  # which has been tried, with whatever result
        self.base = slots * 8  # the directory's size: where extents begin
        self.gone_at: float | None = None  # when the producer ended
        self.retry_at: float | None = None  # when to use the socket again, which has failed
        self._is_member = self._asked_to_pin = False
        self._directory = self.mapping.words(slots)
        # By slot: the last ticket that was taken here, or that this reader has promised not to take.
        self._seen: dict[int, _Watch | _Promise] = {}
        self._held: dict[int, int] = {}  # by slot: bytes of the tickets that are held
        self.dropped: deque[_Watch] = deque()  # those of claims that are gone
        self._claiming = threading.RLock()  # also for a signal handler that takes

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # Not before: another thread may be about to use the number.
        if not ending() and hasattr(self, "connection"):
            self.connection.close()

    def enter(self) -> None:
        """Become a member: from now on the lane's producer counts on this reader. Raises OSError if it is gone."""
        if not self._is_member:
            self.connection.send(bytes((protocol.MAPPED,)), protocol.QUIETLY)
            self._is_member = True

    def leave(self) -> None:
        """End the connection. What is held stays valid: the producer uses no memory again."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError as error:  # it has ended already
            logger.debug("lane %s has ended: %s", self.name, str(error))

    def claim(self, ticket: bytes, content: Content) -> Claim:
        """Make a ticket this reader's own, once. Raises StaleTicket; StaleHere if the others may have it."""
        wanted = digest(ticket)
        slot, end = content.slot, self.base + content.offset + content.nbytes
        claim = Claim(self, content)
        with self._claiming:
            self._make_up()
            is_out = slot < len(self._directory) and end <= self.mapping.nbytes and self._directory[slot] == wanted
            seen = self._seen.get(slot)
            if is_out and isinstance(seen, _Promise) and seen.serial == content.serial:
                raise StaleHere(
                    f"ticket {content.serial} of lane {content.lane} is out, but this reader has answered that"
                    " it had not seen it: it came too late"
                )
            if not is_out or (seen is not None and seen.serial == content.serial):
                raise StaleTicket(
                    f"ticket {content.serial} of lane {content.lane} is not out: it was taken or released before,"
                    " withdrawn, recalled, or changed on its way"
                )
            assert claim.watch is not None
            self._seen[slot] = claim.watch  # from here on the claim owns it
            self._held[slot] = content.nbytes
        return claim

    def held_share(self) -> float:
        """Which part of the lane is held here, from 0 on; what several tickets share counts for each."""
        return sum(list(self._held.values())) / max(self.mapping.nbytes - self.base, 1)

    def promise(self, slot: int, serial: int) -> None:
        """Answer that a ticket was never seen here, and see to it that it never will be; no answer if it was."""
        with self._claiming:
            self._make_up()
            seen = self._seen.get(slot)
            if seen is not None and seen.serial >= serial:
                return  # it is held, or was released, or was withdrawn and the slot used again
            self._seen[slot] = _Promise(serial)
        self.outbox.send(protocol.NOT_SEEN, slot, serial)

    def let_go(self, watch: _Watch, mapping: Mapping) -> None:
        """A claim is gone. Runs wherever Python lets the tensor go, so it waits for nothing."""
        if self._seen.get(watch.slot) is watch:  # not of a take that has not come so far
            self._held.pop(watch.slot, None)
            if watch.is_lent and self.device is not None:
                self.device.settle(watch, partial(self._release, watch, mapping))
            else:
                self._release(watch, mapping)
        watch.is_done = True

    def _release(self, watch: _Watch, mapping: Mapping) -> None:
        if mapping.private:
            mapping.unmap()
        self.outbox.send(protocol.RELEASE, watch.slot, watch.serial)

    def _make_up(self) -> None:
        """Release what is gone and was not released, since an interrupt broke into that."""
        while True:
            try:
                watch = self.dropped[0]
            except IndexError:  # also where a signal handler that takes has emptied it
                return
            if not watch.is_done:
                self.let_go(watch, self.mapping)
            if self.dropped and self.dropped[0] is watch:  # a signal handler that takes may have been here
                self.dropped.popleft()

    def pin(self, offset: int, nbytes: int) -> None:
        """Have a part of the memory registered with CUDA, in the background; it stays committed."""
        if self.device is not None and not self._asked_to_pin:
            self._asked_to_pin = True
            self.device.pin(self.descriptor, offset, nbytes, self._pinned)

    def _pinned(self, result: Pinned | Exception) -> None:
        if isinstance(result, Exception):
            logger.warning(
                "a lane's memory is not pinned (%s), so it is copied to the GPU from pageable memory, which is"
                " slower; give the lane a smaller `pinned`, or 0 to silence this",
                str(result),
            )
        elif self.gone_at is None:
            self.pinned = result
        self.pinning.set()

    def unpin(self) -> None:
        """Let go of what is registered, as soon as the device has read what it was told to."""
        if self.device is not None and self.pinned is not None:
            held = [self.pinned]
            self.pinned = None
            self.device.drop(held)
