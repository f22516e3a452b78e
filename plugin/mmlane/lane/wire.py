"""What producer and reader say to each other over the lane's socket: messages whose bounds the kernel keeps.

reader                        producer
HELLO version, group      ->
                          <-  WELCOME version, size, slots, path   with the memory's descriptor; or SORRY why
MAPPED                    ->                                       or SORRY why
                          <-  JOINED serial                        tickets after this one are yours too
DONE (slot, serial)...    ->                                       tickets given back
                          <-  WARM (offset, nbytes)...             memory is there: fill page tables
                          <-  COLD (offset, nbytes)...             memory is about to go
COOLED (offset, nbytes)...->                                       nothing here touches it any more
                          <-  KEPT (offset, nbytes)...             memory is there to stay: it can be pinned
                          <-  REVOKE (slot, serial)...             has anybody seen these?
FORGONE (slot, serial)... ->                                       never, and never will

anybody of the same user      producer
STATUS                    ->
                          <-  STATUS facts                         and the end of the connection; or SORRY why
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from socket import MSG_DONTWAIT, MSG_NOSIGNAL
from typing import Any, Final

VERSION = 2
LIMIT = 4096  # bytes of a message
STATUS_LIMIT = 1 << 16  # but of the answer to STATUS
PAIRS = 128  # pairs in a message


# The first byte of a message. Plain numbers: an enumeration costs more than the rest of handling a give-back.
HELLO: Final = 1
WELCOME: Final = 2
SORRY: Final = 3
MAPPED: Final = 4
DONE: Final = 5
FORGONE: Final = 6
WARM: Final = 7
COLD: Final = 8
COOLED: Final = 9
REVOKE: Final = 10
JOINED: Final = 11
STATUS: Final = 12
KEPT: Final = 13


class ProtocolError(Exception):
    """A message that makes no sense."""


Pairs = list[tuple[int, int]]

_VERSION = struct.Struct("<H")
_WELCOME = struct.Struct("<HQI")
_PAIR = struct.Struct("<QQ")


def kind(message: bytes) -> int:
    """What a message is. Raises ProtocolError for an empty one."""
    if not message:
        raise ProtocolError("an empty message")
    return message[0]


def hello(group: str) -> bytes:
    """A reader of this group asks to join."""
    return bytes((HELLO,)) + _VERSION.pack(VERSION) + group.encode()


def read_hello(message: bytes) -> tuple[int, str]:
    """(version, group). Raises ProtocolError."""
    try:
        return _VERSION.unpack_from(message, 1)[0], message[1 + _VERSION.size :].decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise ProtocolError(f"damaged greeting {message[:16]!r}") from error


def welcome(nbytes: int, slots: int, path: str) -> bytes:
    """The memory: its size in bytes, its directory's slots, and where to open it should no descriptor arrive."""
    return bytes((WELCOME,)) + _WELCOME.pack(VERSION, nbytes, slots) + path.encode()


def read_welcome(message: bytes) -> tuple[int, int, int, str]:
    """(version, nbytes, slots, path). Raises ProtocolError."""
    try:
        return (*_WELCOME.unpack_from(message, 1), message[1 + _WELCOME.size :].decode())
    except (struct.error, UnicodeDecodeError) as error:
        raise ProtocolError(f"damaged welcome {message[:16]!r}") from error


def sorry(reason: str) -> bytes:
    """It cannot be, and why; the connection ends."""
    return bytes((SORRY,)) + reason.encode()[: LIMIT - 1]


def read_sorry(message: bytes) -> str:
    """The reason."""
    return message[1:].decode(errors="replace")


def status(facts: Mapping[str, object]) -> bytes:
    """How a lane does. Raises ProtocolError where that is more than a message holds."""
    message = bytes((STATUS,)) + json.dumps(facts, separators=(",", ":")).encode()
    if len(message) > STATUS_LIMIT:
        raise ProtocolError(f"a status of {len(message)} bytes, of which a message holds {STATUS_LIMIT}")
    return message


def read_status(message: bytes) -> dict[str, Any]:
    """The facts. Raises ProtocolError."""
    if kind(message) != STATUS:
        raise ProtocolError(f"message {kind(message)} instead of a status")
    try:
        facts = json.loads(message[1:])
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"damaged status {message[:16]!r}") from error
    if not isinstance(facts, dict):
        raise ProtocolError(f"damaged status {message[:16]!r}")
    return facts


QUIETLY: Final = MSG_DONTWAIT | MSG_NOSIGNAL  # how to send: neither wait nor die of a closed end


def pairs(kind: int, items: Sequence[tuple[int, int]]) -> bytes:
    """A message of up to PAIRS pairs of unsigned 64-bit numbers."""
    return struct.pack(f"<B{2 * len(items)}Q", kind, *chain.from_iterable(items))


def read_pairs(message: bytes) -> Pairs:
    """The pairs of a message. Raises ProtocolError."""
    try:
        return list(_PAIR.iter_unpack(message[1:]))
    except struct.error as error:
        raise ProtocolError(f"{len(message)} bytes are not a list of pairs") from error
