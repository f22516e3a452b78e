"""Tickets that are not out any more: an error of their own request, which touches nothing.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mmlane.lane import JoinRefused, Lane, Reader, StaleTicket
from mmlane.lane.ticket import read
from tests.lane.harness.lane_with_readers import (
    SEGMENT,
    LaneWithReaders,
    lane_with_readers,
    new_tensor,
    put,
    serves,
)
from tests.lane.harness.payloads import SHAPE, random, same
from tests.lane.harness.waiting import DEADLINE, eventually, in_threads

MIB = 1 << 20


@pytest.mark.parametrize(
    "ended", ["held as view", "held as cow", "cloned", "let go", "discarded", "withdrawn", "used again"]
)
def test_a_ticket_that_is_not_out_is_stale(pair: LaneWithReaders, ended: str) -> None:
    """(5): taking it is an error of its own request, discarding it is nothing; neither touches anything."""
    tensor = random(SHAPE)
    ticket = pair.put(tensor)
    held: list[Tensor] = []
    if ended.startswith("held"):
        held.append(pair.reader.take(ticket, "cow" if "cow" in ended else "view"))
    elif ended == "cloned":
        held.append(pair.reader.take(ticket, "clone"))
    elif ended == "let go":
        pair.reader.take(ticket)
    elif ended == "withdrawn":
        pair.lane.withdraw(ticket)
        pair.lane.drain()
    else:
        pair.discard(ticket)
    if ended == "used again":
        pair.lane.drain()
        again = pair.put(tensor)
        assert (read(again).slot, read(again).offset) == (read(ticket).slot, read(ticket).offset)
    figures = pair.figures()
    for _ in range(3):
        with pytest.raises(StaleTicket, match=pair.lane.name):
            pair.reader.take(ticket)
        pair.reader.discard(ticket)
    pair.discard(pair.put(tensor))  # so the reader's thread has come to those before it
    assert pair.figures() == {**figures, "puts": figures["puts"] + 1}
    assert all(same(taken, tensor) for taken in held)
    if ended == "used again":
        assert same(pair.reader.take(again), tensor)


def test_a_release_that_is_not_drained_yet_does_not_make_a_ticket_good(pair: LaneWithReaders) -> None:
    """The producer has not heard of it, so its digest is still there."""
    ticket = pair.put(random(SHAPE))
    pair.reader.take(ticket)
    with pytest.raises(StaleTicket):
        pair.reader.take(ticket)


def test_withdrawing_what_was_released_does_nothing() -> None:
    with lane_with_readers(readers=2) as pair:
        tensor = random(SHAPE)
        ticket = pair.put(tensor)
        held = pair.readers[1].take(ticket)
        pair.readers[0].take(ticket)
        pair.lane.drain()
        for _ in range(2):
            pair.lane.withdraw(ticket)
        assert pair.lane.stats().tickets == 1 and same(held, tensor)
        del held
        pair.lane.withdraw(ticket)
        assert pair.lane.stats().tickets == 0


def test_a_withdrawn_ticket_is_free_at_the_next_put(pair: LaneWithReaders) -> None:
    for _ in range(40):
        pair.lane.withdraw(pair.put(torch.zeros(16 * SEGMENT, dtype=torch.uint8)))
    assert pair.lane.stats().lost_tickets == 0


def test_of_many_threads_that_take_one_ticket_one_gets_it(pair: LaneWithReaders) -> None:
    tensor = random((100,))
    for _ in range(30):
        ticket = pair.put(tensor)
        got: list[Tensor] = []
        stale: list[StaleTicket] = []
        start = threading.Barrier(4)

        def work(
            ticket: bytes = ticket,
            got: list[Tensor] = got,
            stale: list[StaleTicket] = stale,
            start: threading.Barrier = start,
        ) -> None:
            start.wait(60)
            try:
                got.append(pair.reader.take(ticket))
            except StaleTicket as error:
                stale.append(error)

        in_threads([work] * 4)
        assert len(got) == 1 and len(stale) == 3 and same(got[0], tensor)
        assert pair.lane.stats().tickets == 1
        stale.clear()  # their tracebacks
        got.clear()
        assert pair.lane.stats().tickets == 0


# --- a name that is used again -----------------------------------------------------------------------------


@contextmanager
def lane_named(monkeypatch: pytest.MonkeyPatch, number: str, readers: int) -> Iterator[Lane]:
    """A lane of a chosen name."""
    with monkeypatch.context() as patch:
        patch.setattr("mmlane.lane.producer.secrets.token_hex", lambda nbytes: number)
        lane = Lane({"tp": readers}, capacity=8 * MIB)
    with lane:
        yield lane


def test_a_new_lane_of_an_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old tickets are stale, also for who knows the new lane only; who knew the old one can join the new (5)."""
    number = secrets.token_hex(8)
    with Reader("tp") as old, Reader("tp", 1) as new:
        with lane_named(monkeypatch, number, readers=1) as first:
            old.join(first.invitation)
            assert first.wait_open(DEADLINE)
            held = old.take(put(first, tensor := new_tensor()))
            late, later = put(first, new_tensor()), put(first, new_tensor())
        eventually(lambda: old.lanes() == (), "the end of the first lane")
        assert torch.is_tensor(old.take(late))  # for a while, what was on its way can still be taken
        with lane_named(monkeypatch, number, readers=2) as second:
            assert second.name == first.name
            with pytest.raises(JoinRefused, match="secret"):
                new.join(first.invitation)
            new.join(second.invitation)
            old.join(second.invitation)
            assert old.lanes() == (second.name,) and second.wait_open(DEADLINE)
            for ticket in (put(second, new_tensor()), put(second, new_tensor())):
                for reader in (old, new):
                    with pytest.raises(StaleTicket):
                        reader.take(later)
                    assert torch.is_tensor(reader.take(ticket))
            assert torch.equal(held, tensor)
            del held  # says nothing to the second lane
            serves(second, old, new)
            stats = second.stats()
            assert (stats.malformed_messages, stats.rejected_peers, stats.joined) == (0, 1, {"tp": [0, 1]})
