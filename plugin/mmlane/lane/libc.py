"""Calls of the C library. Python's own mmap hides a read-only mapping's address, and keeps the GIL to unmap."""

from __future__ import annotations

import ctypes
import os
import socket

from mmlane.lane.protocol import QUIETLY

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# For what takes 5 ms at most: these keep the GIL. A thread that gives it up may wait for so long to get it back,
# each time, where another one runs Python.
_brief = ctypes.PyDLL(None, use_errno=True)
for _calls in (libc, _brief):
    _calls.memmove.restype = None
    _calls.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
for _call in (_brief.recv, _brief.send):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
BRIEF = 32 << 20  # bytes that are copied within about 5 ms


def failure() -> OSError:
    """What this thread's last call failed with."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def copy(to: ctypes.Array[ctypes.c_ubyte], address: int, nbytes: int) -> None:
    """Copy bytes from an address. Keeps the GIL for what is over soon."""
    (_brief if nbytes <= BRIEF else libc).memmove(to, address, nbytes)


def send(connection: socket.socket, message: bytes) -> None:
    """Send a message, without waiting and keeping the GIL. Raises OSError.

    No other thread may close the connection during this: its number could be another file's.
    """
    if _brief.send(connection.fileno(), message, len(message), QUIETLY) < 0:
        raise failure()


def receive(connection: socket.socket, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
    """The next message, in the way of `send`. Raises OSError, BlockingIOError if there is none."""
    size = _brief.recv(connection.fileno(), buffer, len(buffer), QUIETLY)
    if size < 0:
        raise failure()
    return ctypes.string_at(buffer, size)
