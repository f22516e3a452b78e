"""The reading side of a lane: join it, take tensors out of it without a copy, release them when they die."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
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
from typing import Literal, get_args

import torch

from mmlane.lane import arguments, failpoints, protocol
from mmlane.lane.descriptor import Descriptor
from mmlane.lane.device import Device
from mmlane.lane.errors import JoinRefused, LaneError, LaneUnavailable, UnknownLane, needed
from mmlane.lane.fork import close_in_child
from mmlane.lane.invitation import Invitation
from mmlane.lane.link import Claim, Link
from mmlane.lane.mapping import PAGE, Mapping, round_up, tensor_at, unmap_dead
from mmlane.lane.peer import connect, has_ended, last_words, peer_of, uid_is_proof
from mmlane.lane.protocol import ProtocolError
from mmlane.lane.ticket import Content, read

logger = logging.getLogger("mmlane.lane")

Mode = Literal["view", "cow", "clone"]
_MODES = get_args(Mode)
_AFTER_ERROR = 1.0  # seconds before a socket that fails is tried again
_HEARING = select.EPOLLIN | select.EPOLLRDHUP
_INT = struct.Struct("@i")

_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


class _Received(Descriptor):
    """A message, and the descriptor that came with it: -1 for none. Raises OSError."""

    def __init__(self, connection: socket.socket) -> None:
        self._found: list[tuple[bytes, list[tuple[int, int, bytes]], int, object]] = []
        # Not socket.recv_fds, which ignores the flags: programs that this process starts would get the memory. In
        # C as a whole, so that no signal handler can come between a descriptor's arrival and its note.
        room = socket.CMSG_LEN(_INT.size)
        self._found.extend(map(connection.recvmsg, (protocol.LIMIT,), (room,), (socket.MSG_CMSG_CLOEXEC,)))
        self.message = self._found[0][0]
        super().__init__(next(iter(self._descriptors()), -1))

    def _descriptors(self) -> list[int]:
        rights = [
            data
            for _, ancillary, _, _ in self._found
            for *kind, data in ancillary
            if kind == [socket.SOL_SOCKET, socket.SCM_RIGHTS]
        ]
        return [fd for data in rights for (fd,) in _INT.iter_unpack(data)]

    def __del__(
        self, ending: Callable[[], bool] = sys.is_finalizing, close: Callable[[int], None] = os.close
    ) -> None:
        if not ending() and hasattr(self, "_found"):
            for fd in self._descriptors():
                close(fd)


class Reader:
    """One process's reading end, for any number of lanes. Thread-safe. Not usable in a forked child.

    Args:
        group: which of the lanes' groups this process belongs to.
        number: its place there, from 0 on; like the rank of a tensor-parallel process.
        device: the CUDA device that tensors are copied to from here, as torch names it ("cuda:0"). Then what a
            lane keeps for that (`Lane(pinned=...)`) is registered as pinned memory in the background, and a
            ticket is released when its tensor is let go *and* the device has done what it was told before that, on
            streams that were made current through torch.cuda.
        linger: seconds for which tickets of a lane can still be taken after its producer has ended; longer than
            any rank of an engine stands still: one that comes later would refuse what its peers took.

    Raises ValueError for a number below 0 and for a device that is not CUDA's or not there, TypeError for an
    argument of another type, LaneUnavailable where no reader can be had.
    """

    def __init__(
        self, group: str, number: int = 0, *, device: torch.device | str | None = None, linger: float = 300.0
    ) -> None:
        if not isinstance(group, str):
            raise arguments.wrong("group", group, 'the name of a group, then the number: Reader("tp", 0)')
        number = arguments.whole("number", number, least=0, example='0 in Reader("tp", 0)')
        linger = arguments.seconds("linger", linger)
        where = None if device is None else torch.device(device)
        if where is not None and (where.type != "cuda" or where.index is None):
            raise ValueError(f"device {device!r}: one like cuda:0, or None for a reader that stays on the CPU")
        self.group = group
        self.number = number
        self._linger = linger
        self._pid = os.getpid()
        self._closed = self._failed = False
        self._links: dict[str, Link] = {}  # by the lane's name
        self._heard: dict[int, Link] = {}  # by file descriptor: those that the thread listens to
        self._discarded: deque[bytes] = deque()  # tickets, for the thread to discard
        self._clones: deque[str] = deque(maxlen=10)  # lines of tensors that were cloned, for the thread to log
        self._joining = threading.Lock()
        try:
            with needed("epoll"):
                self._events = select.epoll()
            with needed("eventfd"):
                self._wakeup = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._events.register(self._wakeup.fd, select.EPOLLIN)
            self._device = None if where is None else Device(where.index)
            thread = threading.Thread(target=self._run, name=f"mmlane-reader-{group}-{number}", daemon=True)
            try:
                thread.start()
            except BaseException:  # no thread can be had; or a signal handler raised, and it may run
                self._closed = True
                self._wake()
                if self._device is not None:
                    self._device.stop()
                raise
        except (OSError, RuntimeError) as error:
            raise LaneUnavailable(
                f"no reader can be had ({error}): raise `ulimit -n` or `ulimit -u`, or allow in the sandbox"
                " what is named here"
            ) from error
        _readers.add(self)

    def join(self, invitation: Invitation, timeout: float = 10.0) -> None:
        """Join a lane, and map its memory; at once when it is joined already.

        Waits up to `timeout` seconds for the lane's producer. From the return of this on the producer counts on
        this reader, until it ends or is closed. Raises JoinRefused with the reason, TypeError for what is no
        Invitation.
        """
        self._join(invitation, timeout, threading.Event())

    async def join_async(self, invitation: Invitation, timeout: float = 10.0) -> None:
        """As `join`, for a task: the event loop goes on meanwhile, a thread waits.

        Cancelled, it gives up: the lane is not joined, unless that had just been done.
        """
        loop = asyncio.get_running_loop()
        joined: asyncio.Future[None] = loop.create_future()
        given_up = threading.Event()

        def tell(error: BaseException | None) -> None:
            if joined.done():
                return  # it was cancelled
            if error is None:
                joined.set_result(None)
            else:
                joined.set_exception(error)

        def work() -> None:
            problem: BaseException | None = None
            try:
                self._join(invitation, timeout, given_up)
            except Exception as error:  # noqa: BLE001 - whatever it is, the task is to raise it
                problem = error
            with suppress(RuntimeError):  # the loop is closed, and the task is gone
                loop.call_soon_threadsafe(tell, problem)

        try:
            # Not one of the loop's own, which the process would wait for at its end.
            threading.Thread(target=work, name=f"mmlane-joining-{self.group}-{self.number}", daemon=True).start()
        except RuntimeError as error:
            raise JoinRefused(f"no thread to join a lane ({error}): raise `ulimit -u`") from error
        try:
            await joined
        finally:
            given_up.set()

    def _join(self, invitation: Invitation, timeout: float, given_up: threading.Event) -> None:
        if not isinstance(invitation, Invitation):
            wanted = "an Invitation: lane.invitation, or Invitation.parse(data) of its bytes"
            raise arguments.wrong("invitation", invitation, wanted, quoted=False)
        with self._joining:
            self._check_process()
            name = invitation.name
            if self._failed:
                raise JoinRefused(f"lane {name} could not be joined: this reader's thread has failed")
            try:
                link = self._links.get(name)
                if link is None or link.gone_at is not None:
                    link = self._connect(invitation, timeout)
                    if given_up.is_set():
                        link.leave()
                        raise ProtocolError("it was given up")
                    self._links[name] = link  # tickets may come as soon as the producer hears of the mapping
                failpoints.reached("join.stored")
                self._hear(link)
                link.enter()
                failpoints.reached("join.acknowledged")
                self._check_open()
            except (OSError, ValueError, ProtocolError) as error:
                self._check_open()
                reason = str(error)
                if isinstance(error, TimeoutError):
                    reason = f"no answer within {timeout:g} s"
                elif isinstance(error, ConnectionError):
                    reason = "it hung up: too many wait there, or it has just ended"
                raise JoinRefused(f"lane {name} could not be joined: {reason}") from error

    def take(self, ticket: bytes, mode: Mode | None = None) -> torch.Tensor:
        """The tensor of a ticket, contiguous, on the CPU. A ticket can be taken once by each reader.

        mode: `view` is the producer's own bytes, without a copy: it must not be written to, or the process ends
        with SIGSEGV. `cow` can be written to: a page that is written is copied first. `clone` is a copy. By
        default `view` for a reader with a device, which only reads to copy them there, else `cow`.

        The ticket is released when the last alias of the tensor's storage dies (slices, numpy arrays and dlpack
        exports count), for a clone at once; with a device, when it has also done its work on what was let go. It
        is also released if this call is interrupted.

        Raises MalformedTicket, StaleTicket, UnknownLane, ValueError for an unknown mode, and LaneError in a reader
        that is closed and in a forked child.
        """
        if mode is None:
            mode = "cow" if self._device is None else "view"
        if mode not in _MODES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(_MODES)}")
        link, content = self._find(ticket)
        claim = link.claim(ticket, content)
        failpoints.reached("take.claimed")
        tensor = self._tensor(link, claim, mode)
        failpoints.reached("take.mapped")
        return tensor

    def discard(self, ticket: bytes) -> None:
        """Release a ticket untaken, soon: the reader's thread does it. No-op for one that is not out.

        Can be called wherever Python runs, finalizers included. Raises as `take` does.
        """
        self._find(ticket)
        self._discarded.append(ticket)
        self._wake()

    def held_share(self, name: str) -> float:
        """Which part of a joined lane's memory this reader holds, from 0 on. Raises UnknownLane.

        Bytes that several tickets share count for each of them.
        """
        link = self._links.get(name)
        if link is None:
            raise UnknownLane(f"lane {name} is not joined")
        return link.held_share()

    def lanes(self) -> tuple[str, ...]:
        """Names of the lanes that are joined and alive."""
        return tuple(name for name, link in list(self._links.items()) if link.gone_at is None)

    def wait_pinned(self, name: str, timeout: float | None = None) -> bool:
        """Wait until a joined lane's memory is registered with CUDA; False if that failed, or after `timeout` s.

        Nothing else waits for it: until then, tensors are copied from pageable memory. Raises UnknownLane.
        """
        link = self._links.get(name)
        if link is None:
            raise UnknownLane(f"lane {name} is not joined")
        return link.pinning.wait(timeout) and link.pinned is not None

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Leave all lanes, which ends them if they were open. Tensors that are held stay valid.

        Does nothing in a forked child, and nothing while Python itself ends (see `Lane.close`).
        """
        if _ending() or os.getpid() != self._pid:
            return
        self._closed = True
        self._leave()  # at once: the next reader may have this one's number, also in this process
        self._wake()
        if self._failed:
            self._end()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()  # which waits for nothing

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise LaneError(
                f"this reader belongs to process {self._pid}: a forked child has to make one of its own"
            )
        if self._closed:
            raise LaneError("this reader is closed")

    def _check_open(self) -> None:
        """Raises LaneError if another thread has closed this; what that may not have seen is left here."""
        if self._closed:
            self._leave()
            raise LaneError("this reader is closed")

    def _leave(self) -> None:
        for link in list(self._links.values()):
            link.leave()

    # --- joining -------------------------------------------------------------------------------------------

    def _connect(self, invitation: Invitation, timeout: float) -> Link:
        """Everything up to the mapping of the memory. If interrupted, the connection goes with this frame."""
        with ExitStack() as scope:
            with needed("a Unix socket"):
                connection = close_in_child(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            scope.enter_context(connection)
            connect(connection, invitation.name, timeout)
            connection.settimeout(timeout)
            if uid_is_proof() and (uid := peer_of(connection).uid) != os.geteuid():
                raise ProtocolError(f"it belongs to user {uid}, this is user {os.geteuid()}")
            failpoints.reached("join.connected")
            nonce = secrets.token_hex(16)
            with suppress(BrokenPipeError):  # it has rejected this reader already, and said why
                connection.send(
                    protocol.hello(invitation.secret, self.group, self.number, nonce), socket.MSG_NOSIGNAL
                )
            failpoints.reached("join.greeted")
            link = self._map(invitation, connection, nonce)
            connection.setblocking(False)
            scope.pop_all()
            return link

    def _map(self, invitation: Invitation, connection: socket.socket, nonce: str) -> Link:
        received = last_words(lambda: _Received(connection))
        message = received.message
        failpoints.reached("join.received")
        if not message:
            raise ConnectionResetError
        kind = protocol.kind(message)
        if kind == protocol.REJECT:
            raise ProtocolError(f"it refused: {protocol.read_reject(message)}")
        if kind != protocol.WELCOME:
            raise ProtocolError(f"message {kind} instead of a WELCOME")
        found = protocol.read_welcome(message, invitation.secret, nonce)
        try:
            descriptor: Descriptor = received
            if descriptor.fd < 0:
                descriptor = Descriptor(os.open(found.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
                logger.warning(
                    "lane %s goes without SCM_RIGHTS: its memory was opened as %s", invitation.name, found.path
                )
            link = Link(
                invitation.name, connection, descriptor, found.nbytes, found.slots, self._wake, self._device
            )
        except (OSError, ValueError) as error:
            reason = f"{found.nbytes} bytes could not be mapped ({error})"
            with suppress(OSError):  # gone already
                connection.send(protocol.reject(reason), socket.MSG_NOSIGNAL)
            raise ProtocolError(
                f"{reason}: make its capacity smaller, or raise `ulimit -v` or `ulimit -n`"
            ) from error
        failpoints.reached("join.mapped")
        return link

    def _hear(self, link: Link) -> None:
        """Have the thread listen to a lane, from now on or already. Raises OSError."""
        self._heard[link.connection.fileno()] = link
        with suppress(FileExistsError):  # a join that was interrupted did this
            self._events.register(link.connection, _HEARING)

    # --- taking --------------------------------------------------------------------------------------------

    def _find(self, ticket: bytes) -> tuple[Link, Content]:
        content = read(ticket)
        self._check_process()
        link = self._links.get(content.lane)
        if link is None:
            raise UnknownLane(f"lane {content.lane} is not joined, or ended more than {self._linger:g} s ago")
        return link, content

    def _tensor(self, link: Link, claim: Claim, mode: Mode) -> torch.Tensor:
        where, nbytes = link.base + claim.content.offset, claim.content.nbytes
        pinned = link.pinned
        if mode == "view" and pinned is not None and pinned.holds(where, nbytes):
            claim.mapping, where = pinned, where - pinned.offset
        if mode == "cow" and nbytes:
            begin = where - where % PAGE
            try:
                claim.mapping = Mapping(
                    link.descriptor.fd, round_up(where + nbytes - begin), offset=begin, private=True
                )
                where -= begin
            except OSError as error:  # too many mappings, or strict overcommit: a copy does as well
                if error.errno is None:  # a TimeoutError of a signal handler
                    raise
                self._clones.append(f"no private mapping of {nbytes} bytes ({error}): cloned")
                mode = "clone"
        owner = claim.mapping.owner(where, keeps=claim)
        tensor = tensor_at(owner, claim.content.dtype, claim.content.shape)
        if mode == "clone":
            return tensor.clone()
        if self._device is not None:
            assert claim.watch is not None
            claim.watch.is_lent = True
            self._device.owe(claim.watch)
        return tensor

    # --- the thread ----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        os.eventfd_write(self._wakeup.fd, 1)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            # The sockets stay open: their end would end the lanes. Tickets can be taken all the same; what stays
            # out is room in full sockets, discards, and answers to producers' questions.
            logger.exception("a reader's thread has failed: no more lanes can be joined")
            self._failed = True

    def _serve(self) -> None:
        while not self._closed:
            for number, events in self._events.poll(self._patience()):
                if number == self._wakeup.fd:
                    os.eventfd_read(number)
                elif number in self._heard:
                    self._attend(self._heard[number], events)
            self._tidy()  # while no name here keeps a link, and its mapping, alive
            unmap_dead()
        self._end()

    def _end(self) -> None:
        while self._links:
            _, link = self._links.popitem()
            link.leave()
            link.unpin()  # no ticket can be taken any more
        self._heard.clear()
        self._events.close()
        if self._device is not None:
            self._device.stop()

    def _patience(self) -> float | None:
        due = [
            link.retry_at if link.gone_at is None else link.gone_at + self._linger
            for link in list(self._links.values())
        ]
        soonest = min((at for at in due if at is not None), default=None)
        return None if soonest is None else max(soonest - time.monotonic(), 0.0)

    def _attend(self, link: Link, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                link.flush()
                if not link.wants_room:
                    self._events.modify(link.connection, _HEARING)
            if events & ~select.EPOLLOUT:
                self._listen(link)
        except OSError as error:
            logger.warning("lane %s: its socket fails, trying again in a second: %s", link.name, str(error))
            self._events.modify(link.connection, 0)
            link.retry_at = time.monotonic() + _AFTER_ERROR

    def _listen(self, link: Link) -> None:
        try:
            while (message := link.connection.recv(protocol.LIMIT)) or not has_ended(link.connection):
                try:
                    self._handle(link, message)
                except ProtocolError as error:
                    # Not a reason to hang up: that would end the lane. Only its text: a record that a handler
                    # keeps would keep the traceback, and with it the link and its memory.
                    logger.warning(
                        "lane %s: ignoring a malformed message of its producer: %s", link.name, str(error)
                    )
        except BlockingIOError:
            return
        except ConnectionResetError:  # its producer has ended, and had not read all that was sent to it
            logger.debug("lane %s has ended, with releases on their way", link.name)
        self._events.unregister(link.connection)
        del self._heard[link.connection.fileno()]
        link.gone_at = time.monotonic()

    def _handle(self, link: Link, message: bytes) -> None:
        kind = protocol.kind(message)
        if kind == protocol.REJECT:
            raise ProtocolError(f"it sends this reader away: {protocol.read_reject(message)}")
        items = protocol.read_pairs(message)
        for first, second in items:
            if kind == protocol.RECALL:
                failpoints.reached("recall.heard")
                link.promise(first, second)
            elif kind == protocol.PINNED and first % PAGE == 0 and 0 < second <= link.mapping.nbytes - first:
                link.pin(first, second)
            else:
                raise ProtocolError(f"message {kind} {first} {second} was not expected")

    def _tidy(self) -> None:
        """Forget lanes that ended a while ago, have releases sent that were not, discard what was left to this."""
        now = time.monotonic()
        for name, link in list(self._links.items()):
            if link.gone_at is not None:
                if link.gone_at + self._linger <= now:
                    link.unpin()
                    if self._links.get(name) is link:  # not one that was joined anew
                        del self._links[name]
                continue
            if link.retry_at is not None:
                if link.retry_at > now:
                    continue
                link.retry_at = None
                self._events.modify(link.connection, _HEARING)
            if link.wants_room:
                self._events.modify(link.connection, _HEARING | select.EPOLLOUT)
                link.is_promised_room = True
        while self._discarded:
            self._discard(self._discarded.popleft())
        while self._clones:
            logger.debug("%s", self._clones.popleft())

    def _discard(self, ticket: bytes) -> None:
        try:
            link, content = self._find(ticket)
            link.claim(ticket, content)  # and nobody keeps the claim
        except LaneError as error:
            logger.debug("a ticket was not discarded: %s", str(error))

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
