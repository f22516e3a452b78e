"""What a process needs to join a lane: the lane's public name, and a secret that proves the right to join."""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass

from mmlane.lane.errors import MalformedInvitation
from mmlane.lane.protocol import VERSION

_MAGIC = b"mmlane invitation "
_VERSION = struct.Struct("<H")  # of the protocol
_SECRET = 32  # bytes
_NAME = 100  # bytes at most: what a socket's address holds


class _Secret(bytes):
    """Bytes that no traceback, log line or debugger shows."""

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__


@dataclass(frozen=True, slots=True)
class Invitation:
    """Names a lane and proves the right to join it. Send `bytes(invitation)` to the lane's own readers alone.

    name: public; it stands in logs, tickets, thread names and /proc/net/unix. secret: 32 bytes, which `repr`
    hides. A process that has it and runs as the same user can read the lane's tensors and fill its memory.
    """

    name: str
    secret: bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "secret", _Secret(self.secret))

    @classmethod
    def make(cls, name: str) -> Invitation:
        """An invitation with a new secret."""
        return cls(name, secrets.token_bytes(_SECRET))

    def __bytes__(self) -> bytes:
        return _MAGIC + _VERSION.pack(VERSION) + self.secret + self.name.encode()

    @classmethod
    def parse(cls, data: object) -> Invitation:
        """The invitation that `bytes` made. Raises MalformedInvitation, which quotes nothing of it."""
        head = len(_MAGIC) + _VERSION.size
        if not isinstance(data, bytes) or not data.startswith(_MAGIC) or len(data) < head:
            raise MalformedInvitation(f"not an invitation: {type(data).__name__}")
        (version,) = _VERSION.unpack_from(data, len(_MAGIC))
        if version != VERSION:
            raise MalformedInvitation(
                f"an invitation of protocol {version}, this mmlane speaks {VERSION}: run one version of mmlane"
            )
        secret, name = _Secret(data[head:][:_SECRET]), data[head + _SECRET :]
        if len(secret) < _SECRET or not name.isascii() or not 0 < len(name) <= _NAME:
            raise MalformedInvitation("an invitation that was damaged on its way")
        return cls(name.decode(), secret)
