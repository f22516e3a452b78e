"""Bare connections and listeners, for those who say anything to a lane or to a reader."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmlane.lane import Lane, ticket, wire
from tests.lane.harness.waiting import DEADLINE, in_a_thread

HUGE = (1 << 64) - 1
_KINDS = ("HELLO", "WELCOME", "SORRY", "MAPPED", "DONE", "FORGONE", "WARM", "COLD", "COOLED", "REVOKE", "JOINED")
KINDS: dict[str, int] = {name: getattr(wire, name) for name in _KINDS}
MAPPED = bytes((wire.MAPPED,))


def visit(address: str) -> socket.socket:
    """A bare connection to a lane."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0{address}")
    connection.settimeout(DEADLINE)
    return connection


def listen(address: str) -> socket.socket:
    """A bare listener where a lane would be."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.settimeout(DEADLINE)
    listener.bind(f"\0{address}")
    listener.listen(4)
    return listener


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it; an end, be it a reset, is an empty message."""
    try:
        message, fds, _, _ = socket.recv_fds(connection, 1 << 16, 16)
    except ConnectionResetError:
        return b"", []
    return message, fds


def admitted(lane: Lane, group: str = "tp") -> socket.socket:
    """A bare connection of somebody who has joined by the rules."""
    before = sum(lane.stats().readers.values())
    connection = visit(lane.address)
    connection.send(wire.hello(group))
    welcome, fds = receive(connection)
    assert wire.kind(welcome) == wire.WELCOME and len(fds) == 1
    os.close(fds[0])
    connection.send(MAPPED)
    joined, none = receive(connection)
    assert wire.kind(joined) == wire.JOINED and not none
    assert sum(lane.stats().readers.values()) == before + 1
    return connection


def slot_and_serial(of: bytes) -> tuple[int, int]:
    """What a message names a ticket by."""
    content = ticket.read(of)
    return content.slot, content.serial


def address_of_nobody() -> str:
    """An address that no lane has."""
    return f"mmlane-test-{secrets.token_hex(8)}"


@contextmanager
def impostor(behave: Callable[[socket.socket], object], visitors: int = 1) -> Iterator[str]:
    """Somebody of this user who listens as a lane does, and does with each visitor as he likes."""
    address = address_of_nobody()

    def serve() -> None:
        for _ in range(visitors):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                behave(connection)

    with listen(address) as listener, in_a_thread(serve):
        yield address


def until_it_hangs_up(connection: socket.socket) -> list[bytes]:
    """All that a visitor still says."""
    heard = []
    while message := receive(connection)[0]:
        heard.append(message)
    return heard
