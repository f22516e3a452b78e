"""The reading side: join lanes, take tensors, and give them back by letting them go."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Literal, get_args

import torch

from mmlane.lane import memory, points, wire
from mmlane.lane.control import has_ended, peer_uid
from mmlane.lane.cuda import Device, Pinned
from mmlane.lane.errors import JoinRefused, LaneError, LaneUnavailable, StaleHere, StaleTicket, UnknownLane, needed
from mmlane.lane.fork import close_in_child
from mmlane.lane.ticket import Content, digest, read

logger = logging.getLogger("mmlane.lane")

Mode = Literal["view", "cow", "clone"]
_MODES = get_args(Mode)

_PATIENCE = 10.0  # seconds for a message that must be there already
_HEARING = select.EPOLLIN | select.EPOLLRDHUP
_INT = struct.Struct("i")
_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


class _Loan(weakref.ref[object]):
    """Watches the owner of a tensor's storage, and holds what it points into (`weakref.finalize` is slower)."""

    __slots__ = ("content", "link", "mapping")
    link: _Link
    mapping: memory.Mapping
    content: Content

    def end(self) -> None:
        """Nothing looks at the bytes any more: neither a tensor, nor a device."""
        if self.mapping.private:
            self.mapping.unmap()
        self.link.give_back(self.content.slot, self.content.serial)


_loans: dict[int, _Loan] = {}  # by id; held here, since a reader may forget a lane of which tensors are alive


def _let_go(
    loan: weakref.ref[object],
    ending: Callable[[], bool] = sys.is_finalizing,
    loans: dict[int, _Loan] = _loans,
) -> None:
    """The last alias of a tensor is gone. At the end of the interpreter, that of the connection tells it all."""
    if ending():
        return
    loan = loans.pop(id(loan))
    if loan.link.device is None:
        loan.end()
    else:
        loan.link.device.settle(loan.end)


