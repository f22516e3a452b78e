"""Bare connections and listeners, for those who say anything to a lane or to a reader."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmlane.lane import Invitation, Lane, protocol, ticket
from mmlane.lane.peer import last_words
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread

HUGE = (1 << 64) - 1
_KINDS = ("HELLO", "WELCOME", "REJECT", "MAPPED", "RELEASE", "NOT_SEEN", "RECALL", "PINNED", "STATUS", "OFF", "ON")
KINDS: dict[str, int] = {name: getattr(protocol, name) for name in _KINDS}
MAPPED = bytes((protocol.MAPPED,))


def visit(name: str) -> socket.socket:
    """A bare connection to a lane."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0{name}")
    connection.settimeout(DEADLINE)
    return connection


def listen(name: str) -> socket.socket:
    """A bare listener where a lane would be."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.settimeout(DEADLINE)
    listener.bind(f"\0{name}")
    listener.listen(4)
    return listener


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it; an end is an empty message.

    A reset only says that what was sent was not read; what was said in answer comes after it.
    """
    message, fds, _, _ = last_words(lambda: socket.recv_fds(connection, 1 << 16, 16))
    return message, fds


def hello(invitation: Invitation, group: str = "tp", number: int = 0, nonce: str = "once") -> bytes:
    """The HELLO of a reader that was invited."""
    return protocol.hello(invitation.secret, group, number, nonce)


def welcomed(invitation: Invitation, group: str = "tp", number: int = 0) -> socket.socket:
    """A bare connection that has proven to be a reader's, and has not mapped the memory yet."""
    connection = visit(invitation.name)
    connection.send(hello(invitation, group, number))
    welcome, fds = receive(connection)
    assert protocol.kind(welcome) == protocol.WELCOME and len(fds) == 1, welcome
    os.close(fds[0])
    return connection


def admitted(lane: Lane, group: str = "tp", number: int = 0) -> socket.socket:
    """A bare connection of a reader that has joined by the rules."""
    connection = welcomed(lane.invitation, group, number)
    connection.send(MAPPED)
    eventually(lambda: number in lane.stats().joined[group], "the lane counts the reader")
    return connection


def slot_and_serial(of: bytes) -> tuple[int, int]:
    """What a message names a ticket by."""
    content = ticket.read(of)
    return content.slot, content.serial


def invitation_without_lane() -> Invitation:
    """An invitation to a lane that does not exist."""
    return Invitation.make(f"mmlane-1-{secrets.token_hex(8)}")


@contextmanager
def impostor(behave: Callable[[socket.socket, Invitation], object], visitors: int = 1) -> Iterator[Invitation]:
    """A process of this user that listens as a lane does, knows its secret, and treats each reader as it likes."""
    invitation = invitation_without_lane()

    def serve() -> None:
        for _ in range(visitors):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                behave(connection, invitation)

    with listen(invitation.name) as listener, in_a_thread(serve):
        yield invitation


def until_it_hangs_up(connection: socket.socket) -> list[bytes]:
    """All that a visitor still says."""
    heard = []
    while message := receive(connection)[0]:
        heard.append(message)
    return heard
