"""Refusals and their causes; and that an error during a put or a take leaves nothing behind.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import gc

import pytest
import torch

from mmlane.lane import Lane, Mode, Reader, Refused, failpoints
from tests.lane.harness.lane_with_readers import SEGMENT, LaneWithReaders, lane_with_readers
from tests.lane.harness.payloads import MODES, SHAPE, random
from tests.lane.harness.waiting import DEADLINE, eventually


def test_full_says_how_much_and_who_holds_it(pair: LaneWithReaders) -> None:
    tickets = [pair.put(random((4 * SEGMENT,), seed=seed)) for seed in range(4)]
    refused = pair.refused(random((100,)))
    assert refused.cause == "full"
    for part in ("100 bytes", f"{16 * SEGMENT} of {16 * SEGMENT}", "4 tickets", "let tensors go", "capacity"):
        assert part in refused.detail
    pair.discard(tickets.pop())
    pair.discard(pair.put(random((100,))))
    for ticket in tickets:
        pair.discard(ticket)


def test_room_in_pieces_that_are_too_small_is_full_as_well(pair: LaneWithReaders) -> None:
    tickets = [pair.put(random((SEGMENT,), seed=seed)) for seed in range(16)]
    for ticket in tickets[::2]:
        pair.discard(ticket)
    assert pair.refused(random((SEGMENT + 1,))).cause == "full"
    assert pair.lane.stats().used_bytes == 8 * SEGMENT
    for ticket in tickets[1::2]:
        pair.discard(ticket)
    pair.discard(pair.put(random((16 * SEGMENT,))))


def test_oversize_says_how_much_there_is(pair: LaneWithReaders) -> None:
    refused = pair.refused(torch.zeros(16 * SEGMENT + 1, dtype=torch.uint8))
    assert refused.cause == "oversize"
    assert f"{16 * SEGMENT + 1} bytes" in refused.detail and f"capacity of {16 * SEGMENT}" in refused.detail
    pair.discard(pair.put(torch.zeros(16 * SEGMENT, dtype=torch.uint8)))


def test_a_tensor_that_looks_larger_than_any_memory_is_refused(pair: LaneWithReaders) -> None:
    refused = pair.refused(torch.zeros(1).expand(1 << 50))
    assert refused.cause == "oversize" and str(1 << 52) in refused.detail


def test_not_open_says_who_is_missing() -> None:
    lane = Lane({"tp": 2, "dp": 1}, capacity=SEGMENT, segment=SEGMENT)
    with lane, Reader("tp", 1) as reader:
        reader.join(lane.invitation)
        eventually(lambda: lane.stats().joined == {"tp": [1], "dp": []}, "the lane counts the reader")
        refused = lane.put(random((5,)))
        assert isinstance(refused, Refused) and refused.cause == "not_open"
        assert refused.detail.endswith("missing: reader 0 of 'tp', reader 0 of 'dp'")
        assert not lane.is_open and not lane.wait_open(0.0)
        assert lane.stats().fallbacks == {"not_open": 1} and lane.stats().used_bytes == 0


def test_a_refusal_as_unsupported_names_the_tensor(pair: LaneWithReaders) -> None:
    refused = pair.refused(torch.zeros(3).to_sparse())
    assert refused.cause == "unsupported" and refused.detail.startswith("torch.float32, torch.sparse_coo")


def test_a_put_on_a_closed_lane_is_refused_and_closing_twice_is_no_error() -> None:
    with lane_with_readers() as pair:
        ticket = pair.put(random((5,)))
        pair.lane.close()
        pair.lane.close()
        refused = pair.lane.put(random((5,)))
        assert isinstance(refused, Refused) and refused == Refused("closed", "the lane was closed")
        assert not pair.lane.is_open and not pair.lane.wait_open(DEADLINE)
        pair.lane.withdraw(ticket)
        pair.lane.drain()
        assert pair.lane.stats().fallbacks == {"closed": 1}


def test_off_says_so_until_the_lane_is_on_again(pair: LaneWithReaders) -> None:
    ticket = pair.put(random((5,)))
    for _ in range(2):
        pair.lane.switch(off=True)
    refused = pair.refused(random((5,)))
    assert refused.cause == "off" and "mmlane on" in refused.detail
    assert pair.lane.stats().state == "off" and not pair.lane.is_open and not pair.lane.is_closed
    assert torch.equal(pair.reader.take(ticket), random((5,)))  # what is out can be taken, and is released
    assert pair.nothing_is_out()
    pair.lane.switch(off=False)
    assert pair.lane.stats().state == "open"
    pair.discard(pair.put(random((5,))))


def test_a_lane_that_ended_while_it_was_off_is_closed() -> None:
    with lane_with_readers() as pair:
        pair.lane.switch(off=True)
        pair.reader.close()
        eventually(lambda: pair.lane.is_closed, "the lane ends")
        pair.lane.switch(off=False)
        refused = pair.lane.put(random((5,)))
        assert isinstance(refused, Refused) and refused == Refused("closed", "reader 0 of 'tp' has ended")


@pytest.mark.parametrize("point", ["put.allocated", "put.committed", "put.copied"])
def test_a_lane_that_is_closed_while_something_is_put(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Its memory stays until the copy is done, and the tensor is refused."""
    with lane_with_readers() as pair:

        def probe(name: str) -> None:
            if name == point:
                failpoints.probe = None
                pair.lane.close()

        monkeypatch.setattr(failpoints, "probe", probe)
        refused = pair.lane.put(random((3 * SEGMENT,)))
        assert isinstance(refused, Refused) and refused.cause == "closed"
        assert pair.lane.stats().tickets == 0


