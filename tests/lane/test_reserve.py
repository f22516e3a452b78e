"""Room in a lane that others fill: from a socket, in pieces, published as they come; or given up.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlane.lane import Lane, LaneError, Mode, Refused, Reservation, failpoints
from mmlane.lane.issuing import SLOTS
from tests.effort import examples
from tests.lane.harness import kernel
from tests.lane.harness.child import run
from tests.lane.harness.lane_with_readers import PAGE, SEGMENT, LaneWithReaders, held, lane_with_readers, offset
from tests.lane.harness.payloads import MODES, plain, random, same
from tests.lane.harness.waiting import DEADLINE, eventually, in_a_thread, in_threads


def reserve(lane: Lane, *shape: int, dtype: torch.dtype = torch.uint8) -> Reservation:
    """Room; a refusal is a failure."""
    room = lane.reserve(shape, dtype)
    assert isinstance(room, Reservation), room
    return room


def publish(room: Reservation, part: Tensor | None = None) -> bytes:
    """A ticket; a refusal is a failure."""
    ticket = room.publish(part)
    assert isinstance(ticket, bytes), ticket
    return ticket


def buffer(tensor: Tensor) -> memoryview:
    """A tensor's bytes, for who knows nothing of tensors."""
    array: Any = tensor.numpy()
    return memoryview(array)


# --- filled and published ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 1000), torch.float32), ((), torch.int64), ((5,), torch.bfloat16), ((2, SEGMENT), torch.uint8)],
    ids=str,
)
def test_room_that_is_filled_and_published_whole(
    wide: LaneWithReaders, shape: tuple[int, ...], dtype: torch.dtype, mode: Mode
) -> None:
    room = reserve(wide.lane, *shape, dtype=dtype)
    assert (room.tensor.dtype, room.tensor.shape, room.tensor.device.type) == (dtype, shape, "cpu")
    assert room.tensor.is_contiguous() and room.tensor.data_ptr() % PAGE == 0
    wanted = random(shape, dtype)
    room.tensor.copy_(wanted)
    taken = wide.reader.take(publish(room), mode)
    assert same(taken, wanted)
    stats = wide.lane.stats()
    assert (stats.puts, stats.copied_bytes, stats.extents) == (1, 0, 1)
    room.close()
    del taken
    assert wide.nothing_is_out()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (1 << 40, 0)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_room_for_no_elements(wide: LaneWithReaders, shape: tuple[int, ...], mode: Mode) -> None:
    room = reserve(wide.lane, *shape, dtype=torch.float32)
    first, second = publish(room), publish(room, room.tensor[:0])
    taken = wide.reader.take(first, mode)
    assert (taken.dtype, taken.shape) == (torch.float32, shape)
    assert wide.reader.take(second, mode).numel() == 0
    room.close()
    assert wide.nothing_is_out()


