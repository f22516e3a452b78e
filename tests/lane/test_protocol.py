"""Messages on the socket: their bytes, the way there and back, and one kind of error for malformed ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlane.lane import protocol
from mmlane.lane.protocol import ProtocolError

U64 = st.integers(0, (1 << 64) - 1)
PAIRS = st.lists(st.tuples(U64, U64), max_size=protocol.PAIRS)
TEXT = st.text(max_size=40)
SECRET = bytes(range(32))
OTHER = bytes(32)
KINDS = {
    "HELLO": 1,
    "WELCOME": 2,
    "REJECT": 3,
    "MAPPED": 4,
    "RELEASE": 5,
    "NOT_SEEN": 6,
    "RECALL": 10,
    "STATUS": 12,
    "PINNED": 13,
    "OFF": 14,
    "ON": 15,
}


def test_the_numbers_of_the_protocol() -> None:
    """Readers and producers of one version may come from different installations: these are never given anew."""
    assert protocol.VERSION == 3
    assert {name: getattr(protocol, name) for name in KINDS} == KINDS
    assert (protocol.LIMIT, protocol.STATUS_LIMIT, protocol.PAIRS) == (4096, 65536, 128)


def test_messages_byte_by_byte() -> None:
    """Both proofs, too: the two ends may be different installations."""
    assert protocol.hello(SECRET, "tp", 1, "n") == (
        b'\x01\x03\x00{"group": "tp", "number": 1, "nonce": "n", "proof":'
        b' "15202274c8c5dbbe0304e10e0bc6d64b47a877623e0ecb2e20d39cf1e06fd0c5"}'
    )
    assert protocol.welcome(SECRET, "n", 1 << 33, 5, "/p") == (
        b'\x02{"nbytes": 8589934592, "slots": 5, "path": "/p", "proof":'
        b' "59981537e77302a133ba214e79ab96eaa33735a49e3047379bf615b62bde09d3"}'
    )
    assert protocol.reject("why") == b"\x03why"
    assert protocol.status({"a": [1, "b"]}) == b'\x0c{"a":[1,"b"]}'
    assert protocol.pairs(protocol.RELEASE, [(1, 2), (258, 0)]) == b"\x05" + struct.pack("<4Q", 1, 2, 258, 0)
    assert protocol.pairs(protocol.PINNED, []) == b"\x0d"


# --- joining -----------------------------------------------------------------------------------------------


@given(TEXT, st.integers(), TEXT)
def test_a_hello_there_and_back(group: str, number: int, nonce: str) -> None:
    message = protocol.hello(SECRET, group, number, nonce)
    assert protocol.kind(message) == protocol.HELLO
    hello = protocol.read_hello(message)
    assert hello[:-1] == (protocol.VERSION, group, number, nonce)
    assert protocol.is_proven(hello, SECRET)
    assert SECRET not in message and SECRET.hex().encode() not in message


@given(
    secret=st.binary(min_size=32, max_size=32),
    group=TEXT,
    number=st.integers(),
    nonce=TEXT,
    proof=TEXT | st.text("0123456789abcdef", min_size=64, max_size=64),
)
def test_a_hello_is_proven_by_its_secret_for_what_it_says_and_nothing_else(
    secret: bytes, group: str, number: int, nonce: str, proof: str
) -> None:
    hello = protocol.read_hello(protocol.hello(SECRET, "tp", 1, "n"))
    assert protocol.is_proven(hello, secret) == (secret == SECRET)
    assert protocol.is_proven(hello._replace(group=group), SECRET) == (group == "tp")
    assert protocol.is_proven(hello._replace(number=number), SECRET) == (number == 1)
    assert protocol.is_proven(hello._replace(nonce=nonce), SECRET) == (nonce == "n")
    assert protocol.is_proven(hello._replace(proof=proof), SECRET) == (proof == hello.proof)
    assert not protocol.is_proven(hello._replace(proof=hello.proof[:-1]), SECRET)
    assert not protocol.is_proven(hello._replace(proof=hello.proof.upper()), SECRET)


@given(U64, U64, TEXT, TEXT)
def test_a_welcome_there_and_back(nbytes: int, slots: int, path: str, nonce: str) -> None:
    message = protocol.welcome(SECRET, nonce, nbytes, slots, path)
    assert protocol.kind(message) == protocol.WELCOME
    assert protocol.read_welcome(message, SECRET, nonce)[:-1] == (nbytes, slots, path)
    assert SECRET not in message and SECRET.hex().encode() not in message


@pytest.mark.parametrize(
    ("secret", "nonce", "changed"),
    [
        (OTHER, "n", {}),
        (SECRET, "of another HELLO", {}),
        (SECRET, "n", {"nbytes": 4097}),
        (SECRET, "n", {"slots": 2}),
        (SECRET, "n", {"path": "/q"}),
        (SECRET, "n", {"proof": ""}),
        (SECRET, "n", {"proof": "\N{SNOWMAN}\ud800"}),
        (SECRET, "n", {"proof": protocol.read_hello(protocol.hello(SECRET, "tp", 1, "n")).proof}),
    ],
)
def test_a_welcome_without_a_valid_proof_is_an_error(
    secret: bytes, nonce: str, changed: dict[str, object]
) -> None:
    """Also the proof of the reader's own HELLO, which an impostor has heard."""
    message = protocol.welcome(SECRET, "n", 4096, 1, "/p")
    protocol.read_welcome(message, SECRET, "n")
    body = {**json.loads(message[1:]), **changed}
    with pytest.raises(ProtocolError, match="another process has this lane's name"):
        protocol.read_welcome(message[:1] + json.dumps(body).encode(), secret, nonce)


