"""The connections of a lane's members. What they write waits in their sockets until the producer reads it."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator, Sequence

from mmlane.lane import libc, protocol
from mmlane.lane.bookkeeping import Member
from mmlane.lane.peer import has_ended

ALL = 1024  # messages of one member to read in one go: more than fit into a socket


class Inbox:
    """Reads from the members, and writes to them. Who is in it changes, and is read, with the lane's lock held."""

    def __init__(self) -> None:
        self._members: dict[int, tuple[Member, socket.socket]] = {}  # by file descriptor
        self._buffer = ctypes.create_string_buffer(protocol.LIMIT)

    def add(self, member: Member, connection: socket.socket) -> None:
        """A member has joined."""
        self._members[connection.fileno()] = member, connection

    def remove(self, connection: socket.socket) -> None:
        """A connection is over; no-op for one that was not a member's."""
        self._members.pop(connection.fileno(), None)

    def received(self, limit: int = ALL) -> Iterator[tuple[Member, bytes]]:
        """What members have written, in the order of each, and `limit` messages of each at most.

        What one writes during this may wait for the next time. A member's end is not told here: that wakes the
        control thread.
        """
        for member, connection in list(self._members.values()):
            for _ in range(limit):
                try:
                    message = libc.receive(connection, self._buffer)
                except BlockingIOError:
                    break
                except ConnectionResetError:  # it ended with messages unread; its own last ones are still here
                    continue
                if not message and has_ended(connection):
                    break
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
        self._members.clear()
