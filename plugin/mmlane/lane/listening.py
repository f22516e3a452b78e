"""The lanes that a reader has joined, and the thread that listens to their producers."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from contextlib import suppress

from mmlane.lane import failpoints, protocol
from mmlane.lane.descriptor import Descriptor, close_dead
from mmlane.lane.device import Device
from mmlane.lane.errors import LaneError, UnknownLane, needed
from mmlane.lane.link import Link
from mmlane.lane.mapping import PAGE, unmap_dead
from mmlane.lane.peer import has_ended
from mmlane.lane.protocol import ProtocolError
from mmlane.lane.ticket import Content, read

logger = logging.getLogger("mmlane.lane")

_AFTER_ERROR = 1.0  # seconds before a socket that fails is tried again
_HEARING = select.EPOLLIN | select.EPOLLRDHUP

_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


class Listener:
    """The links of one reader, and their thread: it hears producers, sends what waits for room, and discards.

    It sleeps unless a producer writes or ends, a socket has room again, or another thread wakes it.
    linger: seconds for which a lane is remembered after its producer has ended. Raises OSError.

    Attributes: `links`, by the lane's name, which a join adds and the thread forgets. `discarded`, tickets for the
    thread to discard, and `clones`, lines of tensors that were cloned, for it to log: any thread appends.
    `is_closed`: the reader is. `has_failed`: the thread has, and the reader can join no more lanes.
    """

    def __init__(self, linger: float) -> None:
        self.pid = os.getpid()
        self.is_closed = self.has_failed = False
        self.links: dict[str, Link] = {}
        self.discarded: deque[bytes] = deque()
        self.clones: deque[str] = deque(maxlen=10)
        self._linger = linger
        self._heard: dict[int, Link] = {}  # by file descriptor: those that the thread listens to
        self._device: Device | None = None
        with needed("epoll"):
            self._events = select.epoll()
        with needed("eventfd"):
            self._wakeup = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._events.register(self._wakeup.fd, select.EPOLLIN)

    def start(self, name: str, device: Device | None) -> None:
        """Start the thread. device: the reader's, which stops with it. Raises RuntimeError."""
        self._device = device
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
        except BaseException:  # no thread can be had; or a signal handler raised, and it may run
            self.is_closed = True
            self.wake()
            if device is not None:
                device.stop()
            raise
        _listeners.add(self)

    def close(self) -> None:
        """Leave all lanes, and have the thread end."""
        self.is_closed = True
        self.leave()  # at once: the next reader may have this one's number, also in this process
        self.wake()
        if self.has_failed:
            self._end()

    def leave(self) -> None:
        """Leave all lanes."""
        for link in list(self.links.values()):
            link.leave()

    def wake(self) -> None:
        """Have the thread take a turn."""
        os.eventfd_write(self._wakeup.fd, 1)

    def check(self) -> None:
        """Raises LaneError in a forked child, and once the reader is closed."""
        if os.getpid() != self.pid:
            raise LaneError(
                f"this reader belongs to process {self.pid}: a forked child has to make one of its own"
            )
        if self.is_closed:
            raise LaneError("this reader is closed")

    def check_open(self) -> None:
        """Raises LaneError if another thread has closed this; what that may not have seen is left here."""
        if self.is_closed:
            self.leave()
            raise LaneError("this reader is closed")

    def find(self, ticket: bytes) -> tuple[Link, Content]:
        """The lane of a ticket, and what it says. Raises MalformedTicket, UnknownLane, and as `check` does."""
        content = read(ticket)
        self.check()
        link = self.links.get(content.lane)
        if link is None:
            raise UnknownLane(f"lane {content.lane} is not joined, or ended more than {self._linger:g} s ago")
        return link, content

    def hear(self, link: Link) -> None:
        """Have the thread listen to a lane, from now on or already. Raises OSError."""
        self._heard[link.connection.fileno()] = link
        with suppress(FileExistsError):  # a join that was interrupted did this
            self._events.register(link.connection, _HEARING)

    def forget(self) -> None:
        """In a forked child: close what was inherited, so that producers can notice the parent's death."""
        self.is_closed = True
        for link in self.links.values():
            link.connection.close()
        self.links.clear()
        self._events.close()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            # The sockets stay open: their end would end the lanes. Tickets can be taken all the same; what stays
            # out is room in full sockets, discards, and answers to producers' questions.
            logger.exception("a reader's thread has failed: no more lanes can be joined")
            self.has_failed = True

    def _serve(self) -> None:
        while not self.is_closed:
            for number, events in self._events.poll(self._patience()):
                if number == self._wakeup.fd:
                    os.eventfd_read(number)
                elif number in self._heard:
                    self._attend(self._heard[number], events)
            self._tidy()  # while no name here keeps a link, and its mapping, alive
            unmap_dead()
            close_dead()
        self._end()

    def _end(self) -> None:
        while self.links:
            _, link = self.links.popitem()
            link.leave()
            link.unpin()  # no ticket can be taken any more
        self._heard.clear()
        self._events.close()
        if self._device is not None:
            self._device.stop()

    def _patience(self) -> float | None:
        due = [
            link.retry_at if link.gone_at is None else link.gone_at + self._linger
            for link in list(self.links.values())
        ]
        soonest = min((at for at in due if at is not None), default=None)
        return None if soonest is None else max(soonest - time.monotonic(), 0.0)

    def _attend(self, link: Link, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                link.outbox.flush()
                if not link.outbox.wants_room:
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
        for name, link in list(self.links.items()):
            if link.gone_at is not None:
                if link.gone_at + self._linger <= now:
                    link.unpin()
                    if self.links.get(name) is link:  # not one that was joined anew
                        del self.links[name]
                continue
            if link.retry_at is not None:
                if link.retry_at > now:
                    continue
                link.retry_at = None
                self._events.modify(link.connection, _HEARING)
            if link.outbox.wants_room:
                self._events.modify(link.connection, _HEARING | select.EPOLLOUT)
                link.outbox.is_promised_room = True
        while self.discarded:
            self._discard(self.discarded.popleft())
        while self.clones:
            logger.debug("%s", self.clones.popleft())

    def _discard(self, ticket: bytes) -> None:
        try:
            link, content = self.find(ticket)
            link.claim(ticket, content)  # and the claim is dropped
        except LaneError as error:
            logger.debug("a ticket was not discarded: %s", str(error))


def _after_fork() -> None:
    for listener in list(_listeners):
        listener.forget()
    _listeners.clear()


os.register_at_fork(after_in_child=_after_fork)