@pytest.mark.parametrize("spoken", [0, 2, 4, 65535])
def test_the_hello_of_another_version_is_refused_with_both(spoken: int) -> None:
    """Whatever follows the number."""
    with pytest.raises(ProtocolError, match=f"protocol {spoken}, this lane speaks 3: run one version of mmlane"):
        protocol.read_hello(b"\x01" + struct.pack("<H", spoken) + b"tp")


def body(**changed: object) -> bytes:
    """What follows the version in a HELLO, but for these; None: left out."""
    fields = {"group": "tp", "number": 1, "nonce": "n", "proof": "p", **changed}
    return json.dumps({key: value for key, value in fields.items() if value is not None}).encode()


@pytest.mark.parametrize(
    "wrong",
    [
        body(group=None),
        body(group=1),
        body(number="1"),
        body(number=True),
        body(number=1.0),
        body(nonce=["n"]),
        body(proof={}),
        body(more=1),
        b"[1]",
        b"null",
    ],
)
def test_a_hello_has_exactly_its_fields(wrong: bytes) -> None:
    with pytest.raises(ProtocolError, match="a message without exactly group, number, nonce, proof"):
        protocol.read_hello(b"\x01\x03\x00" + wrong)


# --- the others --------------------------------------------------------------------------------------------


@given(st.sampled_from([protocol.RELEASE, protocol.NOT_SEEN, protocol.RECALL, protocol.PINNED]), PAIRS)
def test_pairs_there_and_back(kind: int, items: list[tuple[int, int]]) -> None:
    message = protocol.pairs(kind, items)
    assert protocol.kind(message) == kind
    assert protocol.read_pairs(message) == items


def test_the_longest_messages_fit() -> None:
    assert len(protocol.pairs(protocol.RELEASE, [(0, 0)] * protocol.PAIRS)) <= protocol.LIMIT
    assert protocol.reject("x" * protocol.LIMIT) == b"\x03" + b"x" * (protocol.LIMIT - 1)


