"""What a running lane tells about itself, to anybody of its user: which lanes there are, and how they do.

Asking takes no part in a lane: who asks is no reader, and the lane hangs up after the answer. Needs no torch.
"""

from __future__ import annotations

import re
import socket
import struct
from dataclasses import dataclass, fields
from os import geteuid
from pathlib import Path

from mmlane.lane import wire
from mmlane.lane.control import peer_pid, peer_uid
from mmlane.lane.errors import Cause, LaneError

# Num RefCount Protocol Flags Type St Inode Path: a listening (__SO_ACCEPTCON) SOCK_SEQPACKET of a lane's name
_LISTENING = re.compile(r"^\S+ \S+ \S+ 00010000 0005 \S+ +\d+ @(mmlane-(\d+)-[0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True)
class LaneStats:
    """A lane at one moment. All sizes in bytes.

    pid: the producer, as whoever asks would call it; 0 if it is out of sight, in another PID namespace.
    capacity: address room. warm: memory committed. pinned: of this, for good, for readers to pin. taken: in
    extents: tickets refer to them, a share holds them, or they are being filled. expected, readers: by group.
    puts: tickets issued. shared: puts that needed no copy. copied: copied into the lane by all other puts, in
    `copy_seconds`, added up over all threads; puts that were refused after their copy count, too.
    refused: puts refused, by cause. orphans: tickets that no reader ever saw, reclaimed. strays: messages from
    readers that made no sense. strangers: visitors sent away. degraded: one line for each thing this kernel or
    sandbox lacks.
    """

    address: str
    pid: int
    is_open: bool
    capacity: int
    warm: int
    pinned: int
    taken: int
    extents: int
    tickets: int
    expected: dict[str, int]
    readers: dict[str, int]
    puts: int
    shared: int
    copied: int
    copy_seconds: float
    refused: dict[Cause, int]
    orphans: int
    strays: int
    strangers: int
    degraded: tuple[str, ...]


class StatusError(LaneError):
    """A lane's status cannot be had; the message says why: nobody there, another user, no answer in time."""


def running() -> tuple[str, ...]:
    """Addresses of the lanes in this network namespace, of all users, by the PID in the address.

    Raises StatusError where /proc does not tell.
    """
    try:
        sockets = Path("/proc/net/unix").read_text(errors="replace")
    except OSError as error:
        raise StatusError(f"the lanes of this machine cannot be listed: {error}") from error
    found = {(int(pid), address) for address, pid in _LISTENING.findall(sockets)}
    return tuple(address for _, address in sorted(found))


def ask(address: str, timeout: float = 2.0) -> LaneStats:
    """A lane as it is now, everything drained. Waits up to `timeout` seconds for each step. Raises StatusError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            # Python's own time-out would not wait where there is a queue.
            patience = struct.pack("@ll", int(timeout), max(int(timeout % 1 * 1e6), 1))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            connection.connect(f"\0{address}")
            connection.settimeout(timeout)
            if peer_uid(connection) != geteuid():
                raise StatusError(f"it belongs to user {peer_uid(connection)}, this is user {geteuid()}")
            connection.send(bytes((wire.STATUS,)), socket.MSG_NOSIGNAL)
            message = connection.recv(wire.STATUS_LIMIT)
            return _stats(message, peer_pid(connection))
    except (LaneError, wire.ProtocolError, OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, (TimeoutError, BlockingIOError)):
            reason = f"no answer within {timeout:g} s: its producer stands still, or too many wait there"
        elif isinstance(error, ConnectionRefusedError):
            reason = "nobody listens there: its producer has ended, or is in another network namespace"
        elif isinstance(error, ConnectionError):
            reason = "it hung up: its user is another, too many wait there, or it has just ended"
        raise StatusError(f"lane {address} does not tell its status: {reason}") from error


def _stats(message: bytes, pid: int) -> LaneStats:
    if not message:
        raise ConnectionResetError
    if wire.kind(message) == wire.SORRY:
        raise wire.ProtocolError(f"{wire.read_sorry(message)} (if it is of an older mmlane, it never tells)")
    facts = wire.read_status(message)
    if facts.keys() != {field.name for field in fields(LaneStats)}:
        raise wire.ProtocolError("it is of another version of mmlane: ask with that one")
    return LaneStats(**{**facts, "pid": pid, "degraded": tuple(facts["degraded"])})