class _Link:
    """One lane that a reader has joined: its connection, its memory, and what this reader holds of it.

    wants_room: called when the connection is full. idle: called when the last tensor is let go while leaving.
    device: what the tensors are copied to; None for a reader that stays on the CPU.
    """

    def __init__(
        self,
        connection: socket.socket,
        descriptor: memory.Descriptor,
        nbytes: int,
        slots: int,
        wants_room: Callable[[_Link], None],
        idle: Callable[[], None],
        device: Device | None,
    ) -> None:
        if (size := os.fstat(descriptor.fd).st_size) != nbytes or slots * 8 > nbytes:
            # Touching what is not there would end the process.
            raise OSError(errno.EINVAL, f"this is another file, of {size} bytes, for a directory of {slots} slots")
        self.connection = connection
        self.descriptor = descriptor
        self.mapping = memory.Mapping(descriptor.fd, nbytes)
        self.device = device
        self.pinned: Pinned | None = None  # a part of the same, registered with CUDA
        self.pinning = threading.Event()  # which has been tried, with whatever result
        self._asked_to_pin = False
        self.base = slots * 8  # the directory's size: where extents begin
        self.gone_at: float | None = None  # when the producer ended
        self.leaving = False
        self.admitted = threading.Event()
        self.floor: int | None = None  # serial up to which tickets are not for this reader; known once admitted
        self._directory = self.mapping.words(slots)
        self._wants_room = wants_room
        self._idle = idle
        self._seen: dict[int, int] = {}  # slot -> serial of the last ticket that was taken or forgone here
        self._forgone: dict[int, int] = {}  # slot -> serial of the last of these that was forgone
        self._held: dict[int, int] = {}  # slot -> serial of tickets not yet given back
        self._claiming = threading.RLock()  # a finalizer that discards may run wherever Python likes
        self._outbox: deque[tuple[int, int, int]] = deque()
        self._sending = threading.Lock()

    @property
    def is_idle(self) -> bool:
        """Whether this process holds nothing of the lane, and nobody is about to."""
        with self._claiming:
            return not self._held

    def claim(self, ticket: bytes, content: Content) -> None:
        """Make a ticket this reader's own, once. Raises StaleTicket; StaleHere only if it is out."""
        wanted = digest(ticket)
        slot, end = content.slot, self.base + content.offset + content.nbytes
        # A ticket can be here before the thread that joins has read that this reader is in.
        if (self.floor is None and not self.admitted.wait(_PATIENCE)) or content.serial <= (self.floor or 0):
            stale = StaleHere if self._is_out(slot, end, wanted) else StaleTicket
            raise stale(f"ticket {content.serial} of lane {content.address} is older than this reader's joining")
        with self._claiming:
            forgone = self._forgone.get(slot) == content.serial
            if not self._is_out(slot, end, wanted) or (self._seen.get(slot) == content.serial and not forgone):
                raise StaleTicket(
                    f"ticket {content.serial} of lane {content.address} is not out: it was taken or given back"
                    " before, withdrawn, revoked, or changed on its way"
                )
            if self.leaving or forgone:
                raise StaleHere(
                    f"ticket {content.serial} of lane {content.address} is out, but not for this reader, which is"
                    " leaving, or has answered that it had not seen this ticket"
                )
            self._seen[slot] = self._held[slot] = content.serial

    def _is_out(self, slot: int, end: int, wanted: int) -> bool:
        return slot < len(self._directory) and end <= self.mapping.nbytes and self._directory[slot] == wanted

    def lend(self, owner: object, mapping: memory.Mapping, content: Content) -> None:
        """Give a ticket back when `owner` dies, and keep the mapping that it points into until then."""
        loan = _Loan(owner, _let_go)
        loan.link, loan.mapping, loan.content = self, mapping, content
        if self.device is not None:
            self.device.owe()
        _loans[id(loan)] = loan

    def forgo(self, slot: int, serial: int) -> None:
        """Answer that a ticket was never seen here, and see to it that it never will be; no answer if it was."""
        with self._claiming:
            if self._seen.get(slot, 0) >= serial:
                return  # it is held, or was given back, or was withdrawn and the slot used again
            self._seen[slot] = self._forgone[slot] = serial
        self.say(wire.FORGONE, slot, serial)

    def give_back(self, slot: int, serial: int) -> None:
        """A ticket is done with. Runs wherever Python lets the tensor go, so it waits for no lock."""
        self._held.pop(slot, None)
        self.say(wire.DONE, slot, serial)
        if self.leaving and not self._held:
            self._idle()

    def say(self, kind: int, first: int, second: int) -> None:
        """Send a pair, in order, now or as soon as there is room."""
        self._outbox.append((kind, first, second))
        points.reached("give_back.queued")
        self.flush()

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
                str(result),  # without its traceback: a handler that keeps records would keep the mapping
            )
        elif not self.leaving:
            self.pinned = result
        self.pinning.set()

    def unpin(self) -> None:
        """Let go of what is registered, as soon as the device has read what it was told to."""
        if self.device is not None and self.pinned is not None:
            held = [self.pinned]
            self.pinned = None
            self.device.owe()
            self.device.settle(held.clear)  # in the device's thread, which disturbs nobody

    def flush(self, *, wait: bool = False) -> None:
        """Send what there is. Whoever is sending already, even further up on this very stack, sends for all.

        wait: wait for who is sending, who may just have found that there is no room.
        """
        while self._outbox and self._sending.acquire(blocking=wait):
            try:
                if not self._send_some():
                    return
            finally:
                self._sending.release()

    def _send_some(self) -> bool:
        """Send what one message holds; False when there is no room for it."""
        if not self._outbox:
            return True  # somebody else was faster
        batch = [self._outbox.popleft()]
        kind = batch[0][0]
        while self._outbox and self._outbox[0][0] == kind and len(batch) < wire.PAIRS:
            batch.append(self._outbox.popleft())
        try:
            self.connection.send(wire.pairs(kind, [item[1:] for item in batch]), wire.QUIETLY)
        except BlockingIOError:
            self._outbox.extendleft(reversed(batch))
            self._wants_room(self)
            return False
        except OSError:  # the producer is gone, and its books with it
            return True
        except BaseException:  # an interrupt: better said twice than never
            self._outbox.extendleft(reversed(batch))
            raise
        points.reached("give_back.sent")
        return True