def test_a_reason_that_is_cut_within_a_letter_can_be_read() -> None:
    reason = protocol.read_reject(protocol.reject("é" * protocol.LIMIT))
    assert reason == "é" * ((protocol.LIMIT - 1) // 2) + "\N{REPLACEMENT CHARACTER}"
    assert protocol.read_reject(protocol.reject("why")) == "why"


def test_a_status_there_and_back_up_to_the_longest() -> None:
    longest = protocol.STATUS_LIMIT - len(protocol.status({"a": ""}))
    for facts in ({}, {"a": "x" * longest}):
        message = protocol.status(facts)
        assert protocol.kind(message) == protocol.STATUS
        assert protocol.read_status(message) == facts
    assert len(message) == protocol.STATUS_LIMIT
    with pytest.raises(ProtocolError, match="a status of 65537 bytes, of which a message holds 65536"):
        protocol.status({"a": "x" * (longest + 1)})


def read_welcome(message: bytes) -> protocol.Welcome:
    return protocol.read_welcome(message, SECRET, "n")


@pytest.mark.parametrize(
    ("read", "message", "why"),
    [
        (protocol.kind, b"", "an empty message"),
        (protocol.read_hello, b"\x01\x02", "a HELLO that is cut off"),
        (protocol.read_hello, b"\x01\x03\x00\xff" + bytes(20), "21 bytes that are not JSON"),
        (protocol.read_hello, b"\x01\x03\x00" + b"[" * 4000, "4000 bytes that are not JSON"),
        (protocol.read_hello, b"\x01\x03\x00" + b"9" * 4090, "4090 bytes that are not JSON|without exactly"),
        (read_welcome, b"\x02" + bytes(13), "13 bytes that are not JSON"),
        (read_welcome, b"\x02{}", "a message without exactly nbytes, slots, path, proof"),
        (protocol.read_status, b"\x03why", "message 3 instead of a status"),
        (protocol.read_status, b"", "an empty message"),
        (protocol.read_status, b"\x0c{" + b"a" * 30, "32 bytes that are not a status"),
        (protocol.read_status, b"\x0c" + b"[" * 100_000, "100001 bytes that are not a status"),
        (protocol.read_status, b"\x0c\xff", "2 bytes that are not a status"),
        (protocol.read_status, b"\x0c[1234567890123456789]", "22 bytes that are not a status"),
        (protocol.read_pairs, b"\x05" + bytes(8), "9 bytes are not a list of pairs"),
        (protocol.read_pairs, b"\x05" + bytes(33), "34 bytes are not a list of pairs"),
    ],
)
def test_the_error_for_a_malformed_message_says_how_long_it_is(
    read: Callable[[bytes], Any], message: bytes, why: str
) -> None:
    """And shows nothing of it: a process may have sent a secret by mistake."""
    with pytest.raises(ProtocolError, match=why):
        read(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)
# JSON in the fields of the two, so that more than its first letter is looked at.
BODIES = st.dictionaries(st.sampled_from(["group", "number", "nonce", "proof", "nbytes", "slots", "path"]), JSON)


@given(
    st.binary(max_size=60) | BODIES.map(lambda value: b"\x01\x03\x00" + json.dumps(value).encode()),
    st.sampled_from([protocol.read_hello, read_welcome, protocol.read_status, protocol.read_pairs]),
)
def test_any_bytes_are_a_message_or_a_protocol_error(message: bytes, read: Callable[[bytes], Any]) -> None:
    try:
        found = read(message)
    except ProtocolError:
        return
    assert isinstance(found, tuple | list | dict)


@given(group=JSON, number=JSON, nonce=JSON, proof=JSON)
def test_a_hello_of_any_values_is_not_proven(group: object, number: object, nonce: object, proof: object) -> None:
    """Nor does it raise anything else, whatever JSON can say: numbers beyond all, halves of letters."""
    message = b"\x01\x03\x00" + body(group=group, number=number, nonce=nonce, proof=proof)
    try:
        hello = protocol.read_hello(message)
    except ProtocolError:
        return
    assert not protocol.is_proven(hello, SECRET)


@given(
    st.recursive(
        st.none() | st.booleans() | U64 | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
    )
)
def test_any_status_is_read_if_it_is_facts(value: Any) -> None:
    message = bytes((protocol.STATUS,)) + json.dumps(value).encode()
    if isinstance(value, dict):
        assert protocol.read_status(message) == value
    else:
        with pytest.raises(ProtocolError, match="bytes that are not a status"):
            protocol.read_status(message)