def test_an_empty_part_of_room_that_is_not_empty(wide: LaneWithReaders) -> None:
    room = reserve(wide.lane, 100)
    ticket = publish(room, room.tensor[50:50])
    assert wide.reader.take(ticket).shape == (0,)
    room.tensor.fill_(1)  # nothing was published
    assert int(wide.reader.take(publish(room)).sum()) == 100


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda tensor: tensor,
    "first byte": lambda tensor: tensor[:1],
    "last byte": lambda tensor: tensor[-1:],
    "unaligned": lambda tensor: tensor[4097 : 4097 + 5001],
    "over segments": lambda tensor: tensor[SEGMENT - 3 : 2 * SEGMENT + 3],
    "other shape": lambda tensor: tensor[6:306].view(3, 10, 10),
    "other dtype": lambda tensor: tensor[2048:6144].view(torch.float32),
    "other dtype, not at a multiple of a page": lambda tensor: tensor[24:64].view(torch.int64),
    "wider dtype and another shape": lambda tensor: tensor[64:320].view(torch.complex64).view(4, 8),
    "element": lambda tensor: tensor[77],
    "detached": lambda tensor: tensor[1:8].detach(),
    "row": lambda tensor: tensor[:1000].view(10, 100)[7],
    "through numpy": lambda tensor: torch.from_numpy(tensor.numpy()[5:500]),
    "parameter": lambda tensor: torch.nn.Parameter(tensor[40:80].view(torch.float32)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_is_a_ticket_of_its_own(
    wide: LaneWithReaders, part: Callable[[Tensor], Tensor], mode: Mode
) -> None:
    with reserve(wide.lane, 3 * SEGMENT) as room:
        room.tensor.copy_(random((3 * SEGMENT,)))
        room.tensor[40:80] = 0  # of a parameter, no NaN
        piece = part(room.tensor)
        ticket, again = publish(room, piece), publish(room, piece)
        assert offset(again) == offset(ticket) and again != ticket
        taken = wide.reader.take(ticket, mode)
        assert (taken.dtype, taken.shape) == (piece.dtype, piece.shape)
        assert torch.equal(plain(taken), plain(piece))
        assert same(wide.reader.take(again, mode), taken)
        del piece, taken
    assert wide.nothing_is_out()


BYTES = st.integers(0, 20_000)


@settings(max_examples=examples(100, 1000))
@given(st.lists(st.tuples(BYTES, BYTES, st.sampled_from(MODES)), min_size=1, max_size=12))
def test_any_ranges_at_once_in_any_modes(large: LaneWithReaders, ranges: list[tuple[int, int, Mode]]) -> None:
    """Overlapping ones, too: each is its own ticket, and what one reader writes no other process sees (6)."""
    wanted = random((20_000,))
    with reserve(large.lane, 20_000) as room:
        room.tensor.copy_(wanted)
        spans = [(min(one, other), max(one, other), mode) for one, other, mode in ranges]
        tickets = [publish(room, room.tensor[begin:end]) for begin, end, _ in spans]
    del room
    taken = []
    for (begin, end, mode), ticket in zip(spans, tickets, strict=True):
        tensor = large.reader.take(ticket, mode)
        assert same(tensor, wanted[begin:end]), (begin, end, mode)
        taken.append((tensor, mode, begin, end))
        if mode != "view":
            tensor.fill_(7)
    for tensor, mode, begin, end in taken:
        assert same(tensor, wanted[begin:end]) if mode == "view" else bool((tensor == 7).all())
    del tensor
    taken.clear()
    assert held(large.lane.stats()) == (0, 0, 0)


def test_room_filled_from_a_socket_whose_parts_are_taken_while_the_rest_arrives(wide: LaneWithReaders) -> None:
    """Part by part: the sender does not send the next before the one before was taken."""
    sizes = [1, 4095, PAGE, 70_001, 3, SEGMENT, 12_345]
    total = sum(sizes)
    wanted = random((total,))
    ours, theirs = socket.socketpair()
    taken_one = threading.Semaphore(1)

    def send() -> None:
        at = 0
        for size in sizes:
            assert taken_one.acquire(timeout=DEADLINE)
            theirs.sendall(buffer(wanted[at : at + size]))
            at += size

    held_parts: list[tuple[Tensor, int, int]] = []
    with ours, theirs, in_a_thread(send):
        ours.settimeout(DEADLINE)
        with reserve(wide.lane, total) as room:
            room.tensor.fill_(255)
            memory, at = buffer(room.tensor), 0
            for number, size in enumerate(sizes):
                missing = memory[at : at + size]
                while missing:
                    missing = missing[ours.recv_into(missing) :]
                part = wide.reader.take(publish(room, room.tensor[at : at + size]), MODES[number % 3])
                assert same(part, wanted[at : at + size])
                held_parts.append((part, at, size))
                at += size
                taken_one.release()
            assert torch.equal(room.tensor, wanted)
        assert all(same(part, wanted[at : at + size]) for part, at, size in held_parts)
        stats = wide.lane.stats()
        views = [part for number, (part, _, _) in enumerate(held_parts) if MODES[number % 3] != "clone"]
        assert (stats.tickets, stats.extents, stats.copied_bytes) == (len(views), 1, 0)
        del memory, missing, room, part, views
        held_parts.clear()
    assert wide.nothing_is_out()


def test_every_reader_gets_what_was_published() -> None:
    with lane_with_readers(readers=3) as pair:
        with reserve(pair.lane, 1000, dtype=torch.int32) as room:
            room.tensor.copy_(torch.arange(1000))
            tickets = [publish(room, room.tensor[number::1][:10]) for number in range(5)]
            for number, ticket in enumerate(tickets):
                for reader, mode in zip(pair.readers, MODES, strict=True):
                    taken = reader.take(ticket, mode)
                    assert taken.tolist() == list(range(number, number + 10))
            del taken
        del room
        assert pair.nothing_is_out()


def test_a_put_does_not_go_where_room_is_reserved(wide: LaneWithReaders) -> None:
    """(6)"""
    rooms = [reserve(wide.lane, 3 * PAGE) for _ in range(4)]
    for number, room in enumerate(rooms):
        room.tensor.fill_(number)
    for seed in range(40):
        assert same(wide.reader.take(wide.put(random((5 * PAGE,), seed=seed))), random((5 * PAGE,), seed=seed))
    for number, room in enumerate(rooms):
        assert bool((wide.reader.take(publish(room)) == number).all())


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_does_not_matter(wide: LaneWithReaders, default: str) -> None:
    with torch.device(default):
        rooms = [reserve(wide.lane, *shape, dtype=torch.float32) for shape in ((0, 3), (2, 3))]
        tickets = [publish(room) for room in rooms]
    for room, ticket in zip(rooms, tickets, strict=True):
        assert room.tensor.device.type == "cpu" and same(wide.reader.take(ticket), room.tensor)


@pytest.mark.parametrize("surroundings", [nullcontext, torch.no_grad, torch.inference_mode])
def test_room_reserved_in_any_mode_of_torch(
    wide: LaneWithReaders, surroundings: Callable[[], AbstractContextManager[Any]]
) -> None:
    with surroundings():
        room = reserve(wide.lane, 10, dtype=torch.float32)
        room.tensor.fill_(2)
        tickets = [publish(room), publish(room, room.tensor[3:])]
    assert [float(wide.reader.take(ticket).sum()) for ticket in tickets] == [20, 14]
    with surroundings():
        room.close()


def test_what_is_published_is_drained_like_what_is_put(wide: LaneWithReaders) -> None:
    """A producer that only publishes does not run out of tickets, and readers' sockets do not run full."""
    with reserve(wide.lane, 10) as room:
        for _ in range(100):
            wide.reader.take(publish(room))
        assert len(wide.lane._issuer.tickets.live) <= 17


def test_without_any_ticket_left_a_part_is_refused_until_one_ends(wide: LaneWithReaders) -> None:
    with reserve(wide.lane, 10) as room:
        room.tensor.copy_(random((10,)))
        tickets = [publish(room, room.tensor[number % 10 :]) for number in range(SLOTS)]
        refused = room.publish()
        assert isinstance(refused, Refused) and refused.cause == "full" and f"{SLOTS} tickets" in refused.detail
        assert same(wide.reader.take(tickets.pop()), random((10,))[(SLOTS - 1) % 10 :])
        tickets.append(publish(room))
        assert same(wide.reader.take(tickets.pop()), random((10,)))
        for ticket in tickets:
            wide.lane.withdraw(ticket)
    del room
    assert wide.nothing_is_out()


# --- what cannot be published ------------------------------------------------------------------------------


def at(address: int, nbytes: int) -> Tensor:
    """Bytes that are somewhere."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


NOT_PARTS: dict[str, Callable[[Tensor], Any]] = {
    "every other": lambda tensor: tensor[::2],
    "columns": lambda tensor: tensor.view(10, 10)[:, :5],
    "transposed": lambda tensor: tensor.view(10, 10).T,
    "expanded": lambda tensor: tensor[:1].expand(5),
    "another tensor": lambda tensor: torch.zeros(5),
    "a copy": lambda tensor: tensor[:5].clone(),
    "one byte more": lambda tensor: at(tensor.data_ptr() + 95, 6),
    "one byte before": lambda tensor: at(tensor.data_ptr() - 1, 6),
    "conjugate": lambda tensor: tensor[:96].view(torch.complex64).conj(),
    "negative": lambda tensor: tensor[:96].view(torch.complex64).conj().imag[:1],
    "sparse": lambda tensor: tensor.view(10, 10).to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "not a tensor": lambda tensor: tensor.numpy(),
    "nothing of the kind": lambda tensor: b"abc",
}


@pytest.mark.parametrize("made", NOT_PARTS.values(), ids=NOT_PARTS)
def test_what_is_no_contiguous_part_is_an_error(wide: LaneWithReaders, made: Callable[[Tensor], Any]) -> None:
    room = reserve(wide.lane, 100)
    before = wide.figures()
    with pytest.raises(ValueError, match=r"contiguous part|travel by lane"):
        room.publish(made(room.tensor))
    assert wide.figures() == before and wide.lane.is_open
    room.close()


def test_a_part_of_other_room_is_an_error(wide: LaneWithReaders) -> None:
    """Before and behind, in this lane and in another."""
    one, two = reserve(wide.lane, 100), reserve(wide.lane, 100)
    with lane_with_readers() as other:
        third = reserve(other.lane, 100)
        for room, part in ((one, two.tensor), (two, one.tensor), (one, third.tensor[3:5]), (third, one.tensor)):
            with pytest.raises(ValueError, match="not a contiguous part of what was reserved"):
                room.publish(part)
        del room, part, third
    for room in (one, two):
        room.close()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((-1,), torch.uint8), ((2, -3), torch.float32), ((1,) * 256, torch.uint8), ((3,), torch.qint8)],
    ids=str,
)
def test_what_is_no_tensor_for_a_lane_is_an_error(
    wide: LaneWithReaders, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match="no tensor that travels by lane"):
        wide.lane.reserve(shape, dtype)
    assert wide.nothing_is_out()


# --- given up ----------------------------------------------------------------------------------------------


def by_closing(rooms: list[Reservation]) -> None:
    rooms[0].close()
    rooms[0].close()  # once more is nothing


def by_leaving(rooms: list[Reservation]) -> None:
    with rooms[0]:
        pass


def by_an_error(rooms: list[Reservation]) -> None:
    with pytest.raises(KeyError), rooms[0]:
        raise KeyError


def by_dropping(rooms: list[Reservation]) -> None:
    rooms.clear()


def by_dropping_in_a_cycle(rooms: list[Reservation]) -> None:
    cycle: list[Any] = [rooms.pop()]
    cycle.append(cycle)
    del cycle
    gc.collect()


ENDS = [by_closing, by_leaving, by_an_error, by_dropping, by_dropping_in_a_cycle]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("shape", [(3 * PAGE,), (0,)], ids=str)
def test_room_that_is_given_up_is_free_at_once(
    wide: LaneWithReaders, end: Callable[[list[Reservation]], None], shape: tuple[int, ...]
) -> None:
    rooms = [reserve(wide.lane, *shape)]
    assert held(wide.lane.stats())[:2] == (0, 1)
    end(rooms)
    assert wide.nothing_is_out()


ALIASES: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "slice": lambda tensor: tensor[5:6],
    "array": lambda tensor: tensor.numpy()[3:],
    "memoryview": lambda tensor: buffer(tensor)[7:],
    "storage": lambda tensor: tensor.untyped_storage(),
    "of another dtype": lambda tensor: tensor.view(torch.int16),
    "array from dlpack": lambda tensor: numpy.from_dlpack(tensor),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("first", ["alias", "ticket"])
def test_room_is_free_when_no_alias_lives_and_no_ticket_is_out(
    wide: LaneWithReaders, end: Callable[[list[Reservation]], None], alias: Callable[[Tensor], object], first: str
) -> None:
    """(2) A thread that fills it may still do so."""
    rooms = [reserve(wide.lane, 2 * PAGE)]
    rooms[0].tensor.fill_(1)
    aliases = [alias(rooms[0].tensor)]
    ticket = publish(rooms[0], rooms[0].tensor[100:200])
    end(rooms)
    assert held(wide.lane.stats()) == (1, 1, 2)
    if first == "alias":
        aliases.clear()
        assert held(wide.lane.stats()) == (1, 1, 2)
        assert int(wide.reader.take(ticket).sum()) == 100
    else:
        assert int(wide.reader.take(ticket).sum()) == 100
        assert held(wide.lane.stats()) == (0, 1, 2)
        for seed in range(30):
            wide.reader.take(wide.put(random((2 * PAGE,), seed=seed)))
        if isinstance(aliases[0], Tensor):
            assert int(aliases[0].view(torch.uint8)[0]) == 1
        aliases.clear()
    assert wide.nothing_is_out()


def test_the_room_a_closed_reservation_leaves_can_be_had_at_once() -> None:
    with lane_with_readers() as pair:
        for _ in range(50):
            with reserve(pair.lane, 16 * SEGMENT):
                assert pair.refused(random((1,))).cause == "full"
        assert pair.lane.stats().fallbacks == {"full": 50}


def test_after_its_end_a_reservation_has_no_tensor_and_publishes_nothing(wide: LaneWithReaders) -> None:
    room = reserve(wide.lane, 10)
    part = room.tensor[:5]
    room.close()
    for use in (lambda: room.tensor, room.publish, lambda: room.publish(part)):
        with pytest.raises(LaneError, match="reservation is closed"):
            use()
    assert wide.lane.stats().puts == 0


def test_a_reservation_keeps_no_lane_alive() -> None:
    """Nor does a lane keep a reservation."""
    lane = Lane({"tp": 1}, capacity=SEGMENT, segment=SEGMENT)
    alive = weakref.ref(lane)
    assert isinstance(lane.reserve((1,), torch.uint8), Refused)
    lane.close()
    del lane
    gc.collect()
    assert alive() is None


# --- written to after it was published ---------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor], object]] = {
    "fill": lambda tensor: tensor.fill_(3),
    "a byte": lambda tensor: tensor[7:8].add_(1),
    "copy": lambda tensor: tensor.copy_(torch.zeros(100, dtype=torch.uint8)),
    "through a view of another dtype": lambda tensor: tensor.view(torch.int32)[3].zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("parts", [[(0, 100)], [(0, 50), (50, 100)], [(60, 100), (0, 30), (20, 70)]], ids=str)
@pytest.mark.parametrize("use", ["publish", "publish a part", "close", "with"])
def test_a_write_after_everything_was_published_is_an_error(
    wide: LaneWithReaders, write: Callable[[Tensor], object], parts: list[tuple[int, int]], use: str
) -> None:
    room = reserve(wide.lane, 100)
    for begin, end in parts:
        room.tensor[begin:end] = 5  # before it is published
        wide.reader.take(publish(room, room.tensor[begin:end]))
    assert room.tensor.numpy().sum() == 500
    write(room.tensor)
    with pytest.raises(LaneError, match="written to after it was published"):
        if use == "publish":
            room.publish()
        elif use == "publish a part":
            room.publish(room.tensor[:3])
        elif use == "close":
            room.close()
        else:
            with room:
                pass
    if use in ("close", "with"):  # it is closed all the same
        assert wide.nothing_is_out()
        return
    with pytest.raises(LaneError):
        room.close()
    assert wide.nothing_is_out() and wide.lane.is_open


def test_what_is_not_published_yet_can_be_written_to(wide: LaneWithReaders) -> None:
    with reserve(wide.lane, 100) as room:
        room.tensor.zero_()
        publish(room, room.tensor[:99])
        room.tensor[99:].fill_(9)
        publish(room, room.tensor[:99])
        room.tensor[99:].fill_(8)
        last = publish(room, room.tensor[99:])
        assert int(wide.reader.take(last)[0]) == 8
        for live in list(wide.lane._issuer.tickets.live.values()):
            wide.lane._issuer.withdrawn.append((live.slot, live.serial))


# --- refused -----------------------------------------------------------------------------------------------


def refused(lane: Lane, nbytes: int) -> Refused:
    """A refusal that is counted."""
    before = lane.stats()
    answer = lane.reserve((nbytes,), torch.uint8)
    assert isinstance(answer, Refused)
    after = lane.stats()
    assert after.fallbacks.get(answer.cause, 0) == before.fallbacks.get(answer.cause, 0) + 1
    assert held(after) == held(before)
    return answer


def test_room_in_a_lane_that_is_full(pair: LaneWithReaders) -> None:
    room = reserve(pair.lane, 15 * SEGMENT)
    answer = refused(pair.lane, SEGMENT + 1)
    assert answer.cause == "full" and f"{SEGMENT + 1} bytes" in answer.detail
    room.close()
    reserve(pair.lane, 16 * SEGMENT).close()


def test_room_that_is_larger_than_the_lane(pair: LaneWithReaders) -> None:
    answer = refused(pair.lane, 16 * SEGMENT + 1)
    assert answer.cause == "oversize" and str(16 * SEGMENT + 1) in answer.detail
    assert refused(pair.lane, 1 << 60).cause == "oversize"


def test_room_for_which_there_is_no_memory(pair: LaneWithReaders, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    memory = pair.lane._committer.memory
    assert memory is not None
    with monkeypatch.context() as patch:
        patch.setattr(memory.backing, "grant", fail)
        answer = refused(pair.lane, SEGMENT)
    assert answer.cause == "full" and "no memory for" in answer.detail
    reserve(pair.lane, SEGMENT).close()


def test_room_in_a_lane_that_is_not_open(lane: Lane) -> None:
    answer = refused(lane, 10)
    assert answer.cause == "not_open" and "reader 0 of 'tp'" in answer.detail


def test_a_lane_that_is_off_gives_no_room_and_publishes_nothing_until_it_is_on(wide: LaneWithReaders) -> None:
    room = reserve(wide.lane, 10)
    room.tensor.fill_(3)
    wide.lane.switch(off=True)
    assert refused(wide.lane, 10).cause == "off"
    answer = room.publish()
    assert isinstance(answer, Refused) and answer.cause == "off"
    room.tensor.fill_(4)  # it was not published
    wide.lane.switch(off=False)
    assert wide.reader.take(publish(room)).tolist() == [4] * 10
    room.close()


@pytest.mark.parametrize("how", ["lane", "reader"])
def test_a_lane_that_ends_while_room_is_filled(how: str) -> None:
    """The tensor stays memory that can be written to, as long as a reference to it is left; then it goes."""
    with lane_with_readers(readers=2) as pair:
        room = reserve(pair.lane, 3 * SEGMENT)
        room.tensor[:SEGMENT] = 1
        ticket = publish(room, room.tensor[:SEGMENT])
        file = kernel.lane_files(os.getpid())
        if how == "lane":
            pair.lane.close()
        else:
            pair.readers[1].close()
            eventually(lambda: pair.lane.is_closed, "the producer hears of it")
            pair.lane.close()
        room.tensor[SEGMENT:] = 2
        assert int(room.tensor.sum()) == 5 * SEGMENT
        answer = room.publish()
        assert isinstance(answer, Refused) and answer.cause == "closed"
        assert refused_when_closed(pair.lane).cause == "closed"
        assert int(pair.reader.take(ticket).sum()) == SEGMENT  # what was issued can be taken
        tensor = room.tensor
        room.close()
        tensor.fill_(3)
        assert int(tensor.sum()) == 9 * SEGMENT
        for reader in pair.readers:
            reader.close()
        assert file and kernel.lane_files(os.getpid()) >= file
        del tensor, room
    # `lane_with_readers` looks whether the memory is gone


def refused_when_closed(lane: Lane) -> Refused:
    answer = lane.reserve((10,), torch.uint8)
    assert isinstance(answer, Refused)
    return answer


@pytest.mark.parametrize("error", [RuntimeError("other"), KeyboardInterrupt(), TimeoutError("a signal handler's")])
def test_an_error_while_room_is_reserved_leaves_nothing_behind(
    wide: LaneWithReaders, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def probe(name: str) -> None:
        if name == "commit.populated" and threading.current_thread() is threading.main_thread():
            raise error

    monkeypatch.setattr(failpoints, "probe", probe)
    with pytest.raises(type(error)):
        wide.lane.reserve((3 * SEGMENT,), torch.uint8)
    monkeypatch.setattr(failpoints, "probe", None)
    error.__traceback__ = None  # whose frames have what it had
    gc.collect()  # so may what pytest keeps of it
    assert wide.nothing_is_out()
    reserve(wide.lane, 64 * SEGMENT).close()


# --- threads and forks -------------------------------------------------------------------------------------


def fill_and_publish(pair: LaneWithReaders, room: Reservation, row: int) -> None:
    """A row of a tensor, in pieces."""
    for begin in range(0, 50_000, 5_000):
        part = room.tensor[row, begin : begin + 5_000]
        part.numpy().fill(row + begin // 5_000)
        taken = pair.reader.take(publish(room, part), MODES[row % 3])
        assert bool((taken == row + begin // 5_000).all())


def test_parts_that_several_threads_fill_and_publish(wide: LaneWithReaders) -> None:
    with reserve(wide.lane, 4, 50_000) as room:
        in_threads([partial(fill_and_publish, wide, room, row) for row in range(4)])
    del room
    wide.wait_until_nothing_is_out()  # of two releases at once the reader's thread sends one


def in_a_forked_child() -> str:
    with lane_with_readers() as pair:
        room = reserve(pair.lane, 2 * PAGE)
        room.tensor.fill_(1)
        child = os.fork()
        if not child:
            status = 1
            try:
                room.tensor[PAGE:].fill_(2)  # a worker that was forked for it fills the room
                room.publish()
            except LaneError:
                tensor = room.tensor
                room.close()
                gc.collect()
                status = 0 if int(tensor.sum()) == 3 * PAGE else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert held(pair.lane.stats()) == (0, 1, 2)
        taken = pair.reader.take(publish(room))
        assert int(taken.sum()) == 3 * PAGE
        room.close()
        del taken
        assert pair.nothing_is_out()
    return "well"


def test_a_forked_child_can_fill_the_room_and_does_nothing_else_to_it() -> None:
    assert run(in_a_forked_child) == "well"


def keep_nothing_in_a_forked_child() -> tuple[int, int]:
    """How many of the lane's files a forked child has, with room reserved and without."""
    counts = []
    with lane_with_readers() as pair:
        rooms = [reserve(pair.lane, PAGE)]
        for _ in range(2):
            ours, theirs = os.pipe()
            child = os.fork()
            if not child:
                # The readers' own mapping is in their hands; what is counted is what can be written to.
                found = [trace for trace in kernel.traces([], kernel.lane_files(os.getpid())) if mine(trace)]
                os.write(theirs, bytes([len(found)]))
                os._exit(0)
            os.waitpid(child, 0)
            counts.append(os.read(ours, 1)[0])
            os.close(ours)
            os.close(theirs)
            rooms.clear()
    return counts[0], counts[1]


def mine(trace: kernel.Trace) -> bool:
    return trace.pid == os.getpid() and trace.kind == "mapping" and " rw-s " in f" {trace.what} "


def test_a_forked_child_has_the_lanes_memory_only_while_room_in_it_is_reserved() -> None:
    assert run(keep_nothing_in_a_forked_child) == (1, 0)
