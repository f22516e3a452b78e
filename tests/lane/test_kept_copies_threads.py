"""Kept copies in several threads at once, and amid interrupts.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from itertools import count

import pytest
import torch

from mmlane.lane import (
    Lane,
    LaneError,
    Reader,
    Refused,
    Reservation,
    allocator,
    bookkeeping,
    committing,
    filling,
    guard,
    issuing,
    lifecycle,
    mapping,
    memory,
    producer,
)
from mmlane.lane import reservation as reservations
from tests.lane.harness import kernel
from tests.lane.harness.child import run
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, held, offset, published
from tests.lane.harness.moments import Interrupted, Moment, interrupt
from tests.lane.harness.payloads import random, same
from tests.lane.harness.waiting import DEADLINE, eventually, in_threads


def test_several_threads_publish_the_same_copies(wide: LaneWithReaders) -> None:
    turns = [(random((5000,), seed=turn), wide.copy(random((5000,), seed=turn))) for turn in range(100)]
    start = threading.Barrier(4)
    tickets: list[bytes] = []

    def work() -> None:
        start.wait(DEADLINE)
        for tensor, copy in turns:
            for _ in range(3):
                ticket = published(copy)
                tickets.append(ticket)
                assert same(wide.reader.take(ticket), tensor)

    in_threads([work] * 4)
    assert len(set(tickets)) == 1200 and len({offset(ticket) for ticket in tickets}) == 100
    stats = wide.lane.stats()
    assert (stats.puts, stats.shared, stats.copied_bytes) == (1200, 1100, 500_000)
    # More releases than the socket holds at once: a thread of the reader sends the rest.
    eventually(lambda: held(wide.lane.stats()) == (0, 100, 200), "all are heard of")
    turns.clear()
    assert wide.nothing_is_out()


def test_several_threads_copy_the_same_tensor(wide: LaneWithReaders) -> None:
    """None waits for another, and each has a copy of its own."""
    tensor = random((5000,))
    copies: list[Reservation] = []
    in_threads([lambda: copies.extend(wide.copy(tensor) for _ in range(50))] * 4)
    tickets = [published(copy) for copy in copies]
    assert len({offset(ticket) for ticket in tickets}) == 200
    copies.clear()
    assert all(same(wide.reader.take(ticket), tensor) for ticket in tickets)


def test_copies_are_closed_by_one_thread_while_others_publish_them(wide: LaneWithReaders) -> None:
    """Each ticket has the bytes of its copy, whatever was copied to the lane since."""
    turns = [(random((5000,), seed=turn), wide.copy(random((5000,), seed=turn))) for turn in range(100)]
    start = threading.Barrier(4)

    def publish() -> None:
        start.wait(DEADLINE)
        for tensor, copy in turns:
            for _ in range(3):
                try:
                    ticket = published(copy)
                except LaneError as error:
                    assert "closed" in str(error)
                    break
                assert same(wide.reader.take(ticket), tensor)

    def close() -> None:
        start.wait(DEADLINE)
        for _, copy in turns:
            copy.close()
            wide.lane.withdraw(wide.put(torch.zeros(5000, dtype=torch.uint8)))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads([publish, publish, publish, close])
    finally:
        sys.setswitchinterval(before)
    wide.wait_until_nothing_is_out()  # of two releases at once the reader's thread sends one
    assert wide.lane.is_open


# --- at every moment ---------------------------------------------------------------------------------------

MODULES = (
    *(allocator, bookkeeping, committing, filling, guard, issuing, lifecycle, mapping, memory, producer),
    reservations,
)


@pytest.mark.parametrize("before", [0, 1])
def test_a_copy_that_is_closed_at_any_moment_of_its_publishing(wide: LaneWithReaders, before: int) -> None:
    """By another thread, or a signal handler. There is a ticket with its bytes, or an error that says so."""
    tensor = random((PAGE,))
    issued = 0
    for nth in count(1):
        copy = wide.copy(tensor)
        for _ in range(before):
            wide.discard(published(copy))
        tickets: list[bytes] = []
        with Moment(nth, copy.close, MODULES) as moment:
            try:
                tickets.append(published(copy))
            except LaneError as error:
                assert "closed" in str(error)
        assert wide.lane.is_open
        if not moment.came:
            copy.close()
            assert issued > 10 and nth - issued > 1  # it was closed late, and early
            assert same(wide.reader.take(tickets[0]), tensor)
            return
        issued += len(tickets)
        assert held(wide.lane.stats()) == (len(tickets), len(tickets), len(tickets))
        other = wide.put(random((PAGE,), seed=1))
        assert all(same(wide.reader.take(ticket), tensor) for ticket in tickets)
        wide.discard(other)
        assert held(wide.lane.stats()) == (0, 0, 0)


# --- interrupts --------------------------------------------------------------------------------------------


def in_one(lane: Lane) -> None:
    """All that a request with several samples does."""
    copy = lane.copy(random((PAGE,)))
    assert isinstance(copy, Reservation)
    with copy:
        copy.publish()
        copy.publish()


INTERRUPTED: dict[str, tuple[int, Callable[[Lane, Reservation], object]]] = {  # tickets before that, and it
    "copy": (0, lambda lane, copy: lane.copy(random((PAGE,)))),
    "first publish": (0, lambda lane, copy: copy.publish()),
    "next publish": (1, lambda lane, copy: copy.publish()),
    "close": (1, lambda lane, copy: copy.close()),
    "all": (0, lambda lane, copy: in_one(lane)),
}


def interrupted_everywhere(what: str) -> tuple[int, int]:
    """How many lanes were closed by that, and how many were not."""
    logging.disable()
    ended = unharmed = 0
    before, act = INTERRUPTED[what]
    tensor = random((PAGE,))
    for nth in count(1):
        with Lane({"tp": 1}, capacity=2 * SEGMENT, segment=SEGMENT) as lane, Reader("tp") as reader:
            reader.join(lane.invitation, DEADLINE)
            assert lane.wait_open(DEADLINE)
            copy = lane.copy(tensor)
            assert isinstance(copy, Reservation)
            tickets = [published(copy) for _ in range(before)]
            try:
                with Moment(nth, interrupt, MODULES) as moment:
                    act(lane, copy)
            except Interrupted:
                assert moment.came
            if not moment.came:
                return ended, unharmed
            check_after_interrupt(lane, reader, copy, tickets, closing=what == "close")
            if lane.is_closed:
                ended += 1
            else:
                unharmed += 1
            del copy
        eventually(lambda: not kernel.lane_files(os.getpid()), "the lane's memory is let go")
    raise AssertionError


def check_after_interrupt(
    lane: Lane, reader: Reader, copy: Reservation, tickets: list[bytes], *, closing: bool
) -> None:
    """What was copied before is there still, and the copy can be used, and given up, all the same."""
    tensor = random((PAGE,))
    if not closing:
        assert same(copy.tensor, tensor)
        for _ in range(2):
            ticket = copy.publish()
            assert isinstance(ticket, bytes) or lane.is_closed
            if isinstance(ticket, bytes):
                tickets.append(ticket)
    assert all(same(reader.take(ticket), tensor) for ticket in tickets)
    copy.close()
    if not lane.is_closed:
        # A publish that was interrupted at its very end has issued a ticket that no variable holds.
        lane._issuer.withdrawn.extend((live.slot, live.serial) for live in lane._issuer.tickets.live.values())
        assert held(lane.stats()) == (0, 0, 0)
        again = lane.copy(tensor)
        assert isinstance(again, Reservation) or lane.is_closed
    refused = lane.copy(tensor) if lane.is_closed else None
    assert refused is None or (isinstance(refused, Refused) and refused.cause == "closed")


@pytest.mark.parametrize("what", INTERRUPTED)
def test_a_signal_handler_that_raises_anywhere(what: str) -> None:
    """The lane has ended with its state, or nothing is lost: no copy without a reservation or a ticket (2)."""
    ended, unharmed = run(interrupted_everywhere, what)
    if what == "close":
        assert ended == 0 and unharmed > 1  # it changes nothing but itself
    else:
        assert ended > 5 and unharmed > 10
