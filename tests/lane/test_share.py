"""Every put copies what is there; the puts of a share are one copy; nothing is ever read but what was put.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from types import CodeType, FrameType
from typing import Any

import numpy
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from mmlane.lane import Lane, LaneError, LaneStats, Reader, Refused, Share, ledger, points, producer
from mmlane.lane import share as sharing
from mmlane.lane.producer import SLOTS
from mmlane.lane.ticket import read
from tests.lane.processes import DEADLINE, eventually
from tests.lane.sandbox import run
from tests.lane.together import PAGE, SEGMENT, Together, plain, random, same, together

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in ("ComplexHalf", "Sparse CSR", "torch.quantize_per_tensor", "The PyTorch API of nested")
]

SMALL = (6, 4)
LARGE = (700, 600)  # beyond 1 MiB in every dtype that is used here: copied in another way


@pytest.fixture
def pair() -> Iterator[Together]:
    with together(capacity=64 * SEGMENT) as pair:
        yield pair
        assert pair.nothing_is_out()


@pytest.fixture(scope="module")
def large() -> Iterator[Together]:
    """For what leaves nothing behind: a lane for many tests."""
    with together(capacity=1024 * SEGMENT) as pair:
        yield pair


def offset(ticket: bytes) -> int:
    return read(ticket).offset


def held(stats: LaneStats) -> tuple[int, int, int]:
    """What is out: tickets, extents, pages."""
    return stats.tickets, stats.extents, stats.taken // PAGE


# --- without a share: copies --------------------------------------------------------------------------------


def test_the_same_tensor_twice_is_two_copies(pair: Together) -> None:
    tensor = random((3 * PAGE,))
    first, second = pair.put(tensor), pair.put(tensor)
    assert offset(first) != offset(second)
    stats = pair.lane.stats()
    assert held(stats) == (2, 2, 6) and (stats.puts, stats.shared, stats.copied) == (2, 0, 6 * PAGE)
    assert same(pair.reader.take(first), tensor) and same(pair.reader.take(second), tensor)


def test_what_was_put_is_free_with_its_last_ticket_though_its_tensor_lives(pair: Together) -> None:
    """Without waiting for Python's collector, or for anything else."""
    tensors = [random((PAGE,), seed=seed) for seed in range(5)]
    for tensor in tensors:
        taken = pair.reader.take(pair.put(tensor))
        del taken
        assert held(pair.lane.stats()) == (0, 0, 0)


_operators: Any = torch.library
_library = _operators.Library("mmlane_tests", "FRAGMENT")
_library.define("fill(Tensor(a!) tensor) -> ()")
_library.impl("fill", lambda tensor: tensor.numpy().fill(11), "CPU")


@torch.library.custom_op("mmlane_tests::fill_too", mutates_args=("tensor",))
def _fill_too(tensor: Tensor) -> None:
    tensor.numpy().fill(12)


