"""The producer's control thread: lets readers in, notices their death, and looks after memory now and then.

It sleeps unless somebody joins, dies or asks, memory is wanted ahead of need, or a look is due. Give-backs do not
wake it: they wait in the readers' sockets until the producer drains them.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from mmlane.lane import points, wire
from mmlane.lane.errors import needed
from mmlane.lane.fork import close_in_child

if TYPE_CHECKING:  # which asks with what is here
    from mmlane.lane.status import LaneStats

logger = logging.getLogger("mmlane.lane")

_PENDING = 64  # connections that have not said yet who they are
_PATIENCE = 10.0  # seconds they have for it
_AT_ONCE = 1024  # messages of one reader to read in one go: more than fit into a socket
_CREDENTIALS = struct.Struct("iII")


class Host(Protocol):
    """What the control thread needs of a lane."""

    expected: dict[str, int]

    def joined(self, reader: int, group: str, connection: socket.socket) -> None: ...
    def drain(self) -> None: ...
    def stats(self) -> LaneStats: ...
    def grow(self) -> None: ...
    def look(self) -> None: ...
    def ended(self, problem: str) -> None: ...


@dataclass
class _Guest:
    """A connection that is not a reader yet."""

    connection: socket.socket
    deadline: float
    group: str | None = None


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a Unix connection, as the kernel knows it."""
    return _peer(connection)[1]


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end, by its number here; 0 when it is in a PID namespace out of sight."""
    return _peer(connection)[0]


def _peer(connection: socket.socket) -> tuple[int, int]:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def has_ended(connection: socket.socket) -> bool:
    """Whether the other end is closed; an empty message alone does not say so."""
    end = select.poll()
    end.register(connection, select.POLLRDHUP)
    return bool(end.poll(0))


class Control:
    """Sockets and thread of one lane.

    address: what to listen at, in the abstract namespace. welcome, descriptor: what a reader gets. period:
    seconds between looks while there is something to look after. Raises OSError when the address cannot be had.
    """

    def __init__(self, host: Host, address: str, welcome: bytes, descriptor: int, period: float) -> None:
        self._host = host
        self._welcome = welcome
        self._descriptor = descriptor
        self._period = period
        self._guests: dict[int, _Guest] = {}
        self._readers: dict[
            int, socket.socket
        ] = {}  # by file descriptor, which is the reader's number while it lives
        self._next_look: float | None = None
        self._deaf_until: float | None = None
        self._grow = self._stop = False
        self.strangers = 0
        with ExitStack() as scope:  # closes what there is, should the rest not be had
            with needed("a Unix socket in the abstract namespace"):
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
                self._listener = scope.enter_context(close_in_child(listener))
                self._listener.bind(f"\0{address}")
                self._listener.listen(_PENDING)
                self._listener.setblocking(False)
            with needed("eventfd"):
                self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                scope.callback(os.close, self._bell)
            with needed("epoll"):
                self._events = scope.enter_context(select.epoll())  # what wakes the thread
                self._events.register(self._listener, select.EPOLLIN)
                self._events.register(self._bell, select.EPOLLIN)
                self._inbox = scope.enter_context(select.epoll())  # what `received` reads
            scope.pop_all()
        self._thread = threading.Thread(target=self._run, name=address, daemon=True)

    def start(self) -> None:
        """Let readers in from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Have the thread end; its sockets are closed by then."""
        self._stop = True
        self._ring()

    def join(self) -> None:
        """Wait for the thread's end, unless this is the thread."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """In a forked child: close what was inherited, lest it hide the parent's death. Unregisters nothing."""
        for connection in (self._listener, *self._readers.values()):
            connection.close()
        self.silence()
        for guest in list(self._guests.values()):
            guest.connection.close()
        self._events.close()
        self._inbox.close()

    # --- called with the lane's lock held ------------------------------------------------------------------

    def admit(self, reader: int, connection: socket.socket) -> None:
        """A guest has become a reader."""
        self._inbox.register(connection, select.EPOLLIN | select.EPOLLRDHUP)
        self._readers[reader] = connection

    def received(self) -> list[tuple[int, bytes]]:
        """(reader, message) for all that has arrived, in order; an empty message is the reader's end."""
        heard: list[tuple[int, bytes]] = []
        for number, _ in self._inbox.poll(0):
            connection = self._readers[number]
            for _ in range(_AT_ONCE):  # what it says meanwhile waits for the next time
                try:
                    message = connection.recv(wire.LIMIT, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except ConnectionResetError:  # it ended with messages unread; its own last ones are still here
                    continue
                if not message and has_ended(connection):
                    heard.append((number, b""))
                    self._part(number, connection)
                    break
                heard.append((number, message or b"\0"))  # an empty message only looks like an end
        if heard:
            points.reached("drain.received")
        return heard

    def _part(self, number: int, connection: socket.socket) -> None:
        self._inbox.unregister(connection)
        self._events.unregister(connection)
        del self._readers[number]
        connection.close()

    def send(self, kind: int, items: Iterable[tuple[int, int]], readers: Iterable[int] | None = None) -> bool:
        """Send pairs to these readers, or all; False when one of them is too far behind to hear them now."""
        items = list(items)
        reached = True
        for number in list(self._readers if readers is None else readers):
            for at in range(0, len(items), wire.PAIRS):
                try:
                    self._readers[number].send(wire.pairs(kind, items[at : at + wire.PAIRS]), wire.QUIETLY)
                except OSError:  # full; or dead, which `received` will tell
                    reached = False
        return reached

    def watch(self) -> None:
        """There is something to look after: look once a period, until `rest`."""
        if self._next_look is None:
            self._next_look = time.monotonic() + self._period
            self._ring()

    def rest(self) -> None:
        """There is nothing to look after any more."""
        self._next_look = None

    def wants_memory(self) -> None:
        """Have the thread call `grow`."""
        if not self._grow:
            self._grow = True
            self._ring()

    def silence(self) -> None:
        """Nobody is there to be woken any more. The bell's number may be somebody else's from now on."""
        bell, self._bell = self._bell, -1
        if bell != -1:
            os.close(bell)

    def _ring(self) -> None:
        if self._bell != -1:
            os.eventfd_write(self._bell, 1)

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        problem = "the lane's control thread has failed"
        try:
            while not self._stop:
                self._turn()
            problem = ""
        except Exception as error:
            problem = f"{problem}: {error!r}"
            logger.exception("lane %s is closed: its control thread has failed", self._thread.name)
        finally:
            self._host.ended(problem)
            self.abandon()

    def _turn(self) -> None:
        deadlines = [guest.deadline for guest in self._guests.values()]
        deadlines += [at for at in (self._next_look, self._deaf_until) if at is not None]
        timeout = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
        for number, _ in self._events.poll(timeout):
            if number == self._listener.fileno():
                self._accept()
            elif number == self._bell:
                os.eventfd_read(self._bell)
            elif number in self._guests:
                self._hear(number)
            else:
                self._host.drain()  # a reader has hung up; what it said before counts
        now = time.monotonic()
        for number, guest in list(self._guests.items()):
            if guest.deadline <= now:
                self._dismiss(number, f"nothing heard for {_PATIENCE:g} s")
        if self._deaf_until is not None and self._deaf_until <= now:
            self._deaf_until = None
            self._events.modify(self._listener, select.EPOLLIN)
        if self._grow:
            self._grow = False
            self._host.grow()
        if self._next_look is not None and self._next_look <= now:
            self._next_look = now + self._period
            self._host.look()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors: the visitor stays in the queue
            logger.warning(
                "a lane could not let a reader in (%s): trying again in a second; raise `ulimit -n`", error
            )
            self._deaf_until = time.monotonic() + 1.0
            self._events.modify(self._listener, 0)
            return
        close_in_child(connection)
        points.reached("accept.connected")
        connection.setblocking(False)
        if peer_uid(connection) != os.geteuid() or len(self._guests) >= _PENDING:
            self.strangers += 1
            connection.close()
            return
        self._guests[connection.fileno()] = _Guest(connection, time.monotonic() + _PATIENCE)
        self._events.register(connection, select.EPOLLIN | select.EPOLLRDHUP)

    def _hear(self, number: int) -> None:
        guest = self._guests[number]
        try:
            message = guest.connection.recv(wire.LIMIT)
            kind = wire.kind(message)
            if kind == wire.HELLO and guest.group is None:
                self._greet(guest, *wire.read_hello(message))
            elif kind == wire.MAPPED and guest.group is not None:
                self._admit(number, guest.group)
            elif kind == wire.STATUS and guest.group is None:
                guest.connection.send(wire.status(asdict(self._host.stats())), wire.QUIETLY)
                self._see_off(number)
            elif kind == wire.SORRY:
                self._dismiss(number, f"it could not join: {wire.read_sorry(message)}", logging.WARNING)
            else:
                raise wire.ProtocolError(f"message {kind} was not expected")
        except BlockingIOError:
            return
        except (OSError, wire.ProtocolError) as error:
            self._dismiss(number, str(error))

    def _greet(self, guest: _Guest, version: int, group: str) -> None:
        if version != wire.VERSION:
            raise wire.ProtocolError(
                f"protocol {version}, this lane speaks {wire.VERSION}: run one version of mmlane"
            )
        if group not in self._host.expected:
            raise wire.ProtocolError(
                f"unknown group {group!r}, expected {', '.join(map(repr, self._host.expected))}"
            )
        guest.group = group
        socket.send_fds(guest.connection, [self._welcome], [self._descriptor], wire.QUIETLY)
        points.reached("accept.welcomed")

    def _admit(self, number: int, group: str) -> None:
        connection = self._guests[number].connection
        self._events.modify(connection, select.EPOLLRDHUP)  # from now on only its end wakes the thread
        self._host.joined(number, group, connection)
        del self._guests[number]
        points.reached("accept.joined")

    def _dismiss(self, number: int, reason: str, level: int = logging.INFO) -> None:
        self.strangers += 1
        logger.log(level, "a visitor of a lane was sent away: %s", reason)
        with suppress(OSError):  # gone already
            self._guests[number].connection.send(wire.sorry(reason), wire.QUIETLY)
        self._see_off(number)

    def _see_off(self, number: int) -> None:
        connection = self._guests.pop(number).connection
        self._events.unregister(connection)
        connection.close()