@pytest.mark.parametrize("point", ["put.allocated", "put.committed", "put.copied"])
def test_a_reader_that_leaves_while_something_is_put(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """(1): no ticket that only some could take."""
    with lane_with_readers(readers=2) as pair:

        def probe(name: str) -> None:
            if name == point:
                failpoints.probe = None
                pair.readers[1].close()
                eventually(lambda: pair.lane.is_closed, "the producer hears of it")

        monkeypatch.setattr(failpoints, "probe", probe)
        refused = pair.lane.put(random((3 * SEGMENT,)))
        assert isinstance(refused, Refused) and refused == Refused("closed", "reader 1 of 'tp' has ended")
        assert pair.lane.stats().tickets == 0


@pytest.mark.parametrize("point", ["put.allocated", "put.committed", "put.copied"])
@pytest.mark.parametrize("error", [RuntimeError("other"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_error_while_something_is_put_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, point: str, error: BaseException
) -> None:
    def probe(name: str) -> None:
        if name == point:
            raise error

    with lane_with_readers() as pair:
        monkeypatch.setattr(failpoints, "probe", probe)
        with pytest.raises(type(error)):
            pair.lane.put(random((3 * SEGMENT,)))
        monkeypatch.setattr(failpoints, "probe", None)
        error.__traceback__ = None  # whose frames have what the put had
        assert pair.lane.stats().used_bytes == 0
        pair.discard(pair.put(random((16 * SEGMENT,))))
        lane = pair.lane
    assert lane._committer.memory is None


@pytest.mark.parametrize("point", ["take.claimed", "take.mapped"])
@pytest.mark.parametrize("mode", MODES)
def test_an_error_while_something_is_taken_releases_it(
    pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch, point: str, mode: Mode
) -> None:
    def probe(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(failpoints, "probe", probe)
    with pytest.raises(KeyboardInterrupt):
        pair.reader.take(pair.put(random(SHAPE)), mode)
    monkeypatch.setattr(failpoints, "probe", None)
    gc.collect()
    stats = pair.lane.stats()
    assert (stats.tickets, stats.used_bytes, stats.malformed_messages) == (0, 0, 0)
