"""File descriptors that belong to an object; among them those that come with a message."""

from __future__ import annotations

import os
import socket
import struct
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

_INT = struct.Struct("@i")


class Descriptor:
    """A file descriptor, closed when the object dies: code that may still use the number holds the object.

    What is open at the end of the interpreter, the kernel closes.
    """

    # What each is to close: numbers, and received messages of which the numbers have not been read.
    _owned: ClassVar[dict[weakref.ref[Descriptor], list[list[Any]]]] = {}
    _dead: ClassVar[deque[weakref.ref[Descriptor]]] = deque()  # not all of them are closed: it was interrupted

    def __init__(self, fd: int) -> None:
        self._own().append(fd)
        self.fd = fd

    def _own(self) -> list[int]:
        """The list of numbers to close."""
        close_dead()
        numbers: list[int] = []
        self._holds: list[list[Any]] = [numbers, []]
        self._note = weakref.ref(self, self._dead.append)
        self._owned[self._note] = self._holds
        return numbers

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending() and hasattr(self, "_note"):
            self._close()

    def _close(self) -> None:
        _close(self._holds)
        self._owned.pop(self._note, None)


class Received(Descriptor):
    """A message, and the descriptor that came with it: `fd` is -1 for none. Raises OSError."""

    def __init__(self, connection: socket.socket, limit: int) -> None:
        self._own()
        messages = self._holds[1]
        # Not socket.recv_fds, which ignores the flags: programs that this process starts would get the memory. In
        # C as a whole, so that no signal handler can come between a descriptor's arrival and its note.
        room = socket.CMSG_LEN(_INT.size)
        messages.extend(map(connection.recvmsg, (limit,), (room,), (socket.MSG_CMSG_CLOEXEC,)))
        self.message: bytes = messages[0][0]
        self.fd = next(iter(_received(messages)), -1)


def _received(messages: Iterable[Any]) -> list[int]:
    rights = [
        data
        for _, ancillary, _, _ in messages
        for *kind, data in ancillary
        if kind == [socket.SOL_SOCKET, socket.SCM_RIGHTS]
    ]
    return [fd for data in rights for (fd,) in _INT.iter_unpack(data)]


def _close(holds: list[list[Any]]) -> None:
    """Each number once, also if a signal handler raises in here and this is called again."""
    if messages := holds[1]:
        holds[:] = _received(messages), []  # at once: either the one or the other has them
    numbers = holds[0]
    while numbers:
        next(map(os.close, iter(numbers.pop, None)))  # in C as a whole, as above


def close_dead() -> None:
    """Close what has died without it, since a signal handler raised in its finalizer."""
    while Descriptor._dead:
        try:
            note = Descriptor._dead.popleft()
        except IndexError:  # another thread has it
            return
        _close(Descriptor._owned.pop(note, [[], []]))
