"""Who is at the other end of a Unix connection, as the kernel knows it, and how to notice its end."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from mmlane import host
from mmlane.lane.protocol import ProtocolError

T = TypeVar("T")

_CREDENTIALS = struct.Struct("iII")


class Peer(NamedTuple):
    """The process at the other end. pid: 0 when it is out of sight, in a PID namespace that ours does not hold."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """The process at the other end, in the numbers of this process's namespaces."""
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return Peer(pid, uid)


@cache
def uid_is_proof() -> bool:
    """Whether a peer with our user id is of our user: not if that id stands for all users without one here."""
    return os.geteuid() != host.overflow_uid()


def shares_pid_namespace(pid: int) -> bool:
    """Whether a process is in our own PID namespace: one in a namespace within it, a container say, is not."""
    try:
        return Path(f"/proc/{pid}/ns/pid").samefile("/proc/self/ns/pid")
    except OSError:  # it has ended, or hides it
        return False


def connect(connection: socket.socket, name: str, timeout: float) -> None:
    """Connect a socket to a lane, and wait up to `timeout` seconds where there is a queue.

    Raises ProtocolError where no process listens, TimeoutError, and OSError.
    """
    due = time.monotonic() + timeout
    while True:
        left = max(due - time.monotonic(), 1e-6)
        # Python's own time-out would not wait where there is a queue.
        patience = struct.pack("@ll", int(left), max(int(left % 1 * 1e6), 1))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        try:
            connection.connect(f"\0{name}")
            connection.getpeername()
        except BlockingIOError as error:
            raise TimeoutError(f"no place in its queue within {timeout:g} s") from error
        except ConnectionRefusedError as error:
            raise ProtocolError(
                "no process listens there: its producer has ended, or is in another network namespace"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # else a signal came, after which Python takes it for connected
                raise
        else:
            return


def has_ended(connection: socket.socket) -> bool:
    """Whether the other end is closed; an empty message alone does not say so."""
    end = select.poll()
    end.register(connection, select.POLLRDHUP)
    return bool(end.poll(0))


def last_words(receive: Callable[[], T]) -> T:
    """What `receive` returns, also where the other end has closed without reading all that was sent to it.

    The kernel then reports a reset first, and what the other end has said, why it rejects us say, only after that.
    """
    try:
        return receive()
    except ConnectionResetError:
        return receive()
