"""What lies in the lane already is published there, without a copy; and the producer's own pinned memory."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import pytest
import torch

from mmlane.lane import Lane, Reader, Reservation
from tests.lane.harness.fake_cuda import FakeGpu
from tests.lane.harness.lane_with_readers import SEGMENT, LaneWithReaders, lane_with_readers
from tests.lane.harness.payloads import random, same
from tests.lane.harness.waiting import DEADLINE, eventually

PINNED = 4 * SEGMENT


def room(lane: Lane, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A reservation's tensor, which alone keeps it, filled."""
    made = lane.reserve(shape, dtype)
    assert isinstance(made, Reservation)
    return made.tensor.copy_(random(shape, dtype))


def taken(pair: LaneWithReaders, ticket: Any) -> torch.Tensor:
    assert isinstance(ticket, bytes), ticket
    return pair.reader.take(ticket, "view")


def test_views_of_a_reservation_are_published_where_they_lie(pair: LaneWithReaders) -> None:
    whole = room(pair.lane, 6, 1000)
    extents = pair.lane.stats().extents
    for part in (*torch.split(whole, 2), whole, whole[3:5, :], whole.view(torch.int32)[1], whole[2].view(10, 100)):
        assert same(taken(pair, pair.lane.put(part, in_place=True)), part)
    stats = pair.lane.stats()
    assert (stats.copied_bytes, stats.extents, stats.shared_puts) == (0, extents, stats.puts - 1)
    del whole, part
    eventually(lambda: pair.lane.stats().used_bytes == 0, "the room")


def test_its_readers_keep_it_when_the_producer_has_let_go(pair: LaneWithReaders) -> None:
    whole = room(pair.lane, 6, 1000)
    expected = whole.clone()
    tickets = [pair.lane.put(part, in_place=True) for part in torch.split(whole, 3)]
    del whole
    gc.collect()
    first, second = (taken(pair, ticket) for ticket in tickets)
    assert same(torch.cat([first, second]), expected)
    assert pair.lane.stats().extents == 1
    del first
    assert pair.lane.stats().extents == 1
    del second
    eventually(lambda: pair.lane.stats().extents == 0, "the room")


def test_what_is_not_sent_gives_its_room_back(pair: LaneWithReaders) -> None:
    whole = room(pair.lane, 6, 1000)
    assert pair.lane.stats().extents == 1
    del whole
    assert pair.lane.stats().extents == 0


@pytest.mark.parametrize(
    "part",
    [
        lambda whole: whole[:, 1:3],
        lambda whole: whole.t(),
        lambda whole: torch._neg_view(whole),
        lambda whole: whole[:0],
        lambda whole: whole.clone(),
    ],
)
def test_what_does_not_lie_there_as_it_is_is_copied(pair: LaneWithReaders, part: Any) -> None:
    whole = room(pair.lane, 6, 1000)
    sent = part(whole)
    assert same(taken(pair, pair.lane.put(sent, in_place=True)), sent)
    assert pair.lane.stats().copied_bytes == sent.nbytes


def test_by_default_a_put_copies_all_the_same(pair: LaneWithReaders) -> None:
    """Who puts a tensor may write to it afterwards."""
    whole = room(pair.lane, 6, 1000)
    ticket = pair.lane.put(whole)
    expected = whole.clone()
    whole.zero_()
    assert same(taken(pair, ticket), expected)


def test_what_lies_in_another_lane_is_copied(pair: LaneWithReaders) -> None:
    with lane_with_readers() as other:
        whole = room(other.lane, 6, 1000)
        assert same(taken(pair, pair.lane.put(whole, in_place=True)), whole)
        assert pair.lane.stats().copied_bytes == whole.nbytes
        del whole


def test_several_tickets_on_a_part(pair: LaneWithReaders) -> None:
    whole = room(pair.lane, 6, 1000)
    part = whole[2:4]
    kept = pair.lane.copy(part, in_place=True)
    assert isinstance(kept, Reservation)
    for _ in range(3):
        assert same(taken(pair, kept.publish()), part)
    assert same(taken(pair, kept.publish(part[1])), whole[3])
    with pytest.raises(ValueError, match="not a contiguous part"):
        kept.publish(whole[1:3])
    assert (pair.lane.stats().copied_bytes, pair.lane.stats().extents) == (0, 1)


