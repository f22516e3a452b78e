"""Tickets: the tensors that they stand for arrive, and anything else that is passed as a ticket is an error.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import copy
import pickle
import struct
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlane.lane import MalformedTicket, Mode, StaleTicket, TicketError, UnknownLane
from mmlane.lane.ticket import DTYPES, NAMES, Content, digest, read, write
from tests.effort import examples
from tests.lane.harness.lane_with_readers import LaneWithReaders, lane_with_readers
from tests.lane.harness.payloads import MODES, random, same

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4), (1,) * 12, (1 << 40, 0), (4099, 3)]
U64 = (1 << 64) - 1


# --- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_shape_arrives(pair: LaneWithReaders, dtype: torch.dtype, mode: Mode) -> None:
    for shape in SHAPES:
        tensor = random(shape, dtype)
        taken = pair.reader.take(pair.put(tensor), mode)
        assert same(taken, tensor), shape
        assert taken.is_contiguous() and taken.device.type == "cpu" and not taken.requires_grad
    del taken
    assert pair.nothing_is_out()


def test_all_dtypes_of_whole_numbers_of_bytes_travel() -> None:
    """A new torch with a new one that is more than raw bits shows up here."""
    others = {value for value in vars(torch).values() if isinstance(value, torch.dtype)} - set(NAMES)
    beginnings = (
        "torch.q",
        "torch.bits",
        "torch.int",
        "torch.uint",
        "torch.float4",
    )  # quantized, raw, bits packed
    assert [dtype for dtype in others if not str(dtype).startswith(beginnings)] == []
    assert {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16} <= set(NAMES)
    assert all(str(dtype) == f"torch.{name.decode()}" for dtype, name in NAMES.items())


contents = st.builds(
    lambda name, slot, serial, offset, dtype, shape: Content(
        name, slot, serial, offset, torch.Size(shape).numel() * dtype.itemsize, dtype, tuple(shape)
    ),
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, U64),
    st.integers(0, U64),
    st.sampled_from(list(NAMES)),
    st.lists(st.integers(0, 1 << 12), max_size=4) | st.lists(st.just(1), max_size=255),
)


@settings(max_examples=examples(500, 5000))
@given(contents, contents)
def test_a_content_is_read_as_it_was_written(one: Content, other: Content) -> None:
    assert read(write(one)) == one
    assert (write(one) == write(other)) == (one == other)
    assert 0 < digest(write(one)) <= U64
    assert (digest(write(one)) == digest(write(other))) == (one == other)


def test_a_ticket_is_plain_bytes_for_every_carrier(pair: LaneWithReaders) -> None:
    tensor = random((7, 3), torch.bfloat16)
    ticket = pair.put(tensor)
    assert type(ticket) is bytes and len(ticket) < 200
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        carried = pickle.loads(pickle.dumps({"feature": [ticket]}, protocol))["feature"][0]
        assert type(carried) is bytes and carried == ticket
    assert copy.deepcopy(ticket) == ticket
    carried = pickle.loads(pickle.dumps(ticket))
    assert same(pair.reader.take(carried), tensor)


def test_a_ticket_through_msgpack_is_the_same(pair: LaneWithReaders) -> None:
    tensor = random((5,), torch.float16)
    ticket = pair.put(tensor)
    (carried,) = msgpack.unpackb(msgpack.packb([ticket]))
    assert type(carried) is bytes and carried == ticket
    assert same(pair.reader.take(carried), tensor)


def test_a_ticket_says_where_its_tensor_is(pair: LaneWithReaders) -> None:
    ticket = pair.put(random((2, 3), torch.int32))
    content = read(ticket)
    assert content.lane == pair.lane.name
    assert (content.dtype, content.shape, content.nbytes) == (torch.int32, (2, 3), 24)
    pair.discard(ticket)


# --- what is not a ticket ----------------------------------------------------------------------------------


def rewritten(ticket: bytes, **fields: Any) -> bytes:
    """A ticket with other values, well formed where that is possible at all."""
    return write(read(ticket)._replace(**fields))


def repacked(ticket: bytes, number: int, value: int) -> bytes:
    """A ticket with another value in one field of its head, and the rest as it was."""
    head = struct.Struct("<4sBBBIQQQ")
    magic, *fields = head.unpack_from(ticket)
    fields[number] = value & ((1 << (8, 8, 8, 32, 64, 64, 64)[number]) - 1)
    return head.pack(magic, *fields) + ticket[head.size :]


def flipped(ticket: bytes, bits: list[int]) -> bytes:
    changed = bytearray(ticket)
    for bit in bits:
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


class Attack:
    """Tickets that are out, others that are not any more, and all that can be made of them."""

    def __init__(self, pair: LaneWithReaders) -> None:
        tensors = [
            random((3,)),
            random((2, 5), torch.float32),
            random((), torch.int64),
            random((70_000,)),
            random((0, 4)),
        ]
        self.out = [(pair.put(tensor), tensor) for tensor in tensors]
        ended = pair.put(random((9,)))
        pair.discard(ended)
        withdrawn = pair.put(random((10,)))
        pair.lane.withdraw(withdrawn)
        pair.lane.drain()
        with lane_with_readers() as other:
            elsewhere = other.put(random((11,)))
        taken = pair.put(random((12,)))
        self.held = [pair.reader.take(taken)]
        self.over = [ended, withdrawn, elsewhere, taken]
        self.sources = [*(ticket for ticket, _ in self.out), *self.over]
        self.good = {ticket for ticket, _ in self.out}

    def strategy(self) -> st.SearchStrategy[Any]:
        source = st.sampled_from(self.sources)
        longest = max(map(len, self.sources))
        number = st.integers(0, 1 << 20) | st.integers(0, U64) | st.sampled_from([1 << 31, 1 << 32, 1 << 63, U64])
        near = st.integers(-3, 3) | st.sampled_from([-4096, 4096, 1 << 20])
        fields = st.sampled_from(["slot", "serial", "offset", "nbytes"])
        shape = st.lists(st.integers(0, 6) | st.just(U64), max_size=5).map(tuple)

        def moved(ticket: bytes, name: str, by: int) -> bytes:
            limit = (1 << 32 if name == "slot" else 1 << 64) - 1
            return rewritten(ticket, **{name: (getattr(read(ticket), name) + by) & limit})

        def reshaped(ticket: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
            size = torch.Size([]).numel()
            for length in shape:
                size *= length
            return rewritten(ticket, dtype=dtype, shape=shape, nbytes=size * dtype.itemsize & U64)

        def from_another(ticket: bytes, other: bytes, names: set[str]) -> bytes:
            return rewritten(ticket, **{name: getattr(read(other), name) for name in names})

        names = st.sets(
            st.sampled_from(["lane", "slot", "serial", "offset", "dtype", "shape", "nbytes"]), min_size=1
        )
        everything = st.one_of(
            st.builds(flipped, source, st.lists(st.integers(0, 8 * longest), min_size=1, max_size=6)),
            st.builds(lambda ticket, end: ticket[:end], source, st.integers(0, longest)),
            st.builds(lambda ticket, start: ticket[start:], source, st.integers(1, longest)),
            st.builds(lambda ticket, more: ticket + more, source, st.binary(min_size=1, max_size=20)),
            st.builds(
                lambda one, two, at, to: one[:at] + two[to:], source, source, *[st.integers(0, longest)] * 2
            ),
            st.builds(repacked, source, st.integers(0, 6), number),
            st.builds(moved, source, fields, near),
            st.builds(reshaped, source, st.sampled_from(list(NAMES)), shape),
            st.builds(from_another, source, source, names),
            st.builds(lambda ticket, name: rewritten(ticket, lane=name), source, st.text(max_size=20)),
            st.binary(max_size=200),
            st.builds(lambda rest: b"mml1" + rest, st.binary(max_size=200)),
            st.sampled_from(self.over),
            st.builds(bytearray, source),
            st.builds(lambda ticket: ticket.decode("latin-1"), source),
            st.sampled_from([None, 0, 1.5, "", (), [], {}, Ellipsis, bytes, memoryview(b"mml1"), torch.zeros(3)]),
        )
        return everything.filter(lambda made: not isinstance(made, bytes) or made not in self.good)


@pytest.mark.long
def test_thousands_of_invalid_tickets_are_each_an_error(pair: LaneWithReaders) -> None:
    """(5): each is an error of its own kind; nothing is taken, nothing is released, the lane goes on.

    To discard a stale ticket is no error: the reader's thread looks at it, and does nothing.
    """
    count = examples(2_000, 20_000)
    attack = Attack(pair)
    before = pair.lane.stats()
    seen: dict[type[TicketError], int] = {}

    @settings(max_examples=count, database=None)
    @given(attack.strategy(), st.booleans())
    def strike(ticket: Any, discarded: bool) -> None:
        with pytest.raises(TicketError) as caught:
            if discarded:
                pair.reader.discard(ticket)
            pair.reader.take(ticket)
        assert caught.type in (MalformedTicket, StaleTicket, UnknownLane)
        assert str(caught.value)
        seen[caught.type] = seen.get(caught.type, 0) + 1
        assert pair.lane.stats() == before

    strike()
    assert sum(seen.values()) >= count and min(seen.values()) > 0.03 * count and len(seen) == 3
    for ticket, tensor in attack.out:
        assert same(pair.reader.take(ticket), tensor)
    assert same(attack.held[0], random((12,)))
    attack.held.clear()
    assert pair.nothing_is_out()
    assert same(pair.reader.take(pair.put(random((100,)))), random((100,)))


def test_withdrawing_what_is_not_a_ticket_of_this_lane_changes_nothing(pair: LaneWithReaders) -> None:
    """(5)"""
    ticket = pair.put(random((8,)))
    with lane_with_readers() as other:
        elsewhere = other.put(random((8,)))
        figures = pair.figures()
        content = read(ticket)
        for wrong in (
            elsewhere,
            rewritten(ticket, serial=content.serial + 1),
            rewritten(ticket, slot=content.slot + 1),
            rewritten(ticket, lane=other.lane.name),
            rewritten(ticket, lane=""),
        ):
            pair.lane.withdraw(wrong)
        for nonsense in (b"", b"mml1", ticket[:-1], None, 7, bytearray(ticket)):
            with pytest.raises(MalformedTicket):
                pair.lane.withdraw(nonsense)  # type: ignore[arg-type]
        assert pair.figures() == figures
        assert other.lane.stats().tickets == 1
        other.lane.withdraw(elsewhere)
    assert same(pair.reader.take(ticket), random((8,)))


def test_a_lane_that_is_not_joined_is_named(pair: LaneWithReaders) -> None:
    with lane_with_readers() as other:
        ticket = other.put(random((3,)))
        with pytest.raises(UnknownLane, match=other.lane.name):
            pair.reader.take(ticket)
        assert other.lane.stats().tickets == 1
        other.discard(ticket)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda ticket: None, "NoneType"),
        (lambda ticket: ticket[:20], "20 bytes"),
        (lambda ticket: b"mml2" + ticket[4:], "mml2"),
        (lambda ticket: rewritten(ticket, nbytes=7), "has not 7 bytes"),
    ],
    ids=["type", "length", "magic", "size"],
)
def test_the_message_says_what_was_found(pair: LaneWithReaders, made: Any, says: str) -> None:
    ticket = pair.put(random((3,)))
    with pytest.raises(MalformedTicket, match=says):
        pair.reader.take(made(ticket))
    pair.discard(ticket)


def test_errors_of_tickets_are_value_errors_and_pickle() -> None:
    """So who knows nothing of lanes treats them as a bad request; and they travel between ranks."""
    for kind in (MalformedTicket, StaleTicket, UnknownLane):
        error = pickle.loads(pickle.dumps(kind("why")))
        assert isinstance(error, ValueError) and str(error) == "why" and type(error) is kind
