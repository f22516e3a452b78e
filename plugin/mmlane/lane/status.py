"""What a running lane tells about itself, and how to switch it off and on, for any process of the same user.

A process that asks is no reader: the lane hangs up after the answer. Needs no torch.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import geteuid
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args, get_origin, get_type_hints

from mmlane.lane import protocol
from mmlane.lane.errors import Cause, LaneError
from mmlane.lane.peer import connect, last_words, peer_of

# Num RefCount Protocol Flags Type St Inode Path: a listening (__SO_ACCEPTCON) SOCK_SEQPACKET of a lane's name
_LISTENING = re.compile(r"^\S+ \S+ \S+ 00010000 0005 \S+ +\d+ @(mmlane-(\d+)-[0-9a-f]+)$", re.MULTILINE)


State = Literal["waiting", "open", "off", "closed"]


class Former(NamedTuple):
    """What a figure was called before: its key in JSON, its metric, the value of that metric's label `kind`."""

    key: str = ""
    metric: str = ""
    kind: str = ""


# By the name of the figure. They stay beside the names of today until 0.2.0, and are listed in docs/engine.md.
FORMER: Final = {
    "capacity_bytes": Former(metric="mmlane_lane_bytes", kind="capacity"),
    "committed_bytes": Former(metric="mmlane_lane_bytes", kind="committed"),
    "pinned_bytes": Former(metric="mmlane_lane_bytes", kind="pinned"),
    "used_bytes": Former(metric="mmlane_lane_bytes", kind="used"),
    "extents": Former(metric="mmlane_lane_extents"),
    "tickets": Former(metric="mmlane_lane_tickets"),
    "expected_readers": Former("expected", "mmlane_lane_readers", "expected"),
    "joined_readers": Former("joined", "mmlane_lane_readers", "joined"),
    "shared_puts": Former("shared"),
}


@dataclass(frozen=True)
class LaneStats:
    """A lane at one moment. Each figure has one name, here, in JSON, in `mmlane status` and /metrics.

    name: the lane's. pid: the producer, as the asking process would call it.
    state: `waiting` for readers, `open`, `off` (switched off) or `closed` (permanently).
    capacity_bytes: address room. committed_bytes: memory committed. pinned_bytes: of this, what stays committed
    for readers to pin. used_bytes: in extents; tickets refer to them, a reservation keeps them, or they are being
    filled. expected_readers: by group. joined_readers: by group, the numbers of those that have joined.
    puts: tickets issued. shared_puts: of these, tickets for room that had one before, so that nothing was copied
    for them. copied_bytes: copied into the lane, in `copy_seconds`, added up over all threads; what was refused
    after its copy counts, too.
    fallbacks: puts refused, by cause. lost_tickets: those that at least one reader never saw, reclaimed.
    malformed_messages: from readers. rejected_peers: processes that were not let in. degraded: one line for each
    thing this kernel or sandbox lacks.
    """

    name: str
    pid: int
    state: State
    capacity_bytes: int
    committed_bytes: int
    pinned_bytes: int
    used_bytes: int
    extents: int
    tickets: int
    expected_readers: dict[str, int]
    joined_readers: dict[str, list[int]]
    puts: int
    shared_puts: int
    copied_bytes: int
    copy_seconds: float
    fallbacks: dict[Cause, int]
    lost_tickets: int
    malformed_messages: int
    rejected_peers: int
    degraded: tuple[str, ...]

    @property
    def expected(self) -> dict[str, int]:
        """`expected_readers`, by its former name."""
        return self.expected_readers

    @property
    def joined(self) -> dict[str, list[int]]:
        """`joined_readers`, by its former name."""
        return self.joined_readers

    @property
    def shared(self) -> int:
        """`shared_puts`, by its former name."""
        return self.shared_puts

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, by their names and by their former ones."""
        now = asdict(self)
        return {**now, **{former.key: now[name] for name, former in FORMER.items() if former.key}}


class StatusError(LaneError):
    """A lane's status cannot be had; the message says why: no producer there, another user, no answer in time."""


class OtherUser(StatusError):
    """The lane is another user's."""


def running() -> tuple[str, ...]:
    """Names of the lanes in this network namespace, of all users, by the PID in the name.

    Raises StatusError where /proc does not tell.
    """
    try:
        sockets = Path("/proc/net/unix").read_text(errors="replace")
    except OSError as error:
        raise StatusError(f"the lanes of this machine cannot be listed: {error}") from error
    found = {(int(pid), name) for name, pid in _LISTENING.findall(sockets)}
    return tuple(name for _, name in sorted(found))


def ask(name: str, timeout: float = 2.0) -> LaneStats:
    """A lane as it is now, everything drained. Waits up to `timeout` seconds for each step. Raises StatusError."""
    return _ask(name, protocol.STATUS, timeout)


def switch(name: str, off: bool, timeout: float = 2.0) -> LaneStats:
    """Switch a lane off, so that puts are refused, or on again. Waits and raises as `ask` does."""
    return _ask(name, protocol.OFF if off else protocol.ON, timeout)


def _ask(name: str, kind: int, timeout: float) -> LaneStats:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connect(connection, name, timeout)
            connection.settimeout(timeout)
            peer = peer_of(connection)
            if peer.uid != geteuid():
                raise OtherUser(f"it belongs to user {peer.uid}, this is user {geteuid()}")
            with suppress(BrokenPipeError):  # it has answered already
                connection.send(bytes((kind,)), socket.MSG_NOSIGNAL)
            return _stats(last_words(lambda: connection.recv(protocol.STATUS_LIMIT)), peer.pid)
    except (LaneError, protocol.ProtocolError, OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, (TimeoutError, BlockingIOError)):
            reason = f"no answer within {timeout:g} s: its producer stands still, or too many wait there"
        elif isinstance(error, ConnectionError):
            reason = "it hung up: too many wait there, or it has just ended"
        kind_of_error = OtherUser if isinstance(error, OtherUser) else StatusError
        raise kind_of_error(f"lane {name} does not tell its status: {reason}") from error


def _stats(message: bytes, pid: int) -> LaneStats:
    if not message:
        raise ConnectionResetError
    if protocol.kind(message) == protocol.REJECT:
        raise protocol.ProtocolError(f"{protocol.read_reject(message)}")
    facts = protocol.read_status(message)
    wanted = get_type_hints(LaneStats)
    if facts.keys() != wanted.keys() or not all(_is(facts[name], kind) for name, kind in wanted.items()):
        raise protocol.ProtocolError("it is of another version of mmlane: ask with that one")
    return LaneStats(**{**facts, "pid": pid, "degraded": tuple(facts["degraded"])})


def _is(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of a type that LaneStats has."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is None:
        return isinstance(value, kind)
    if origin is Literal:
        return value in args
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, args[0]) and _is(v, args[1]) for k, v in value.items())
    return isinstance(value, list) and all(_is(one, args[0]) for one in value)
