"""What becomes of a share when a put is refused, or its lane is off, ends, or forks.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

from mmlane.lane import LaneError, Refused
from mmlane.lane.producer import SLOTS
from tests.lane.harness.child import run
from tests.lane.harness.payloads import random, same
from tests.lane.harness.together import PAGE, SEGMENT, Together, held, offset, together, uses_left
from tests.lane.harness.waiting import eventually


def test_a_refused_put_spends_a_use() -> None:
    """Whatever the cause, so that who counts on them need not look at each answer. What is held is held on."""
    with together(capacity=4 * SEGMENT) as pair:
        tensor = random((4 * SEGMENT,))
        ticket = pair.put(random((1,)))
        share = pair.lane.share(uses=4)
        assert pair.refused(tensor, share=share).cause == "full" and uses_left(share) == 3
        assert pair.refused("no tensor", share=share).cause == "unsupported" and uses_left(share) == 2
        pair.discard(ticket)
        pair.discard(pair.put(tensor, share=share))
        assert uses_left(share) == 1 and held(pair.lane.stats())[:2] == (0, 1)
        assert pair.refused(random((1,))).cause == "full"  # the room is held
        refused = pair.lane.put(tensor.to_sparse(), share=share)  # not a word of its shape
        assert isinstance(refused, Refused) and refused.cause == "unsupported"
        assert uses_left(share) == 0 and pair.nothing_is_out()

        share = pair.lane.share(uses=2)
        large = random((4 * SEGMENT + 1,))
        assert pair.refused(large, share=share).cause == "oversize" and uses_left(share) == 1
        pair.lane.close()
        refused = pair.lane.put(tensor, share=share)
        assert isinstance(refused, Refused) and refused.cause == "closed" and uses_left(share) == 0


def test_a_lane_that_is_off_between_the_uses(wide: Together) -> None:
    """The copy is there still when the lane is on again."""
    tensor, share = random((PAGE,)), wide.lane.share(uses=4)
    first = wide.put(tensor, share=share)
    taken = wide.reader.take(first)
    wide.lane.switch(off=True)
    assert wide.refused(tensor, share=share).cause == "off" and uses_left(share) == 2
    del taken
    assert held(wide.lane.stats()) == (0, 1, 1)
    wide.lane.switch(off=False)
    tickets = [wide.put(tensor, share=share) for _ in range(2)]
    assert {offset(ticket) for ticket in tickets} == {offset(first)}
    assert all(same(wide.reader.take(ticket), tensor) for ticket in tickets)


def test_a_last_use_while_the_lane_is_off_frees_the_copy(wide: Together) -> None:
    tensor, share = random((PAGE,)), wide.lane.share(uses=2)
    wide.discard(wide.put(tensor, share=share))
    wide.lane.switch(off=True)
    refused = wide.lane.put(tensor, share=share)
    assert isinstance(refused, Refused) and refused.cause == "off"
    assert wide.nothing_is_out()


def test_a_reader_that_ends_between_the_uses() -> None:
    """The lane is closed, and the share with it; what was issued can be taken by the others (1, 4)."""
    with together(readers=2) as pair:
        tensor, share = random((PAGE,)), pair.lane.share(uses=4)
        first, second = pair.put(tensor, share=share), pair.put(tensor, share=share)
        taken = pair.reader.take(first)
        pair.readers[1].close()
        eventually(lambda: pair.lane.is_closed, "the lane ends")
        refused = pair.lane.put(tensor, share=share)
        assert isinstance(refused, Refused) and refused.cause == "closed" and uses_left(share) == 1
        share.close()
        assert same(taken, tensor) and same(pair.reader.take(second), tensor)
        del taken


def test_a_share_that_holds_all_the_room_until_it_is_closed(wide: Together) -> None:
    large, share = random((64 * SEGMENT,)), wide.lane.share(uses=3)
    wide.discard(wide.put(large, share=share))
    for _ in range(3):
        assert wide.refused(random((1,))).cause == "full"
    share.close()
    tensor = random((64 * SEGMENT,), seed=1)
    assert same(wide.reader.take(wide.put(tensor)), tensor)  # the put itself finds that there is room now


def test_many_shares_that_are_dropped_use_no_room_up(wide: Together) -> None:
    for number in range(500):
        tensor = torch.full((3 * SEGMENT + 5,), number % 251, dtype=torch.uint8)
        taken = wide.reader.take(wide.put(tensor, share=wide.lane.share(uses=3)))
        assert int(taken[0]) == int(taken[-1]) == number % 251
        del taken
    assert wide.lane.stats().fallbacks == {}


def test_where_there_are_no_tickets_left_the_copy_of_a_share_waits_for_one(wide: Together) -> None:
    tensor, other = random((10,)), random((10,), seed=1)
    share, its = wide.lane.share(uses=SLOTS + 2), wide.lane.share(uses=3)
    tickets = [wide.put(tensor, share=share) for _ in range(SLOTS)]
    assert len(set(tickets)) == SLOTS and held(wide.lane.stats()) == (SLOTS, 1, 1)
    assert f"{SLOTS} tickets are out" in wide.refused(tensor, share=share).detail
    assert wide.refused(other).cause == "full"
    refused = wide.lane.put(other, share=its)
    assert isinstance(refused, Refused) and refused.cause == "full"
    assert held(wide.lane.stats()) == (SLOTS, 2, 2)
    assert same(wide.reader.take(tickets[-1]), tensor)
    assert same(wide.reader.take(wide.put(other, share=its)), other)
    assert uses_left(its) == 1 and uses_left(share) == 1
    for ticket in tickets[:-1]:
        wide.lane.withdraw(ticket)
    assert held(wide.lane.stats()) == (0, 2, 2)
    share.close()
    its.close()
    assert held(wide.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("first", ["lane", "share"])
def test_a_lane_that_ends_with_shares_open_lets_its_memory_go(first: str) -> None:
    """`together` looks whether it is gone."""
    with together() as pair:
        tensor, share = random((PAGE,)), pair.lane.share(uses=4)
        ticket = pair.put(tensor, share=share)
        taken = pair.reader.take(ticket)
        if first == "share":
            share.close()
        pair.lane.close()
        refused = pair.lane.put(tensor, share=share)
        assert isinstance(refused, Refused) and refused.cause == "closed"
        share.close()
        assert same(taken, tensor)
        del taken


def in_a_forked_child() -> str:
    with together() as pair:
        tensor, share = random((PAGE,)), pair.lane.share(uses=3)
        first = pair.put(tensor, share=share)
        child = os.fork()
        if not child:
            try:
                pair.lane.put(tensor, share=share)
            except LaneError:
                share.close()
                del share
                gc.collect()
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        tickets = [first, pair.put(tensor, share=share)]
        assert len({offset(ticket) for ticket in tickets}) == 1 and uses_left(share) == 1
        assert all(same(pair.reader.take(ticket), tensor) for ticket in tickets)
        share.close()
        assert pair.nothing_is_out()
    return "well"


def test_what_a_forked_child_does_to_a_share_is_nothing_to_its_parent() -> None:
    assert run(in_a_forked_child) == "well"
