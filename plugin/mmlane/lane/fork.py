"""Sockets that a forked child must not keep: while it has them, its parent's death goes unnoticed."""

from __future__ import annotations

import os
import socket
import weakref

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_child(connection: socket.socket) -> socket.socket:
    """Have a socket closed in every child that this process forks. Returns the socket."""
    _sockets.add(connection)
    return connection


def _close() -> None:
    for connection in list(_sockets):
        connection.close()


os.register_at_fork(after_in_child=_close)
