"""What producer and reader write to each other over the lane's socket: messages whose bounds the kernel keeps.

reader                                          producer
HELLO version, number, group, nonce, proof  ->
                                            <-  WELCOME size, slots, path, proof   with the memory's descriptor
MAPPED                                      ->                                     the reader is a member now
RELEASE (slot, serial)...                   ->                                     done with these tickets
                                            <-  RECALL (slot, serial)...           who has seen these?
NOT_SEEN (slot, serial)...                  ->                                     not here, and they never will be
                                            <-  PINNED (offset, size)              this memory stays committed

a process of the same user                      producer
STATUS, OFF or ON                           ->
                                            <-  STATUS facts                       and the end of the connection

Each may answer REJECT with a reason, which ends the connection as well. Both proofs are keyed digests: the secret
itself never travels here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from hashlib import blake2s
from hmac import compare_digest
from itertools import chain
from socket import MSG_DONTWAIT, MSG_NOSIGNAL
from typing import Any, Final, NamedTuple

VERSION = 3
LIMIT = 4096  # bytes of a message
STATUS_LIMIT = 1 << 16  # but of the answer to STATUS
PAIRS = 128  # pairs in a message
QUIETLY: Final = MSG_DONTWAIT | MSG_NOSIGNAL  # how to send: neither wait nor die of a closed end

# The first byte of a message. Plain numbers: an enumeration costs more than the rest of handling a release.
# HELLO with its version, REJECT and STATUS are the same in all versions, so that they can tell each other apart.
HELLO: Final = 1
WELCOME: Final = 2
REJECT: Final = 3
MAPPED: Final = 4
RELEASE: Final = 5
NOT_SEEN: Final = 6
RECALL: Final = 10
STATUS: Final = 12
PINNED: Final = 13
OFF: Final = 14
ON: Final = 15

_VERSION = struct.Struct("<H")
_PAIR = struct.Struct("<QQ")


class ProtocolError(Exception):
    """A message that is not of this protocol."""


class Hello(NamedTuple):
    """A reader asks to join, as this number of this group."""

    version: int
    group: str
    number: int
    nonce: str
    proof: str


class Welcome(NamedTuple):
    """The memory: its size in bytes, its directory's slots, and where to open it should no descriptor arrive."""

    nbytes: int
    slots: int
    path: str
    proof: str


Pairs = list[tuple[int, int]]


def kind(message: bytes) -> int:
    """What a message is. Raises ProtocolError for an empty one."""
    if not message:
        raise ProtocolError("an empty message")
    return message[0]


def hello(secret: bytes, group: str, number: int, nonce: str) -> bytes:
    """A reader that knows the secret asks to join. nonce: text that was never used before."""
    proof = _proof(secret, "hello", group, number, nonce)
    body = {"group": group, "number": number, "nonce": nonce, "proof": proof}
    return bytes((HELLO,)) + _VERSION.pack(VERSION) + json.dumps(body).encode()


def read_hello(message: bytes) -> Hello:
    """What a reader claims; nothing of it is proven yet. Raises ProtocolError."""
    try:
        version = _VERSION.unpack_from(message, 1)[0]
    except struct.error as error:
        raise ProtocolError("a HELLO that is cut off") from error
    if version != VERSION:
        raise ProtocolError(f"protocol {version}, this lane speaks {VERSION}: run one version of mmlane")
    return Hello(version, **_fields(message[1 + _VERSION.size :], group=str, number=int, nonce=str, proof=str))


def is_proven(hello: Hello, secret: bytes) -> bool:
    """Whether the sender knows the secret. Takes the same time for every wrong proof."""
    return _same(hello.proof, _proof(secret, "hello", hello.group, hello.number, hello.nonce))


def welcome(secret: bytes, nonce: str, nbytes: int, slots: int, path: str) -> bytes:
    """The answer to a proven HELLO with this nonce."""
    proof = _proof(secret, "welcome", nonce, nbytes, slots, path)
    body = {"nbytes": nbytes, "slots": slots, "path": path, "proof": proof}
    return bytes((WELCOME,)) + json.dumps(body).encode()


def read_welcome(message: bytes, secret: bytes, nonce: str) -> Welcome:
    """What a producer says. Raises ProtocolError, also if the sender does not know the secret."""
    found = Welcome(**_fields(message[1:], nbytes=int, slots=int, path=str, proof=str))
    if not _same(found.proof, _proof(secret, "welcome", nonce, found.nbytes, found.slots, found.path)):
        raise ProtocolError("its WELCOME proves no knowledge of the secret: another process has this lane's name")
    return found


def _proof(secret: bytes, *said: object) -> str:
    return blake2s(json.dumps(said).encode(), key=secret).hexdigest()


def _same(proof: str, expected: str) -> bool:
    return compare_digest(proof.encode(errors="replace"), expected.encode())


def _fields(body: bytes, **wanted: type) -> dict[str, Any]:
    """A JSON object with exactly these fields, of exactly these types."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{len(body)} bytes that are not JSON") from error
    if not isinstance(found, dict) or {key: type(value) for key, value in found.items()} != wanted:
        raise ProtocolError(f"a message without exactly {', '.join(wanted)}")
    return found


def reject(reason: str) -> bytes:
    """It cannot be, and why; the connection ends."""
    return bytes((REJECT,)) + reason.encode(errors="replace")[: LIMIT - 1]


def read_reject(message: bytes) -> str:
    """The reason."""
    return message[1:].decode(errors="replace")


def status(facts: Mapping[str, object]) -> bytes:
    """The state of a lane. Raises ProtocolError where that is more than a message holds."""
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
        raise ProtocolError(f"{len(message)} bytes that are not a status") from error
    if not isinstance(facts, dict):
        raise ProtocolError(f"{len(message)} bytes that are not a status")
    return facts


def pairs(kind: int, items: Sequence[tuple[int, int]]) -> bytes:
    """A message of up to PAIRS pairs of unsigned 64-bit numbers."""
    return struct.pack(f"<B{2 * len(items)}Q", kind, *chain.from_iterable(items))


def read_pairs(message: bytes) -> Pairs:
    """The pairs of a message. Raises ProtocolError."""
    try:
        return list(_PAIR.iter_unpack(message[1:]))
    except struct.error as error:
        raise ProtocolError(f"{len(message)} bytes are not a list of pairs") from error
