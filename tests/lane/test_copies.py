"""Every put copies the tensor's present content, however it was written.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from mmlane.lane import failpoints
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, held, offset, published
from tests.lane.harness.payloads import inferred, random, same
from tests.lane.ways_to_write import SMALL, WRITES


def test_the_same_tensor_twice_is_two_copies(wide: LaneWithReaders) -> None:
    tensor = random((3 * PAGE,))
    first, second = wide.put(tensor), wide.put(tensor)
    assert offset(first) != offset(second)
    stats = wide.lane.stats()
    assert held(stats) == (2, 2, 6) and (stats.puts, stats.shared, stats.copied_bytes) == (2, 0, 6 * PAGE)
    assert same(wide.reader.take(first), tensor) and same(wide.reader.take(second), tensor)


def test_what_was_put_is_free_with_its_last_ticket_though_its_tensor_lives(wide: LaneWithReaders) -> None:
    """Without waiting for Python's collector, or for anything else."""
    tensors = [random((PAGE,), seed=seed) for seed in range(5)]
    for tensor in tensors:
        taken = wide.reader.take(wide.put(tensor))
        del taken
        assert held(wide.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_whatever_writes_to_a_tensor_the_next_put_has_what_is_there(
    large: LaneWithReaders, write: Callable[[Tensor], object]
) -> None:
    """(6) And tickets on what was put before read what was there then."""
    tensor = torch.arange(24.0).view(SMALL)
    before = tensor.clone()
    first, second = large.put(tensor), large.put(tensor)
    view = large.reader.take(second)
    write(tensor)
    assert not same(tensor, before)
    third = large.put(tensor)
    assert same(large.reader.take(third), tensor)
    assert same(view, before) and same(large.reader.take(first), before)
    del view
    assert large.nothing_is_out()


def test_a_buffer_that_is_refilled_for_each_put_arrives_as_it_was_each_time(wide: LaneWithReaders) -> None:
    """As a caller does that decodes each frame of a video into the same array."""
    buffer = numpy.zeros((256, 100), numpy.float32)
    tensor = torch.from_numpy(buffer)
    tickets = []
    for frame in range(5):
        buffer[:] = frame
        tickets.append(wide.put(tensor))
    for frame, ticket in enumerate(tickets):
        assert same(wide.reader.take(ticket), torch.full((256, 100), float(frame)))


def test_inference_tensors_are_copied_like_others(wide: LaneWithReaders) -> None:
    tensor = inferred(SMALL)
    first = wide.put(tensor)
    with torch.inference_mode():
        before = tensor.clone()
        tensor.add_(1)
    assert same(wide.reader.take(wide.put(tensor)), tensor) and same(wide.reader.take(first), before)


@pytest.mark.parametrize("point", ["put.allocated", "put.committed", "put.copied"])
def test_a_tensor_that_is_changed_while_it_is_put(
    wide: LaneWithReaders, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """What another thread may do. The ticket says what was there before or after, the next one what is there."""
    tensor = random((100,))
    before = tensor.clone()
    monkeypatch.setattr(failpoints, "probe", lambda name: name == point and tensor.add_(1))
    first = wide.put(tensor)
    monkeypatch.setattr(failpoints, "probe", None)
    second = wide.put(tensor)
    assert same(wide.reader.take(first), before if point == "put.copied" else tensor)
    assert same(wide.reader.take(second), tensor)


@pytest.mark.parametrize("kept", [False, True])
def test_the_lane_keeps_no_tensor_alive(wide: LaneWithReaders, kept: bool) -> None:
    """Nor does a copy that is kept: that is of its own."""
    tensor = random((1000,))
    storage = weakref.ref(tensor.untyped_storage())
    copy = wide.copy(tensor) if kept else None
    ticket = wide.put(tensor) if copy is None else published(copy)
    assert storage() is not None
    del tensor
    assert storage() is None
    wide.discard(ticket)
    del copy


def test_what_tickets_refer_to_stays_when_room_is_short(wide: LaneWithReaders) -> None:
    """(6)"""
    tensors = [random((8 * SEGMENT,), seed=seed) for seed in range(8)]
    out = [wide.put(tensor) for tensor in tensors]
    assert wide.refused(random((1,))).cause == "full"
    wide.discard(out[3])
    again = wide.put(random((8 * SEGMENT,), seed=9))
    assert offset(again) == offset(out[3])
    for ticket, tensor in zip(out, tensors, strict=True):
        if ticket is not out[3]:
            assert same(wide.reader.take(ticket), tensor)
    assert same(wide.reader.take(again), random((8 * SEGMENT,), seed=9))
