"""What becomes of kept copies when a copy or a ticket is refused, or their lane is off, ends, or forks.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch

from mmlane.lane import Lane, LaneError, Refused, Reservation
from mmlane.lane.errors import Cause
from mmlane.lane.issuing import SLOTS
from tests.lane.harness import kernel
from tests.lane.harness.child import run
from tests.lane.harness.lane_with_readers import (
    PAGE,
    SEGMENT,
    LaneWithReaders,
    held,
    lane_with_readers,
    offset,
    published,
)
from tests.lane.harness.payloads import random, same
from tests.lane.harness.waiting import eventually


def refused(pair: LaneWithReaders, copy: Reservation) -> Refused:
    """The refusal of a ticket for a copy, which is counted and changes nothing else."""
    before, figures = pair.lane.stats(), pair.figures()
    ticket = copy.publish()
    assert isinstance(ticket, Refused)
    assert pair.lane.stats().fallbacks.get(ticket.cause, 0) == before.fallbacks.get(ticket.cause, 0) + 1
    assert pair.figures() == figures
    return ticket


@pytest.mark.parametrize(
    ("cause", "tensor"),
    [
        ("oversize", torch.zeros(16 * SEGMENT + 1, dtype=torch.uint8)),
        ("full", torch.zeros(12 * SEGMENT + 1, dtype=torch.uint8)),
        ("unsupported", torch.eye(3).to_sparse()),
        ("off", torch.zeros(5)),
        ("closed", torch.zeros(5)),
    ],
    ids=["oversize", "full", "sparse", "off", "closed"],
)
def test_a_copy_is_refused_as_a_put_is(cause: Cause, tensor: Any) -> None:
    """With the same words, and nothing is kept."""
    with lane_with_readers() as pair:
        ticket = pair.put(random((4 * SEGMENT,)))
        if cause == "off":
            pair.lane.switch(off=True)
        elif cause == "closed":
            pair.lane.close()
        answers = [pair.refused(tensor, kept=True), pair.refused(tensor)]
        assert answers[0].cause == cause and answers[0] == answers[1]
        assert same(pair.reader.take(ticket), random((4 * SEGMENT,)))
        if cause not in ("off", "closed"):
            pair.wait_until_nothing_is_out()


def test_a_copy_for_a_lane_that_waits_is_refused(lane: Lane) -> None:
    answer = lane.copy(torch.ones(10))
    assert isinstance(answer, Refused) and answer.cause == "not_open"
    assert "missing: reader 0 of 'tp'" in answer.detail
    assert held(lane.stats()) == (0, 0, 0) and lane.stats().fallbacks == {"not_open": 1}


def test_a_lane_that_is_off_between_two_tickets(wide: LaneWithReaders) -> None:
    """The copy is there still when the lane is on again."""
    tensor = random((PAGE,))
    copy = wide.copy(tensor)
    first = published(copy)
    taken = wide.reader.take(first)
    wide.lane.switch(off=True)
    assert refused(wide, copy).cause == "off"
    del taken
    assert held(wide.lane.stats()) == (0, 1, 1)
    wide.lane.switch(off=False)
    tickets = [published(copy) for _ in range(2)]
    assert {offset(ticket) for ticket in tickets} == {offset(first)}
    assert all(same(wide.reader.take(ticket), tensor) for ticket in tickets)
    copy.close()


@pytest.mark.parametrize("dropped", [False, True])
def test_a_copy_that_ends_while_the_lane_is_off_is_free(wide: LaneWithReaders, dropped: bool) -> None:
    copy = wide.copy(random((PAGE,)))
    wide.discard(published(copy))
    wide.lane.switch(off=True)
    if dropped:
        del copy
    else:
        copy.close()
    assert wide.nothing_is_out()


def test_a_reader_that_ends_between_two_tickets() -> None:
    """The lane is closed; what was issued can be taken by the others (1, 4)."""
    with lane_with_readers(readers=2) as pair:
        tensor = random((PAGE,))
        copy = pair.copy(tensor)
        first, second = published(copy), published(copy)
        taken = pair.reader.take(first)
        pair.readers[1].close()
        eventually(lambda: pair.lane.is_closed, "the lane ends")
        assert refused(pair, copy).cause == "closed"
        assert same(copy.tensor, tensor)
        copy.close()
        assert same(taken, tensor) and same(pair.reader.take(second), tensor)
        del taken


def test_a_copy_that_keeps_all_the_room_until_it_is_closed(wide: LaneWithReaders) -> None:
    large = random((64 * SEGMENT,))
    copy = wide.copy(large)
    wide.discard(published(copy))
    for _ in range(3):
        assert wide.refused(random((1,))).cause == "full"
        assert wide.refused(random((1,)), kept=True).cause == "full"
    assert same(wide.reader.take(published(copy)), large)
    copy.close()
    tensor = random((64 * SEGMENT,), seed=1)
    assert same(wide.reader.take(wide.put(tensor)), tensor)  # the put itself finds that there is room now


@pytest.mark.parametrize("how", ["dropped", "dropped without a ticket", "closed"])
def test_many_copies_use_no_room_up(wide: LaneWithReaders, how: str) -> None:
    for number in range(300):
        tensor = torch.full((3 * SEGMENT + 5,), number % 251, dtype=torch.uint8)
        copy = wide.copy(tensor)
        if how != "dropped without a ticket":
            taken = wide.reader.take(published(copy))
            assert int(taken[0]) == int(taken[-1]) == number % 251
            del taken
        if how == "closed":
            copy.close()
        del copy
    assert wide.lane.stats().fallbacks == {}


def test_a_copy_is_kept_though_there_are_no_tickets_left(wide: LaneWithReaders) -> None:
    """A ticket for it can be had as soon as another ends; a put that gets none leaves nothing (2)."""
    tensor, other = random((10,)), random((10,), seed=1)
    copy = wide.copy(tensor)
    tickets = [published(copy) for _ in range(SLOTS)]
    assert len(set(tickets)) == SLOTS and held(wide.lane.stats()) == (SLOTS, 1, 1)
    assert f"{SLOTS} tickets are out" in refused(wide, copy).detail
    assert wide.refused(other).cause == "full"
    another = wide.copy(other)
    assert refused(wide, another).cause == "full"
    assert held(wide.lane.stats()) == (SLOTS, 2, 2)
    assert same(wide.reader.take(tickets[-1]), tensor)
    assert same(wide.reader.take(published(another)), other)
    for ticket in tickets[:-1]:
        wide.lane.withdraw(ticket)
    assert held(wide.lane.stats()) == (0, 2, 2)
    assert wide.lane.stats().shared == SLOTS - 1  # what was refused is no ticket
    copy.close()
    another.close()
    assert held(wide.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("ends", ["closed before", "closed after", "dropped before", "dropped after"])
def test_a_lane_that_ends_with_copies_kept_lets_its_memory_go(ends: str) -> None:
    """`lane_with_readers` looks whether it is gone."""
    with lane_with_readers() as pair:
        tensor = random((PAGE,))
        copies = [pair.copy(tensor)]
        taken = pair.reader.take(published(copies[0]))
        if ends == "closed before":
            copies[0].close()
        elif ends == "dropped before":
            copies.clear()
        pair.lane.close()
        if "after" in ends:
            assert refused(pair, copies[0]).cause == "closed"
            assert same(copies[0].tensor, tensor)
        if ends == "closed after":
            copies[0].close()
        elif ends == "dropped after":
            copies.clear()
        assert same(taken, tensor)
        del taken


def test_the_memory_of_a_lane_that_ended_goes_with_the_last_copy() -> None:
    """(4) As it does with the last tensor of a reader."""
    tensor, before = random((PAGE,)), kernel.lane_files(os.getpid())
    with lane_with_readers() as pair:
        copies = [pair.copy(tensor) for _ in range(2)]
        published(copies[0])
        pair.reader.close()
        pair.lane.close()
        copies.pop().close()
        gc.collect()
        assert kernel.lane_files(os.getpid()) - before and same(copies[0].tensor, tensor)
        copies[0].close()
        eventually(lambda: kernel.lane_files(os.getpid()) <= before, "the lane's memory is let go")


def in_a_forked_child() -> str:
    with lane_with_readers() as pair:
        tensor = random((PAGE,))
        copies = [pair.copy(tensor) for _ in range(2)]
        first = published(copies[0])
        child = os.fork()
        if not child:
            for attempt in (copies[0].publish, copies[1].publish, lambda: pair.lane.copy(tensor)):
                try:
                    attempt()
                except LaneError:
                    continue
                os._exit(1)
            if not all(same(copy.tensor, tensor) for copy in copies):  # it would crash if their memory were gone
                os._exit(2)
            copies.pop().close()
            copies.clear()
            gc.collect()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        tickets = [first, published(copies[0])]
        assert len({offset(ticket) for ticket in tickets}) == 1
        assert all(same(pair.reader.take(ticket), tensor) for ticket in tickets)
        assert same(pair.reader.take(published(copies[1])), tensor)
        assert held(pair.lane.stats()) == (0, 2, 2)
        copies[0].close()
        copies.clear()
        assert pair.nothing_is_out()
    return "well"


def test_what_a_forked_child_does_to_copies_is_nothing_to_its_parent() -> None:
    assert run(in_a_forked_child) == "well"
