"""Messages as they are on the socket: byte by byte, there and back, and what is none is an error of one kind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlane.lane import wire
from mmlane.lane.wire import ProtocolError

U64 = st.integers(0, (1 << 64) - 1)
PAIRS = st.lists(st.tuples(U64, U64), max_size=protocol.PAIRS)
TEXT = st.text(max_size=40)


def test_the_numbers_of_the_protocol() -> None:
    """Readers and producers of one version may come from different installations: these are never given anew."""
    assert protocol.VERSION == 2
    kinds = "HELLO WELCOME SORRY MAPPED DONE FORGONE WARM COLD COOLED REVOKE JOINED STATUS KEPT"
    assert [getattr(wire, name) for name in kinds.split()] == list(range(1, 14))
    assert (protocol.LIMIT, protocol.STATUS_LIMIT, protocol.PAIRS) == (4096, 65536, 128)


def test_messages_byte_by_byte() -> None:
    assert protocol.hello("tp") == b"\x01\x02\x00tp"
    assert protocol.welcome(1 << 33, 5, "/p") == b"\x02\x02\x00" + b"\0\0\0\0\x02\0\0\0" + b"\x05\0\0\0" + b"/p"
    assert protocol.reject("why") == b"\x03why"
    assert protocol.status({"a": [1, "b"]}) == b'\x0c{"a":[1,"b"]}'
    assert protocol.pairs(protocol.RELEASE, [(1, 2), (258, 0)]) == b"\x05" + struct.pack("<4Q", 1, 2, 258, 0)
    assert protocol.pairs(protocol.WARM, []) == b"\x07"


@given(TEXT)
def test_a_greeting_there_and_back(group: str) -> None:
    message = protocol.hello(group)
    assert protocol.kind(message) == protocol.HELLO
    assert protocol.read_hello(message) == (protocol.VERSION, group)


@given(U64, st.integers(0, (1 << 32) - 1), TEXT)
def test_a_welcome_there_and_back(nbytes: int, slots: int, path: str) -> None:
    message = protocol.welcome(nbytes, slots, path)
    assert protocol.kind(message) == protocol.WELCOME
    assert protocol.read_welcome(message) == (protocol.VERSION, nbytes, slots, path)


@given(
    st.sampled_from(
        [
            protocol.RELEASE,
            protocol.NOT_SEEN,
            protocol.WARM,
            protocol.COLD,
            protocol.COOLED,
            protocol.RECALL,
            protocol.PINNED,
        ]
    ),
    PAIRS,
)
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


@pytest.mark.parametrize(
    ("read", "message", "why"),
    [
        (protocol.kind, b"", "an empty message"),
        (protocol.read_hello, b"\x01\x02", r"damaged greeting b'\\x01\\x02'"),
        (
            protocol.read_hello,
            b"\x01\x02\x00\xff" + bytes(20),
            r"damaged greeting b'\\x01\\x02\\x00\\xff(\\x00){12}'",
        ),
        (protocol.read_welcome, b"\x02" + bytes(13), r"damaged welcome b'\\x02(\\x00){13}'"),
        (protocol.read_welcome, b"\x02" + bytes(14) + b"\xff/path", r"damaged welcome b'\\x02(\\x00){14}\\xff'"),
        (protocol.read_status, b"\x03why", "message 3 instead of a status"),
        (protocol.read_status, b"", "an empty message"),
        (protocol.read_status, b"\x0c{" + b"a" * 30, r"damaged status b'\\x0c\{a{14}'$"),
        (protocol.read_status, b"\x0c" + b"[" * 100_000, "damaged status"),
        (protocol.read_status, b"\x0c\xff", "damaged status"),
        (protocol.read_status, b"\x0c[1234567890123456789]", r"damaged status b'\\x0c\[12345678901234'$"),
        (protocol.read_pairs, b"\x05" + bytes(8), "9 bytes are not a list of pairs"),
        (protocol.read_pairs, b"\x05" + bytes(33), "34 bytes are not a list of pairs"),
    ],
)
def test_what_is_no_message_is_an_error_that_shows_it(
    read: Callable[[bytes], Any], message: bytes, why: str
) -> None:
    with pytest.raises(ProtocolError, match=why):
        read(message)


@given(
    st.binary(max_size=60),
    st.sampled_from([protocol.read_hello, protocol.read_welcome, protocol.read_status, protocol.read_pairs]),
)
def test_whatever_comes_is_read_or_is_an_error_of_the_protocol(
    message: bytes, read: Callable[[bytes], Any]
) -> None:
    try:
        found = read(message)
    except ProtocolError:
        return
    assert isinstance(found, tuple | list | dict)


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
        with pytest.raises(ProtocolError, match="damaged status"):
            protocol.read_status(message)