class Reader:
    """One process's reading end, for any number of lanes. Thread-safe. Not usable in a forked child.

    Args:
        group: which of the lanes' groups this process belongs to.
        device: the CUDA device that tensors are copied to from here, as torch names it ("cuda:0"). Then what a
            lane keeps for that (`Lane(pinned=...)`) is registered as pinned memory in the background, and a
            ticket goes back when its tensor is let go *and* the device has done what it was told before that, on
            streams that were made current through torch.cuda.
        linger: seconds for which tickets of a lane can still be taken after its producer has ended.

    Raises ValueError for a device that is not CUDA's or not there, LaneUnavailable where no reader can be had.
    """

    def __init__(self, group: str, *, device: torch.device | str | None = None, linger: float = 30.0) -> None:
        where = None if device is None else torch.device(device)
        if where is not None and (where.type != "cuda" or where.index is None):
            raise ValueError(f"device {device!r}: one like cuda:0, or None for a reader that stays on the CPU")
        self.group = group
        self._linger = linger
        self._pid = os.getpid()
        self._closed = self._failed = False
        self._links: dict[str, _Link] = {}
        self._by_number: dict[int, _Link] = {}
        self._joining = threading.Lock()
        try:
            with needed("epoll"):
                self._events = select.epoll()
            with needed("eventfd"):
                self._bell = memory.Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._events.register(self._bell.fd, select.EPOLLIN)
            self._device = None if where is None else Device(where.index)
            thread = threading.Thread(target=self._run, name=f"mmlane-reader-{group}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if self._device is not None:
                    self._device.stop()
                raise
        except (OSError, RuntimeError) as error:
            raise LaneUnavailable(
                f"no reader can be had ({error}): raise `ulimit -n` or `ulimit -u`, or allow in the sandbox"
                " what is named here"
            ) from error
        _readers.add(self)

    def join(self, address: str, timeout: float = 10.0) -> None:
        """Join a lane by its address, and map its memory; at once when it is joined already.

        Waits up to `timeout` seconds. Raises JoinRefused with the reason.
        """
        with self._joining:
            self._check_process()
            link = self._links.get(address)
            if link is not None and link.gone_at is None:
                return
            if self._failed:
                raise JoinRefused(f"lane {address} could not be joined: this reader's thread has failed")
            with ExitStack() as scope:
                try:
                    with needed("a Unix socket"):
                        connection = close_in_child(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                    scope.enter_context(connection)
                    self._enter(address, connection, timeout)
                except (OSError, ValueError, wire.ProtocolError) as error:
                    reason = str(error)
                    if isinstance(error, TimeoutError):
                        reason = f"no answer within {timeout:g} s"
                    elif isinstance(error, ConnectionError):
                        reason = "it hung up: its user is another, too many wait there, or it has just ended"
                    raise JoinRefused(f"lane {address} could not be joined: {reason}") from error
                scope.pop_all()

    def take(self, ticket: bytes, mode: Mode | None = None) -> torch.Tensor:
        """The tensor of a ticket, contiguous, on the CPU. A ticket can be taken once by each reader.

        mode: `view` is the producer's own bytes, without a copy: it must not be written to, or the process ends
        with SIGSEGV. `cow` can be written to: a page that is written is copied first. `clone` is a copy. By
        default `view` for a reader with a device, which only reads to copy them there, else `cow`.

        The ticket is given back when the last alias of the tensor's storage dies (slices, numpy arrays and dlpack
        exports count), for a clone at once; with a device, when it has also done its work on what was let go.

        Raises MalformedTicket, StaleTicket, UnknownLane, and ValueError for an unknown mode.
        """
        if mode is None:
            mode = "cow" if self._device is None else "view"
        if mode not in _MODES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(_MODES)}")
        link, content = self._claim(ticket)
        try:
            points.reached("take.claimed")
            tensor = self._tensor(link, content, mode)
        except BaseException:
            link.give_back(content.slot, content.serial)
            raise
        points.reached("take.mapped")
        return tensor

    def discard(self, ticket: bytes) -> None:
        """Give a ticket back untaken. Raises as `take` does."""
        link, content = self._claim(ticket)
        link.give_back(content.slot, content.serial)

    def lanes(self) -> tuple[str, ...]:
        """Addresses of the lanes that are joined and alive."""
        return tuple(address for address, link in list(self._links.items()) if link.gone_at is None)

    def wait_pinned(self, address: str, timeout: float | None = None) -> bool:
        """Wait until a joined lane's memory is registered with CUDA; False if that failed, or after `timeout` s.

        Nothing else waits for it: until then, tensors are copied from pageable memory. Raises UnknownLane.
        """
        link = self._links.get(address)
        if link is None:
            raise UnknownLane(f"lane {address} is not joined")
        return link.pinning.wait(timeout) and link.pinned is not None

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Leave all lanes. Tensors that are held stay valid; a lane is left when its last tensor is let go.

        Does nothing in a forked child, and nothing while Python itself ends (see `Lane.close`).
        """
        if _ending() or os.getpid() != self._pid:
            return
        with self._joining:
            self._closed = True
            for link in list(self._links.values()):
                link.leaving = True
        self._ring()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LaneError(
                f"this reader belongs to process {self._pid}: a forked child has to make one of its own"
            )
        if self._closed:
            raise LaneError("this reader is closed")

    # --- joining -------------------------------------------------------------------------------------------

    def _enter(self, address: str, connection: socket.socket, timeout: float) -> None:
        # Python's own time-out would not wait where there is a queue.
        patience = struct.pack("@ll", int(timeout), max(int(timeout % 1 * 1e6), 1))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        try:
            connection.connect(f"\0{address}")
        except BlockingIOError as error:
            raise TimeoutError from error
        except ConnectionRefusedError as error:
            raise JoinRefused(
                f"nobody listens at lane {address}: its producer has ended, or is in another network namespace"
            ) from error
        connection.settimeout(timeout)
        if peer_uid(connection) != os.geteuid():
            raise JoinRefused(
                f"lane {address} belongs to user {peer_uid(connection)}, this is user {os.geteuid()}"
            )
        points.reached("hello.connected")
        connection.send(wire.hello(self.group), socket.MSG_NOSIGNAL)
        points.reached("hello.sent")
        # Not socket.recv_fds, which ignores the flags: programs that this process starts would get the memory.
        room = socket.CMSG_LEN(_INT.size)
        message, ancillary, _, _ = connection.recvmsg(wire.LIMIT, room, socket.MSG_CMSG_CLOEXEC)
        rights = [data for *kind, data in ancillary if kind == [socket.SOL_SOCKET, socket.SCM_RIGHTS]]
        received = [memory.Descriptor(fd) for data in rights for (fd,) in _INT.iter_unpack(data)]
        points.reached("map.received")
        if not message:
            raise ConnectionResetError
        kind = wire.kind(message)
        if kind == wire.SORRY:
            raise JoinRefused(f"lane {address} refused: {wire.read_sorry(message)}")
        if kind != wire.WELCOME:
            raise wire.ProtocolError(f"message {kind} instead of a welcome")
        version, nbytes, slots, path = wire.read_welcome(message)
        if version != wire.VERSION:
            raise wire.ProtocolError(
                f"protocol {version}, this reader speaks {wire.VERSION}: run one version of mmlane"
            )
        try:
            if received:
                descriptor = received[0]
            else:
                descriptor = memory.Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
                logger.warning("lane %s goes without SCM_RIGHTS: its memory was opened as %s", address, path)
            link = _Link(connection, descriptor, nbytes, slots, self._wants_room, self._ring, self._device)
        except (OSError, ValueError) as error:
            with suppress(OSError):  # gone already
                connection.send(wire.sorry(f"{nbytes} bytes could not be mapped: {error}"), socket.MSG_NOSIGNAL)
            raise JoinRefused(
                f"lane {address}: {nbytes} bytes could not be mapped ({error}): make its capacity smaller, or"
                " raise `ulimit -v` or `ulimit -n`"
            ) from error
        points.reached("map.mapped")
        self._links[address] = link  # tickets may come as soon as the producer hears of the mapping
        try:
            connection.send(bytes((wire.MAPPED,)), socket.MSG_NOSIGNAL)
            points.reached("map.acknowledged")
            floor = self._admission(connection.recv(wire.LIMIT))
            connection.setblocking(False)
            self._by_number[connection.fileno()] = link
            self._events.register(connection, _HEARING)
        except BaseException:
            self._by_number.pop(connection.fileno(), None)
            del self._links[address]
            raise
        link.floor = floor
        link.admitted.set()

    @staticmethod
    def _admission(message: bytes) -> int:
        if message and wire.kind(message) == wire.SORRY:
            raise wire.ProtocolError(wire.read_sorry(message))
        if not message or wire.kind(message) != wire.JOINED or not (items := wire.read_pairs(message)):
            raise wire.ProtocolError("it hung up instead of letting this reader in")
        return items[0][0]

    # --- taking --------------------------------------------------------------------------------------------

    def _claim(self, ticket: bytes) -> tuple[_Link, Content]:
        content = read(ticket)
        self._check_process()
        link = self._links.get(content.address)
        if link is None:
            raise UnknownLane(f"lane {content.address} is not joined, or ended more than {self._linger:g} s ago")
        link.claim(ticket, content)
        return link, content

    def _tensor(self, link: _Link, content: Content, mode: Mode) -> torch.Tensor:
        where, nbytes = link.base + content.offset, content.nbytes
        mapping = link.mapping
        pinned = link.pinned
        if mode == "view" and pinned is not None and pinned.holds(where, nbytes):
            mapping, where = pinned, where - pinned.offset
        if mode == "cow" and nbytes:
            try:
                private = memory.Mapping(link.descriptor.fd, memory.round_up(nbytes), offset=where, private=True)
                mapping, where = private, 0
            except OSError as error:  # too many mappings, or strict overcommit: a copy does as well
                logger.debug("no private mapping of %d bytes (%s): cloned", nbytes, error)
                mode = "clone"
        owner = mapping.owner(where)
        tensor = memory.tensor_at(owner, content.dtype, content.shape)
        if mode == "clone" or not nbytes:
            tensor = tensor.clone()
            link.give_back(content.slot, content.serial)
        else:
            link.lend(owner, mapping, content)
        return tensor

    # --- the thread ----------------------------------------------------------------------------------------

    def _ring(self) -> None:
        os.eventfd_write(self._bell.fd, 1)

    def _wants_room(self, link: _Link) -> None:
        try:
            self._events.modify(link.connection, _HEARING | select.EPOLLOUT)
        except (OSError, ValueError) as error:  # the connection has just ended
            logger.debug("a lane has ended: %s", error)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            # The sockets stay open: their end would tell producers that what is held here is free. Tickets can be
            # taken all the same; what stays out is room in full sockets, and answers to producers' questions.
            logger.exception("a reader's thread has failed: no more lanes can be joined")
            self._failed = True

    def _serve(self) -> None:
        while not (self._closed and not self._by_number):
            for number, events in self._events.poll(self._patience()):
                if number == self._bell.fd:
                    os.eventfd_read(number)
                elif number in self._by_number:
                    self._attend(self._by_number[number], events)
            self._tidy()  # while no name here keeps a link, and its mapping, alive
        for link in self._links.values():  # no ticket can be taken any more, so no memory is kept for one
            link.unpin()
        self._links.clear()
        self._events.close()
        if self._device is not None:
            self._device.stop()

    def _attend(self, link: _Link, events: int) -> None:
        if events & select.EPOLLOUT:
            self._events.modify(link.connection, _HEARING)
            link.flush(wait=True)
        self._listen(link)

    def _patience(self) -> float | None:
        gone = [link.gone_at for link in list(self._links.values()) if link.gone_at is not None]
        return max(min(gone) + self._linger - time.monotonic(), 0.0) if gone else None

    def _listen(self, link: _Link) -> None:
        try:
            while (message := link.connection.recv(wire.LIMIT)) or not has_ended(link.connection):
                try:
                    self._heed(link, message)
                except wire.ProtocolError as error:
                    # Not a reason to hang up: that would tell the producer that what is held here is free.
                    logger.warning("a lane's producer said what made no sense, which is ignored: %s", str(error))
        except BlockingIOError:
            return
        except ConnectionResetError:  # its producer has ended, and had not read all that was sent to it
            logger.debug("a lane has ended, with give-backs on their way")
        except OSError as error:
            logger.warning("a lane's socket could not be read, which will be tried again: %s", error)
            return
        self._part(link)
        link.gone_at = time.monotonic()

    def _heed(self, link: _Link, message: bytes) -> None:
        kind, items = wire.kind(message), wire.read_pairs(message)
        for first, second in items:
            if kind == wire.WARM and first + second <= link.mapping.nbytes:
                link.mapping.populate(first, second)
                points.reached("grow.heard")
            elif kind == wire.KEPT and first % memory.PAGE == 0 and 0 < second <= link.mapping.nbytes - first:
                link.pin(first, second)
            elif kind == wire.COLD:
                points.reached("hand_back.heard")
                link.say(wire.COOLED, first, second)
            elif kind == wire.REVOKE:
                points.reached("revoke.heard")
                link.forgo(first, second)
            else:
                raise wire.ProtocolError(f"message {kind} {first} {second} was not expected")

    def _part(self, link: _Link) -> None:
        number = link.connection.fileno()
        self._events.unregister(link.connection)
        del self._by_number[number]
        with link._sending:  # nobody is about to use the number
            link.connection.close()

    def _tidy(self) -> None:
        """Leave the lanes that nothing is held of any more, and forget those that ended a while ago."""
        now = time.monotonic()
        for link in list(self._by_number.values()):
            if link.leaving and link.is_idle:
                self._part(link)
                link.gone_at = now - self._linger
        for address, link in list(self._links.items()):
            if link.gone_at is not None and link.gone_at + self._linger <= now:
                link.unpin()
                del self._links[address]

    # --- fork ----------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """In a forked child: close what was inherited, so that producers can notice the parent's death."""
        self._closed = True
        for link in self._links.values():
            link.connection.close()
        self._links.clear()
        self._events.close()


def _after_fork() -> None:
    for reader in list(_readers):
        reader._forget()
    _readers.clear()


os.register_at_fork(after_in_child=_after_fork)