def test_a_part_may_be_filled_while_another_is_published(pair: LaneWithReaders) -> None:
    whole = room(pair.lane, 6, 1000)
    kept = pair.lane.copy(whole[:3], in_place=True)
    assert isinstance(kept, Reservation)
    first = taken(pair, kept.publish())
    whole[3:].zero_()
    assert same(taken(pair, kept.publish()), first)
    kept.close()


def test_a_closed_lane_refuses() -> None:
    with lane_with_readers() as pair:
        whole = room(pair.lane, 6, 1000)
        pair.lane.close()
        assert not isinstance(pair.lane.put(whole, in_place=True), bytes)
        del whole


# --- pinned ------------------------------------------------------------------------------------------------


def pin(lane: Lane, gpu: FakeGpu) -> None:
    """Call it until the part that stays committed is there, as for every copy."""

    def is_registered() -> bool:
        lane.pin(0)
        return lane.housekeeping.registration.pinned is not None

    eventually(is_registered, "the registration")


def test_reservations_lie_in_pinned_memory_once_it_is_registered(gpu: FakeGpu) -> None:
    with lane_with_readers(pinned=PINNED) as pair:
        before = room(pair.lane, SEGMENT // 8)
        pin(pair.lane, gpu)
        pair.lane.pin(0)
        assert list(gpu.registered.values()) == [PINNED]
        after = room(pair.lane, SEGMENT // 8)
        beyond = room(pair.lane, PINNED // 4)
        assert [gpu.has_registered(tensor) for tensor in (before, after, beyond)] == [False, True, False]
        for tensor in (before, after, beyond):
            assert same(taken(pair, pair.lane.put(tensor, in_place=True)), tensor)
        assert same(taken(pair, pair.lane.put(after[5:], in_place=True)), after[5:])
        assert pair.lane.stats().copied_bytes == 0
        del before, after, beyond, tensor


def test_it_is_unregistered_when_the_lane_and_what_lies_there_are_gone(gpu: FakeGpu) -> None:
    with Lane({"tp": 1}, capacity=32 * SEGMENT, segment=SEGMENT, pinned=PINNED) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        pin(lane, gpu)
        tensor = room(lane, 100)
        expected = tensor.clone()
    assert gpu.registered and same(tensor, expected)
    del tensor
    eventually(lambda: not gpu.registered, "the registration undone")


def test_the_lane_ends_before_cuda_has_let_go(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """That may take long, or never end."""
    may_go_on = threading.Event()
    unregister = gpu.unregister

    def unregistering(address: int) -> None:
        assert may_go_on.wait(DEADLINE)
        unregister(address)

    monkeypatch.setattr(gpu, "unregister", unregistering)
    with Lane({"tp": 1}, capacity=32 * SEGMENT, segment=SEGMENT, pinned=PINNED) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        pin(lane, gpu)
        lane.close()
        assert gpu.registered
        may_go_on.set()
        eventually(lambda: not gpu.registered, "the registration undone")
    eventually(
        lambda: "mmlane-cuda-0" not in {thread.name for thread in threading.enumerate()}, "the thread's end"
    )


def test_one_that_ends_at_once_registers_nothing(gpu: FakeGpu) -> None:
    with Lane({"tp": 1}, capacity=32 * SEGMENT, segment=SEGMENT, pinned=PINNED) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)
        registration = lane.housekeeping.registration
        eventually(lambda: lane.stats().pinned_bytes == PINNED, "what stays committed")
        registration.end()
        lane.pin(0)
        assert registration._device is None and not gpu.registered


def test_nothing_is_registered_where_nothing_stays_committed(gpu: FakeGpu) -> None:
    with lane_with_readers() as pair:
        pair.lane.pin(0)
        assert room(pair.lane, 100).numel() == 100 and not gpu.registered


def test_it_goes_on_pageable_when_cuda_refuses(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mmlane.lane")
    gpu.refuses = "out of host memory"
    with Lane({"tp": 1}, capacity=32 * SEGMENT, segment=SEGMENT, pinned=PINNED) as lane, Reader("tp") as reader:
        reader.join(lane.invitation)
        assert lane.wait_open(DEADLINE)

        def is_said() -> bool:
            lane.pin(0)
            return bool(caplog.records)

        eventually(is_said, "the reason")
        (record,) = caplog.records
        assert "out of host memory" in record.getMessage()
        tensor = room(lane, 100)
        ticket = lane.put(tensor, in_place=True)
        assert isinstance(ticket, bytes)
        assert same(reader.take(ticket), tensor)
