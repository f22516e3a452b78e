"""What a reader tells a lane's producer of tickets: sent at once, or by the reader's thread when there is room."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from itertools import islice

from mmlane.lane import failpoints, protocol
from mmlane.lane.libc import send

_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)  # what sending says of a producer that ended


class Outbox:
    """Pairs for one producer. Each is noted before it is sent: no interrupt loses it, at worst it goes twice.

    wake: has the reader's thread take a turn, which calls `flush` when there is room.

    Attributes: `wants_room`, the socket was full; `is_promised_room`, the reader's thread knows that.
    """

    def __init__(self, connection: socket.socket, wake: Callable[[], None]) -> None:
        self.wants_room = self.is_promised_room = False
        self._connection = connection
        self._wake = wake
        self._items: dict[tuple[int, int, int], None] = {}  # what has not been sent for certain

    def send(self, kind: int, slot: int, serial: int) -> None:
        """Send a pair now, or have the reader's thread send it when there is room."""
        item = (kind, slot, serial)
        self._items[item] = None
        failpoints.reached("release.queued")
        if self.is_promised_room:
            return
        try:
            if len(self._items) > 1:  # an interrupt left it here, or another thread is about to send it
                raise BlockingIOError
            send(self._connection, protocol.pairs(kind, [(slot, serial)]))
            self._items.pop(item, None)
            failpoints.reached("release.sent")
        except OSError as error:
            if error.errno in _GONE:  # the producer, and its state with it
                self._items.clear()
                return
            self.wants_room = True  # full, or a signal handler's TimeoutError: the reader's thread sends it
            self._wake()
            if error.errno is None and not isinstance(error, BlockingIOError):
                raise

    def flush(self) -> None:
        """Send what could not be sent. Called by the reader's thread alone. Raises OSError if it cannot be."""
        self.wants_room = self.is_promised_room = False
        try:
            while batch := self._batch():
                send(self._connection, protocol.pairs(batch[0][0], [item[1:] for item in batch]))
                for item in batch:
                    self._items.pop(item, None)
        except OSError as error:
            if error.errno in _GONE:
                self._items.clear()
                return
            self.wants_room = True
            if not isinstance(error, BlockingIOError):  # it is not full
                raise

    def _batch(self) -> list[tuple[int, int, int]]:
        """What one message holds, of one kind."""
        items = list(islice(self._items.copy(), protocol.PAIRS))
        return [item for item in items if item[0] == items[0][0]]