def _no_grad(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(3)


def _inference(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor[1:].add_(1)


def _uncounted(tensor: Tensor) -> None:
    with vars(torch.autograd)["_unsafe_preserve_version_counter"](tensor):
        tensor.add_(1)


def _optimizer(tensor: Tensor) -> None:
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=1.0, foreach=True).step()


def _out(tensor: Tensor) -> None:
    torch.add(tensor, 1, out=tensor)


def _item(tensor: Tensor) -> None:
    tensor[2, 1] = 99


def _slice(tensor: Tensor) -> None:
    tensor[:, 1:3] = -1


def _after_another_view(tensor: Tensor) -> None:
    view = tensor.view(-1)
    tensor.add_(0)
    view[5:6].fill_(8)


def _data(tensor: Tensor) -> None:
    tensor.data = torch.full_like(tensor, 6.0)


def _resized(tensor: Tensor) -> None:  # as sharded training does it
    storage = tensor.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(nbytes)
    tensor.data.fill_(7)


def _shared_memory(tensor: Tensor) -> None:
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    tensor.data.add_(1)


def _untyped(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


WRITES: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda tensor: tensor.numpy().fill(4),
    "numpy, a part": lambda tensor: tensor.numpy()[1:2].fill(4),
    "data": lambda tensor: tensor.data.add_(1),
    "dlpack": lambda tensor: torch.from_dlpack(torch.to_dlpack(tensor)).fill_(9),  # type: ignore[attr-defined]
    "its address": lambda tensor: ctypes.memset(tensor.data_ptr(), 1, 5),
    "its storage": lambda tensor: _untyped(tensor).fill_(1),
    "a storage copied to its own": lambda tensor: tensor.untyped_storage().copy_(
        torch.ones_like(tensor).untyped_storage()
    ),
    "its storage resized": _resized,
    "its storage seen by another tensor": lambda tensor: (
        torch.empty(0).set_(tensor.untyped_storage(), 0, (24,), (1,)).fill_(3)
    ),
    "another storage": lambda tensor: tensor.set_(torch.full(SMALL, 5.0).untyped_storage(), 0, SMALL, (4, 1)),
    "other data": _data,
    "swap_tensors": lambda tensor: vars(torch.utils)["swap_tensors"](tensor, torch.full_like(tensor, 2.0)),
    "shared memory": _shared_memory,
    "uncounted": _uncounted,
    "an operator": lambda tensor: torch.ops.mmlane_tests.fill(tensor),
    "a custom operator": _fill_too,
    "compiled": lambda tensor: torch.compile(lambda inner: inner.add_(1), backend="aot_eager")(tensor),
    "add_": lambda tensor: tensor.add_(1),
    "relu_": lambda tensor: torch.relu_(tensor.sub_(3)),
    "item": _item,
    "slice": _slice,
    "a view": lambda tensor: tensor.view(-1)[3:5].zero_(),
    "detach": lambda tensor: tensor.detach().add_(1),
    "a view of detach": lambda tensor: tensor.detach().T[0].fill_(5),
    "another dtype": lambda tensor: tensor.view(torch.int32).bitwise_not_(),
    "a part": lambda tensor: tensor[1:2].copy_(torch.full((1, 4), 3.0)),
    "chunks": lambda tensor: tensor.chunk(3)[1].neg_(),
    "index_fill_": lambda tensor: tensor.index_fill_(0, torch.tensor([1]), 4.0),
    "scatter_": lambda tensor: tensor.scatter_(0, torch.tensor([[1, 1, 1, 1]]), 3.0),
    "masked_fill_": lambda tensor: tensor.masked_fill_(torch.ones(SMALL, dtype=torch.bool), 6.0),
    "foreach add": lambda tensor: torch._foreach_add_([tensor], 2.0),
    "foreach copy": lambda tensor: torch._foreach_copy_([tensor], [torch.ones_like(tensor)]),
    "an optimizer": _optimizer,
    "out=": _out,
    "without gradients": _no_grad,
    "inference mode": _inference,
    "random numbers": lambda tensor: tensor.uniform_(),
    "an older view": _after_another_view,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_whatever_writes_to_a_tensor_the_next_put_has_what_is_there(
    large: Together, write: Callable[[Tensor], object]
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


def test_a_buffer_that_is_refilled_for_each_put_arrives_as_it_was_each_time(pair: Together) -> None:
    """As a caller does that decodes each frame of a video into the same array."""
    buffer = numpy.zeros((256, 100), numpy.float32)
    tensor = torch.from_numpy(buffer)
    tickets = []
    for frame in range(5):
        buffer[:] = frame
        tickets.append(pair.put(tensor))
    for frame, ticket in enumerate(tickets):
        assert same(pair.reader.take(ticket), torch.full((256, 100), float(frame)))


def test_inference_tensors_are_copied_like_others(pair: Together) -> None:
    tensor = _inferred(SMALL)
    first = pair.put(tensor)
    with torch.inference_mode():
        before = tensor.clone()
        tensor.add_(1)
    assert same(pair.reader.take(pair.put(tensor)), tensor) and same(pair.reader.take(first), before)


@pytest.mark.parametrize("point", ["put.allocated", "put.reserved", "put.copied"])
def test_a_tensor_that_is_changed_while_it_is_put(
    pair: Together, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """What another thread may do. The ticket says what was there before or after, the next one what is there."""
    tensor = random((100,))
    before = tensor.clone()
    monkeypatch.setattr(points, "probe", lambda name: name == point and tensor.add_(1))
    first = pair.put(tensor)
    monkeypatch.setattr(points, "probe", None)
    second = pair.put(tensor)
    assert same(pair.reader.take(first), before if point == "put.copied" else tensor)
    assert same(pair.reader.take(second), tensor)


@pytest.mark.parametrize("shared", [False, True])
def test_the_lane_keeps_no_tensor_alive(pair: Together, shared: bool) -> None:
    tensor = random((1000,))
    storage = weakref.ref(tensor.untyped_storage())
    share = pair.lane.share(uses=2) if shared else None
    ticket = pair.put(tensor, share=share)
    assert storage() is not None
    del tensor
    assert storage() is None
    pair.reader.discard(ticket)
    del share


def test_what_tickets_refer_to_stays_when_room_is_short(pair: Together) -> None:
    """(6)"""
    tensors = [random((8 * SEGMENT,), seed=seed) for seed in range(8)]
    out = [pair.put(tensor) for tensor in tensors]
    assert pair.refused(random((1,))).cause == "full"
    pair.reader.discard(out[3])
    again = pair.put(random((8 * SEGMENT,), seed=9))
    assert offset(again) == offset(out[3])
    for ticket, tensor in zip(out, tensors, strict=True):
        if ticket is not out[3]:
            assert same(pair.reader.take(ticket), tensor)
    assert same(pair.reader.take(again), random((8 * SEGMENT,), seed=9))


# --- shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", [1, 2, 3, 9])
def test_a_share_is_one_copy_for_its_uses(pair: Together, uses: int) -> None:
    tensor, share = random((3 * PAGE,)), pair.lane.share(uses)
    tickets = [pair.put(tensor, share=share) for _ in range(uses)]
    assert len(set(tickets)) == uses and len({offset(ticket) for ticket in tickets}) == 1
    stats = pair.lane.stats()
    assert held(stats) == (uses, 1, 3)
    assert (stats.puts, stats.shared, stats.copied) == (uses, uses - 1, 3 * PAGE)
    views = [pair.reader.take(ticket, "view") for ticket in tickets]
    assert all(same(view, tensor) for view in views) and len({view.data_ptr() for view in views}) == 1
    while views:
        assert held(pair.lane.stats()) == (len(views), 1, 3)
        views.pop()
    assert held(pair.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("uses", [0, -1])
def test_a_share_for_no_put_is_an_error(pair: Together, uses: int) -> None:
    with pytest.raises(ValueError, match=f"{uses=}.*at least one"):
        pair.lane.share(uses)


def test_the_copy_of_a_share_outlives_all_its_tickets(pair: Together) -> None:
    """A request waits for an answer to its first ticket before it sends the others."""
    tensor, share = random((PAGE,)), pair.lane.share(uses=4)
    offsets = set()
    for left in (3, 2, 1, 0):
        ticket = pair.put(tensor, share=share)
        offsets.add(offset(ticket))
        taken = pair.reader.take(ticket)
        assert same(taken, tensor) and held(pair.lane.stats()) == (1, 1, 1)
        del taken
        assert held(pair.lane.stats()) == ((0, 1, 1) if left else (0, 0, 0))
        pair.reader.discard(pair.put(random((PAGE,), seed=left + 1)))  # never there
    assert len(offsets) == 1 and pair.lane.stats().copied == 5 * PAGE


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_all_tickets_of_a_share_say_what_was_put_first(large: Together, write: Callable[[Tensor], object]) -> None:
    """One request has one picture, also if its caller has the next one in the same memory already."""
    tensor = torch.arange(24.0).view(SMALL)
    before = tensor.clone()
    share = large.lane.share(uses=3)
    first = large.put(tensor, share=share)
    write(tensor)
    tickets = [first, large.put(tensor, share=share), large.put(before, share=share)]
    assert all(same(large.reader.take(ticket), before) for ticket in tickets)
    assert same(large.reader.take(large.put(tensor, share=share)), tensor)  # beyond the uses
    assert large.nothing_is_out()


def by_closing(share: list[Share]) -> None:
    share[0].close()


def by_closing_twice(share: list[Share]) -> None:
    share[0].close()
    share[0].close()


def by_leaving(share: list[Share]) -> None:
    with share[0]:
        pass


def by_an_error(share: list[Share]) -> None:
    with pytest.raises(KeyError), share[0]:
        raise KeyError


def by_dropping(share: list[Share]) -> None:
    share.clear()


def by_dropping_in_a_cycle(share: list[Share]) -> None:
    cycle: list[Any] = [share.pop()]
    cycle.append(cycle)
    del cycle
    gc.collect()


def by_dropping_elsewhere(share: list[Share]) -> None:
    thread = threading.Thread(target=share.clear)
    thread.start()
    thread.join()


ENDS = [
    by_closing,
    by_closing_twice,
    by_leaving,
    by_an_error,
    by_dropping,
    by_dropping_in_a_cycle,
    by_dropping_elsewhere,
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("puts", [0, 1, 2])
@pytest.mark.parametrize("first", ["share", "tickets"])
def test_a_share_that_ends_before_its_uses_are_spent(
    pair: Together, end: Callable[[list[Share]], None], puts: int, first: str
) -> None:
    """Its copy is free with the last ticket, or at once if there is none."""
    tensor, share = random((PAGE,)), [pair.lane.share(uses=3)]
    tickets = [pair.put(tensor, share=share[0]) for _ in range(puts)]
    if first == "tickets":
        while tickets:
            pair.reader.discard(tickets.pop())
        assert held(pair.lane.stats()) == (0, bool(puts), bool(puts))
    end(share)
    while tickets:
        assert held(pair.lane.stats()) == (len(tickets), 1, 1)
        assert same(pair.reader.take(tickets.pop()), tensor)
    assert held(pair.lane.stats()) == (0, 0, 0)


def test_a_share_whose_making_was_interrupted_ends_without_a_word() -> None:
    Share.__new__(Share).close()


def test_a_put_with_a_closed_share_copies(pair: Together) -> None:
    tensor, share = random((PAGE,)), pair.lane.share(uses=5)
    first = pair.put(tensor, share=share)
    share.close()  # and no drain between this and the next put
    tensor.add_(1)
    second, third = pair.put(tensor, share=share), pair.put(random((3,)), share=share)  # nor is it of its kind
    assert len({offset(ticket) for ticket in (first, second, third)}) == 3
    pair.reader.discard(first)
    assert held(pair.lane.stats()) == (2, 2, 2)
    assert same(pair.reader.take(second), tensor) and same(pair.reader.take(third), random((3,)))


def test_a_put_beyond_the_uses_copies(pair: Together) -> None:
    tensor, share = random((PAGE,)), pair.lane.share(uses=2)
    tickets = [pair.put(tensor, share=share) for _ in range(2)]
    tensor.add_(1)
    tickets += [pair.put(tensor, share=share) for _ in range(2)]
    assert len({offset(ticket) for ticket in tickets}) == 3
    assert held(pair.lane.stats()) == (4, 3, 3)
    for number, ticket in enumerate(tickets):
        assert same(pair.reader.take(ticket), tensor if number > 1 else tensor - 1)


def test_a_share_of_another_lane_is_an_error(pair: Together) -> None:
    with together() as other:
        share = other.lane.share(uses=2)
        ticket = other.put(random((5,)), share=share)
        for what in (random((5,)), "not even a tensor"):
            with pytest.raises(ValueError, match=f"{other.lane.address}.*{pair.lane.address}"):
                pair.lane.put(what, share=share)  # type: ignore[arg-type]
        assert held(pair.lane.stats()) == (0, 0, 0) and held(other.lane.stats()) == (1, 1, 1)
        assert offset(other.put(random((5,)), share=share)) == offset(ticket)  # no use was spent
        other.lane.withdraw(ticket)


OTHERS = {
    "shape": random((6, 2), torch.float32),
    "fewer": random((11,), torch.float32),
    "more": random((1 << 20,), torch.float32),
    "one more dimension": random((1, 12), torch.float32),
    "dtype": random((12,), torch.int32),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_share_for_another_tensor_is_an_error(pair: Together, other: Tensor) -> None:
    tensor, share = random((12,), torch.float32), pair.lane.share(uses=3)
    tickets = [pair.put(tensor, share=share)]
    with pytest.raises(ValueError, match=r"torch.float32.*12"):
        pair.lane.put(other, share=share)
    assert pair.lane.is_open and held(pair.lane.stats()) == (1, 1, 1)
    tickets += [pair.put(tensor, share=share) for _ in range(2)]  # no use was spent
    assert pair.lane.stats().shared == 2
    for ticket in tickets:
        assert same(pair.reader.take(ticket), tensor)


def test_tensors_of_other_sizes_at_the_same_time_are_copied_or_an_error(
    pair: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a ticket for more bytes than there are: what is looked at and what is done is one step."""
    small, big, share = random((10,)), random((5 * PAGE,)), pair.lane.share(uses=4)
    inner: list[bytes] = []

    def probe(name: str) -> None:
        if name == "put.copied" and not inner:
            inner.append(b"")
            inner.append(pair.put(big, share=share))

    monkeypatch.setattr(points, "probe", probe)
    outer = pair.put(small, share=share)
    monkeypatch.setattr(points, "probe", None)
    with pytest.raises(ValueError, match="a share for"):
        pair.lane.put(small, share=share)
    assert same(pair.reader.take(inner[1]), big) and same(pair.reader.take(outer), small)


def stands_in(thread: threading.Thread, code: CodeType) -> bool:
    """Whether a thread is in a function itself, at one place for a while."""
    seen = set()
    for _ in range(50):
        frame = sys._current_frames().get(thread.ident or 0)
        seen.add(None if frame is None or frame.f_code is not code else frame.f_lasti)
        time.sleep(0.001)
    return None not in seen and len(seen) == 1


def test_what_a_share_is_for_is_looked_at_with_the_lock_held(pair: Together) -> None:
    """A put that waits for the lock learns of what is put meanwhile: no ticket for more bytes than there are."""
    share, lane = pair.lane.share(uses=5), pair.lane
    errors: list[str] = []

    def work() -> None:
        with pytest.raises(ValueError) as error:
            lane.put(random((5 * PAGE,)), share=share)
        errors.append(str(error.value))

    thread = threading.Thread(target=work)
    with lane._lock:
        thread.start()
        eventually(lambda: stands_in(thread, Lane.put.__code__), "it waits for the lock")
        extent = lane._ledger.allocate(0, 10)
        ticket = lane._publish(random((10,)), 10, extent, share.held)
    thread.join(DEADLINE)
    assert len(errors) == 1 and isinstance(ticket, bytes)
    lane.withdraw(ticket)
    share.close()


# --- shares and refusals ------------------------------------------------------------------------------------


def uses_left(share: Share) -> int:
    return share.held.uses


def test_a_refused_put_spends_a_use() -> None:
    """Whatever the cause, so that who counts on them need not look at each answer. What is held is held on."""
    with together(capacity=4 * SEGMENT) as pair:
        tensor = random((4 * SEGMENT,))
        ticket = pair.put(random((1,)))
        share = pair.lane.share(uses=4)
        assert pair.refused(tensor, share=share).cause == "full" and uses_left(share) == 3
        assert pair.refused("no tensor", share=share).cause == "unsupported" and uses_left(share) == 2
        pair.reader.discard(ticket)
        pair.reader.discard(pair.put(tensor, share=share))
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


def test_a_lane_that_is_not_open_between_the_uses() -> None:
    """What died was no use of the copy; who comes in its place reads it like any other (1, 4)."""
    with together(readers=2) as pair:
        tensor, share = random((PAGE,)), pair.lane.share(uses=4)
        first = pair.put(tensor, share=share)
        taken = pair.readers[0].take(first)
        pair.readers[1].close()
        eventually(lambda: not pair.lane.is_open, "the lane shuts")
        refused = pair.lane.put(tensor, share=share)
        assert isinstance(refused, Refused) and refused.cause == "not_open"
        del taken
        eventually(lambda: pair.lane.stats().tickets == 0, "the ticket is back")
        assert held(pair.lane.stats()) == (0, 1, 1)

        another = Reader("tp")
        pair.readers.append(another)
        another.join(pair.lane.address, DEADLINE)
        assert pair.lane.wait_open(DEADLINE)
        tickets = [pair.put(tensor, share=share) for _ in range(2)]
        assert {offset(ticket) for ticket in tickets} == {offset(first)}
        for ticket in tickets:
            assert same(another.take(ticket), tensor) and same(pair.reader.take(ticket), tensor)
        eventually(pair.nothing_is_out, "the copy is free")


def test_a_last_use_while_the_lane_is_not_open_frees_the_copy() -> None:
    with together() as pair:
        tensor, share = random((PAGE,)), pair.lane.share(uses=2)
        pair.reader.discard(pair.put(tensor, share=share))
        pair.reader.close()
        eventually(lambda: not pair.lane.is_open, "the lane shuts")
        refused = pair.lane.put(tensor, share=share)
        assert isinstance(refused, Refused) and refused.cause == "not_open"
        assert pair.nothing_is_out()


def test_a_share_that_holds_all_the_room_until_it_is_closed(pair: Together) -> None:
    large, share = random((64 * SEGMENT,)), pair.lane.share(uses=3)
    pair.reader.discard(pair.put(large, share=share))
    for _ in range(3):
        assert pair.refused(random((1,))).cause == "full"
    share.close()
    tensor = random((64 * SEGMENT,), seed=1)
    assert same(pair.reader.take(pair.put(tensor)), tensor)  # the put itself finds that there is room now


def test_many_shares_that_are_dropped_use_no_room_up(pair: Together) -> None:
    for number in range(500):
        tensor = torch.full((3 * SEGMENT + 5,), number % 251, dtype=torch.uint8)
        taken = pair.reader.take(pair.put(tensor, share=pair.lane.share(uses=3)))
        assert int(taken[0]) == int(taken[-1]) == number % 251
        del taken
    assert pair.lane.stats().refused == {}


def test_where_there_are_no_tickets_left_the_copy_of_a_share_waits_for_one(pair: Together) -> None:
    tensor, other = random((10,)), random((10,), seed=1)
    share, its = pair.lane.share(uses=SLOTS + 2), pair.lane.share(uses=3)
    tickets = [pair.put(tensor, share=share) for _ in range(SLOTS)]
    assert len(set(tickets)) == SLOTS and held(pair.lane.stats()) == (SLOTS, 1, 1)
    assert f"{SLOTS} tickets are out" in pair.refused(tensor, share=share).detail
    assert pair.refused(other).cause == "full"
    refused = pair.lane.put(other, share=its)
    assert isinstance(refused, Refused) and refused.cause == "full"
    assert held(pair.lane.stats()) == (SLOTS, 2, 2)
    assert same(pair.reader.take(tickets[-1]), tensor)
    assert same(pair.reader.take(pair.put(other, share=its)), other)
    assert uses_left(its) == 1 and uses_left(share) == 1
    for ticket in tickets[:-1]:
        pair.lane.withdraw(ticket)
    assert held(pair.lane.stats()) == (0, 2, 2)
    share.close()
    its.close()
    assert held(pair.lane.stats()) == (0, 0, 0)


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


# --- shares, threads and interrupts -------------------------------------------------------------------------


@pytest.mark.parametrize("uses", [2, 4, 10])
def test_puts_that_copy_at_the_same_time(pair: Together, monkeypatch: pytest.MonkeyPatch, uses: int) -> None:
    """None waits for another; the first to be done is what the share holds, if a use is left for it then."""
    tensor, share = random((100,)), pair.lane.share(uses)
    inner: list[bytes] = []

    def probe(name: str) -> None:
        if name == "put.copied" and len(inner) < 3:
            inner.append(b"")
            inner.append(pair.put(tensor, share=share))

    monkeypatch.setattr(points, "probe", probe)
    outer = pair.put(tensor, share=share)
    monkeypatch.setattr(points, "probe", None)
    tickets = [outer, *filter(None, inner), pair.put(tensor, share=share)]
    assert len(tickets) == 5 and len({offset(ticket) for ticket in tickets}) == (4 if uses > 4 else 5)
    for ticket in tickets:
        assert same(pair.reader.take(ticket), tensor)
    assert held(pair.lane.stats()) == (0, uses > 5, uses > 5)
    share.close()


@pytest.mark.parametrize("point", ["put.allocated", "put.copied"])
def test_a_share_that_is_closed_while_it_is_put(
    pair: Together, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Whether that is handled before the copy is done or after."""
    for drained in (True, False):
        tensor, share = random((100,)), pair.lane.share(uses=3)

        def probe(name: str, share: Share = share, drained: bool = drained) -> None:
            if name == point:
                share.close()
                if drained:
                    pair.lane.drain()

        monkeypatch.setattr(points, "probe", probe)
        ticket = pair.put(tensor, share=share)
        monkeypatch.setattr(points, "probe", None)
        assert same(pair.reader.take(ticket), tensor)
        assert held(pair.lane.stats()) == (0, 0, 0)


@pytest.mark.parametrize("spent", [True, False])
def test_one_share_from_several_threads_at_once(pair: Together, spent: bool) -> None:
    problems: list[str] = []
    start = threading.Barrier(4)
    turns = [(random((5000,), seed=turn), pair.lane.share(uses=12 + 3 * (not spent))) for turn in range(100)]

    def work() -> None:
        start.wait(DEADLINE)
        for number, (tensor, share) in enumerate(turns):
            for _ in range(3):
                ticket = pair.lane.put(tensor, share=share)
                if isinstance(ticket, Refused):
                    problems.append(ticket.detail)
                elif not same(pair.reader.take(ticket), tensor):
                    problems.append(f"turn {number}: other bytes")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE)
        assert not thread.is_alive()
    assert problems == []
    stats = pair.lane.stats()
    assert (stats.tickets, stats.puts) == (0, 1200)
    assert held(stats) == ((0, 0, 0) if spent else (0, 100, 200))
    turns.clear()
    assert pair.nothing_is_out()


FILES = {module.__file__ for module in (producer, ledger, sharing)}


class Interrupted(Exception):
    """What a signal handler raises."""


class Interrupt:
    """Raises where Python looks for signals in the lane's books, the nth time. Says whether it has.

    That is where a function begins, and where one that is not written in Python has returned.
    """

    def __init__(self, nth: int) -> None:
        self._left = nth
        self.raised = False

    def __enter__(self) -> Interrupt:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename in FILES and event in ("call", "c_return"):
            self._left -= 1
            if self._left == 0:
                self.raised = True
                raise Interrupted


INTERRUPTED = ("first", "second", "last", "close")


def interrupted_everywhere(what: str) -> tuple[int, int]:
    """How many lanes were closed by that, and how many were not."""
    logging.disable()
    ended = unharmed = 0
    tensor = random((PAGE,))
    for nth in count(1):
        with Lane({"tp": 1}, capacity=2 * SEGMENT, segment=SEGMENT) as lane, Reader("tp") as reader:
            reader.join(lane.address, DEADLINE)
            assert lane.wait_open(DEADLINE)
            share = lane.share(uses=3)
            for _ in range(INTERRUPTED.index(what)):
                lane.put(tensor, share=share)
            try:
                with Interrupt(nth) as interrupt:
                    if what == "close":
                        share.close()
                    else:
                        lane.put(tensor, share=share)
            except Interrupted:
                assert interrupt.raised
            if not interrupt.raised:
                return ended, unharmed
            for _ in range(2):  # it can be used, and used up, all the same
                assert isinstance(lane.put(tensor, share=share), bytes) or lane.is_closed
            if lane.is_closed:
                ended += 1
                continue
            unharmed += 1
            share.close()
            lane.drain()
            assert set(lane._ledger.space.taken()) == {live.extent.offset for live in lane._ledger.live.values()}
    raise AssertionError


@pytest.mark.parametrize("what", INTERRUPTED)
def test_a_signal_handler_that_raises_anywhere(what: str) -> None:
    """The lane has ended with its books, or nothing is lost: no copy without a share or a ticket (2)."""
    ended, unharmed = run(interrupted_everywhere, what)
    if what == "close":
        assert (ended, unharmed) == (0, 2)
    else:
        assert ended > 10 and unharmed > 10


# --- every kind of tensor -----------------------------------------------------------------------------------


def _base(shape: tuple[int, ...]) -> Tensor:
    return random(shape, torch.complex64, seed=len(shape))


KINDS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "requires grad": lambda shape: torch.ones(shape).requires_grad_(),
    "not a leaf": lambda shape: torch.ones(shape, requires_grad=True) * 2,
    "parameter": lambda shape: torch.nn.Parameter(torch.full(shape, 3.0)),
    "buffer": lambda shape: torch.nn.Buffer(torch.full(shape, 3.0)),
    "conjugate": lambda shape: _base(shape).conj(),
    "negative": lambda shape: _base(shape).conj().imag,
    "conjugate and transposed": lambda shape: _base(shape).mH,
    "imaginary part": lambda shape: _base(shape).imag,
    "transposed": lambda shape: _base(shape).T,
    "every other": lambda shape: _base((shape[0] * 2, shape[1]))[::2],
    "every other column": lambda shape: _base((shape[0], shape[1] * 2))[:, 1::2],
    "flipped": lambda shape: _base(shape).flip(0),
    "channels last": lambda shape: _base((2, 3, *shape)).contiguous(memory_format=torch.channels_last),
    "expanded": lambda shape: _base((shape[0], 1)).expand(shape),
    "expanded from one": lambda shape: torch.tensor(3.5).expand(shape),
    "overlapping": lambda shape: _base((shape[0] + shape[1],)).unfold(0, shape[1], 1),
    "offset": lambda shape: _base((shape[0] + 1, shape[1]))[1:],
    "odd offset": lambda shape: random((shape[0] * shape[1] * 4 + 1,))[1:],
    "from numpy": lambda shape: torch.from_numpy(numpy.ones(shape)),
    "in shared memory": lambda shape: torch.ones(shape).share_memory_(),  # type: ignore[no-untyped-call]
    "inference": lambda shape: _inferred(shape),
}


def _inferred(shape: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        return torch.full(shape, 2.0)


@pytest.mark.parametrize(
    "surroundings", [nullcontext, torch.no_grad, torch.inference_mode], ids=["", "no grad", "inf"]
)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_dense_tensor_arrives(
    large: Together,
    kind: Callable[[tuple[int, ...]], Tensor],
    shape: tuple[int, ...],
    surroundings: Callable[[], AbstractContextManager[Any]],
) -> None:
    tensor = kind(shape)
    wanted = plain(tensor).clone()
    with surroundings(), large.lane.share(uses=3) as share:
        tickets = [large.put(tensor), large.put(tensor, share=share), large.put(tensor, share=share)]
        for ticket in tickets:
            taken = large.reader.take(ticket)
            assert type(taken) is Tensor and taken.is_contiguous() and not taken.requires_grad
            assert not taken.is_conj() and not taken.is_neg()
            assert (taken.dtype, taken.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(plain(taken), wanted)
    del taken
    assert large.nothing_is_out()
    assert torch.equal(plain(tensor), wanted)  # the source is as it was


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), LARGE], ids=str)
def test_the_default_device_and_dtype_do_not_matter(pair: Together, device: str, shape: tuple[int, ...]) -> None:
    """Engines set them while they load models."""
    tensor = random(shape, torch.float32)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            taken = pair.reader.take(pair.put(tensor))
    finally:
        torch.set_default_dtype(dtype)
    assert taken.device.type == "cpu" and same(taken, tensor)


class Subclass(Tensor):
    """A tensor that may mean more than its bytes."""


def _without_memory() -> Tensor:
    tensor = torch.zeros(8)
    tensor.untyped_storage().resize_(0)  # as sharded training does it
    return tensor


def _within(transform: Callable[[Callable[[Tensor], Any]], Callable[..., Any]], tensor: Tensor) -> Tensor:
    """What a function sees within one of torch's transformations."""
    seen: list[Tensor] = []

    def function(inner: Tensor) -> Tensor:
        seen.append(inner)
        return inner.sum()

    transform(function)(tensor)
    return seen[0]


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "sparse csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "mkldnn"),
    "meta": (lambda: torch.zeros(3, device="meta"), "meta"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8), "qint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "dense"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        "NestedTensor",
    ),
    "packed bits": (lambda: torch.zeros(3, dtype=torch.uint8).view(vars(torch)["uint4"]), "uint4"),
    "subclass": (lambda: torch.zeros(3).as_subclass(Subclass), "Subclass"),
    "subclass of parameter": (lambda: torch.nn.UninitializedParameter(), "UninitializedParameter"),
    "more dimensions than a ticket can say": (lambda: torch.zeros((1,) * 256), "256 dimensions"),
    "memory that was freed": (_without_memory, "memory"),
    "zeros without memory": (lambda: torch._efficientzerotensor((3,)), "memory"),
    "within vmap": (lambda: _within(torch.vmap, torch.zeros(2, 3)), "memory"),
    "within grad": (lambda: _within(torch.func.grad, torch.zeros(3)), "memory"),
    "within functionalize": (lambda: _within(torch.func.functionalize, torch.zeros(3)), "memory"),
    "none": (lambda: None, "NoneType"),
    "a number": (lambda: 5, "int"),
    "bytes": (lambda: b"abc", "bytes"),
    "a list": (lambda: [torch.zeros(3)], "list"),
    "an array": (lambda: numpy.zeros(3), "ndarray"),
    "a storage": (lambda: torch.zeros(3).untyped_storage(), "UntypedStorage"),
    "a type": (lambda: Tensor, "_TensorMeta"),
}


@pytest.mark.parametrize(("made", "says"), UNSUPPORTED.values(), ids=UNSUPPORTED)
@pytest.mark.parametrize("uses", [0, 1, 2])
def test_what_is_not_plain_is_refused(pair: Together, made: Callable[[], Any], says: str, uses: int) -> None:
    share = pair.lane.share(uses) if uses else None
    refused = pair.refused(made(), share=share)
    assert refused.cause == "unsupported" and says in refused.detail
    assert share is None or uses_left(share) == uses - 1
    assert same(pair.reader.take(pair.put(random((5,)))), random((5,)))


# --- anything -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Copy:
    """A copy in the lane as it has to be."""

    content: Tensor
    tickets: int = 0
    shared: bool = False


@dataclass(eq=False)
class Sharing:
    """A share as it has to be. first: its first copy, held or not any more."""

    share: Share
    tensor: Tensor
    uses: int
    copy: Copy | None = None


class Shares(RuleBasedStateMachine):
    """Tensors that are written to, put and shared in any order, beside copies of what tickets have to read."""

    def __init__(self) -> None:
        super().__init__()
        self.scope = together(capacity=32 * PAGE, segment=2 * PAGE)
        self.pair = self.scope.__enter__()
        self.tensors: list[Tensor] = []
        self.shares: list[Sharing] = []
        self.out: list[tuple[bytes, Copy]] = []
        self.taken: list[tuple[Tensor, Copy]] = []
        self.puts = self.shared = self.refused = 0

    def one(self, data: st.DataObject, many: list[Any]) -> Any:
        return many[data.draw(st.sampled_from(range(len(many))), "which")]

    # --- tensors and shares --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.tensors) < 4)
    @rule(pages=st.integers(0, 3), seed=st.integers(0, 9))
    def make(self, pages: int, seed: int) -> None:
        self.tensors.append(random((pages * PAGE + 8,), seed=seed))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), how=st.integers(0, 2), by=st.integers(1, 255))
    def write(self, data: st.DataObject, how: int, by: int) -> None:
        tensor = self.one(data, self.tensors)
        [lambda: tensor.add_(by), lambda: tensor.data.add_(by), lambda: tensor.numpy().__iadd__(by)][how]()

    @precondition(lambda self: self.tensors and len(self.shares) < 5)
    @rule(data=st.data(), uses=st.integers(1, 4))
    def share(self, data: st.DataObject, uses: int) -> None:
        self.shares.append(Sharing(self.pair.lane.share(uses), self.one(data, self.tensors), uses))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def drop_a_tensor(self, data: st.DataObject) -> None:
        tensor = self.one(data, self.tensors)
        self.tensors = [other for other in self.tensors if other is not tensor]

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        sharing = self.one(data, self.shares)
        sharing.share.close()
        self.end(sharing)

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def drop_a_share(self, data: st.DataObject) -> None:
        sharing = self.one(data, self.shares)
        self.shares.remove(sharing)
        self.end(sharing)
        del sharing.share

    def end(self, sharing: Sharing) -> None:
        sharing.uses = 0
        if sharing.copy is not None:
            sharing.copy.shared = False
            sharing.copy = None

    # --- puts ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        self.copied(self.one(data, self.tensors), None)

    @precondition(lambda self: self.shares)
    @rule(data=st.data(), times=st.integers(1, 5))
    def put_with_a_share(self, data: st.DataObject, times: int) -> None:
        sharing = self.one(data, self.shares)
        for _ in range(times):
            if sharing.copy is None:
                copy = self.copied(sharing.tensor, sharing.share)
                if copy is not None and sharing.uses > 1:
                    sharing.copy, copy.shared = copy, True
            else:
                ticket = self.pair.put(sharing.tensor, share=sharing.share)
                self.issued(ticket, sharing.copy)
                self.shared += 1
            sharing.uses -= 1
            if sharing.uses < 1:
                self.end(sharing)

    @precondition(lambda self: any(sharing.copy for sharing in self.shares))
    @rule(data=st.data())
    def put_another_with_a_share(self, data: st.DataObject) -> None:
        sharing = self.one(data, [sharing for sharing in self.shares if sharing.copy])
        with pytest.raises(ValueError, match="a share for"):
            self.pair.lane.put(sharing.tensor[1:], share=sharing.share)

    def copied(self, tensor: Tensor, share: Share | None) -> Copy | None:
        ticket = self.pair.lane.put(tensor, share=share)
        if isinstance(ticket, Refused):
            self.refused += 1
            assert ticket.cause == "full" and self.copies()
            return None
        self.issued(ticket, copy := Copy(tensor.clone()))
        return copy

    def issued(self, ticket: bytes, copy: Copy) -> None:
        self.puts += 1
        copy.tickets += 1
        self.out.append((ticket, copy))

    # --- tickets -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.out)
    @rule(data=st.data(), fate=st.sampled_from(["take", "take", "discard", "withdraw"]))
    def end_a_ticket(self, data: st.DataObject, fate: str) -> None:
        ticket, copy = self.out.pop(data.draw(st.sampled_from(range(len(self.out))), "ticket"))
        if fate == "take":
            self.taken.append((self.pair.reader.take(ticket), copy))
            return
        copy.tickets -= 1
        if fate == "discard":
            self.pair.reader.discard(ticket)
        else:
            self.pair.lane.withdraw(ticket)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        _, copy = self.taken.pop(data.draw(st.sampled_from(range(len(self.taken))), "tensor"))
        copy.tickets -= 1

    # --- always --------------------------------------------------------------------------------------------

    def copies(self) -> set[Copy]:
        """Those that may not be freed."""
        found = {copy for _, copy in (*self.out, *self.taken)}
        return found | {sharing.copy for sharing in self.shares if sharing.copy is not None}

    @invariant()
    def what_is_held_is_what_was_put(self) -> None:
        assert all(same(tensor, copy.content) for tensor, copy in self.taken)

    @invariant()
    def memory_is_taken_exactly_as_long_as_a_ticket_or_a_share_refers_to_it(self) -> None:
        stats, copies = self.pair.lane.stats(), self.copies()
        assert all(copy.tickets or copy.shared for copy in copies)
        pages = sum(-(-copy.content.numel() // PAGE) for copy in copies)
        assert held(stats) == (len(self.out) + len(self.taken), len(copies), pages)
        assert (stats.puts, stats.shared, stats.refused.get("full", 0)) == (self.puts, self.shared, self.refused)
        assert stats.strays == stats.orphans == 0

    def teardown(self) -> None:
        for ticket, copy in self.out:
            assert same(self.pair.reader.take(ticket), copy.content)
        self.out.clear()
        self.taken.clear()
        self.shares.clear()
        assert held(self.pair.lane.stats()) == (0, 0, 0)
        self.scope.__exit__(None, None, None)


Shares.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestShares = Shares.TestCase
