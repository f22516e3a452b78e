"""The connections of a lane's members. What they write waits in their sockets until the producer reads it."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress

from mmlane.lane import protocol
from mmlane.lane.bookkeeping import Member
from mmlane.lane.peer import has_ended

_AT_ONCE = 1024  # messages of one member to read in one go: more than fit into a socket


class Inbox:
    """Reads from the members, and writes to them. Who is in it changes, and is read, with the lane's lock held.

    Raises OSError.
    """

    def __init__(self) -> None:
        self._events = select.epoll()
        self._members: dict[int, tuple[Member, socket.socket]] = {}  # by file descriptor

    def add(self, member: Member, connection: socket.socket) -> None:
        """A member has joined. Raises OSError."""
        self._members[connection.fileno()] = member, connection
        self._events.register(connection, select.EPOLLIN | select.EPOLLRDHUP)

    def remove(self, connection: socket.socket) -> None:
        """A connection is over; no-op for one that was not a member's."""
        if self._members.pop(connection.fileno(), None) is not None:
            with suppress(FileNotFoundError):  # its end was seen
                self._events.unregister(connection)  # a child that is being forked may have it still open

    def received(self, limit: int | None = None) -> Iterable[tuple[Member, bytes]]:
        """What members have written, in the order of each; stops after `limit` messages.

        A member's end is not told here: that wakes the control thread.
        """
        heard = 0
        for number, _ in self._events.poll(0):
            member, connection = self._members[number]
            for _ in range(_AT_ONCE):  # what it writes during this waits for the next time
                if limit is not None and heard >= limit:
                    return
                try:
                    message = connection.recv(protocol.LIMIT, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except ConnectionResetError:  # it ended with messages unread; its own last ones are still here
                    continue
                if not message and has_ended(connection):
                    self._events.unregister(connection)
                    break
                heard += 1
                yield member, message or b"\0"  # an empty message only looks like an end

    def send(self, kind: int, items: Sequence[tuple[int, int]], member: Member) -> bool:
        """Send pairs to a member; False when it is too far behind to get them now, or gone.

        Called by the control thread alone, which is also the one that adds and removes members: without the lock.
        """
        for other, connection in list(self._members.values()):
            if other != member:
                continue
            try:
                for at in range(0, len(items), protocol.PAIRS):
                    connection.send(protocol.pairs(kind, items[at : at + protocol.PAIRS]), protocol.QUIETLY)
            except OSError:
                return False
            return True
        return False

    def close(self) -> None:
        """At the end, and in a forked child. The sockets are not this one's to close."""
        self._events.close()
