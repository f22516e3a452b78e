"""A signal handler that raises, anywhere in a reader: a ticket is taken or is not, and is released in the end."""

from __future__ import annotations

import sys
from itertools import count

import pytest

from mmlane.lane import Mode, StaleTicket, link, listening, outbox, reader
from tests.lane.harness.child import run
from tests.lane.harness.lane_with_readers import PAGE, LaneWithReaders, lane_with_readers
from tests.lane.harness.moments import Interrupted, Moment, interrupt
from tests.lane.harness.payloads import MODES, random, same
from tests.lane.harness.waiting import eventually

MODULES = (link, listening, outbox, reader)


def interrupted(pair: LaneWithReaders, ticket: bytes, mode: Mode, what: str, nth: int) -> bool:
    """Take a ticket and let it go, with an interrupt in one of them; False if there was nothing to interrupt."""
    try:
        if what == "take":
            with Moment(nth, interrupt, MODULES) as moment:
                pair.reader.take(ticket, mode)
        else:
            held = [pair.reader.take(ticket, mode)]
            with Moment(nth, interrupt, MODULES) as moment:
                held.clear()
    except Interrupted:
        pass
    return moment.came


def everywhere(mode: Mode, what: str) -> int:
    """At how many places it was interrupted."""
    sys.unraisablehook = lambda hook: None  # a finalizer's interrupt goes nowhere
    with lane_with_readers() as pair:
        for nth in count(1):
            tensor = random((3 * PAGE,), seed=nth)
            ticket = pair.put(tensor)
            if not interrupted(pair, ticket, mode, what, nth):
                return nth - 1
            try:
                assert same(pair.reader.take(ticket, mode), tensor)  # it had not come so far
            except StaleTicket as error:
                error.__traceback__ = None
            pair.reader.take(pair.put(tensor))  # what is left of the one before goes with the next
            eventually(pair.nothing_is_out, f"{what} {mode}, interrupted at the {nth}th place")
    raise AssertionError


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["take", "let go"])
def test_a_signal_handler_that_raises_anywhere_in_a_reader(mode: Mode, what: str) -> None:
    places = run(everywhere, mode, what)
    assert places > 10 if what == "take" else places >= (0 if mode == "clone" else 8)


def recalled() -> int:
    """What becomes of a ticket whose release was interrupted, should there be no next one."""
    sys.unraisablehook = lambda hook: None
    with lane_with_readers(idle=0.05) as pair:
        ticket = pair.put(random((PAGE,)))
        assert interrupted(pair, ticket, "view", "let go", 1)
        assert pair.lane.stats().tickets == 1
        pair.lane.recall(ticket)
        eventually(pair.nothing_is_out, "the reader has looked when it was asked")
        return pair.lane.stats().lost_tickets


def test_a_reader_that_is_asked_makes_up_for_an_interrupted_release() -> None:
    assert run(recalled) == 0
