"""Taking and letting go, in one process: what a tensor is good for, when its ticket goes back, who refuses what.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mmlane.lane import (
    Lane,
    LaneError,
    Mode,
    Reader,
    Refused,
    StaleHere,
    StaleTicket,
    UnknownLane,
    points,
)
from mmlane.lane.reader import _Link
from mmlane.lane.ticket import read
from tests.lane.processes import DEADLINE, eventually
from tests.lane.together import PAGE, SEGMENT, Together, random, same, together

MODES: tuple[Mode, ...] = ("view", "cow", "clone")
SHAPE = (3, 1000)  # of float32: three pages


@pytest.fixture
def pair() -> Iterator[Together]:
    with together() as pair:
        yield pair
        pair.wait_until_nothing_is_out()


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with `pair`, an open lane with two readers; it dies with the tests."""
    start = """
        import gc, sys, threading, torch
        from tests.lane.processes import DEADLINE, die_with_the_parent, eventually
        from tests.lane.together import PAGE, SEGMENT, random, same, together
        die_with_the_parent()
        scope = together(readers=2)
        pair = scope.__enter__()
    """
    path = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


# --- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (0, 4), (5,), SHAPE], ids=str)
def test_every_mode_gives_the_tensor_and_the_ticket_ends_with_it(
    pair: Together, mode: Mode, shape: tuple[int, ...]
) -> None:
    tensor = random(shape, torch.float32)
    taken = pair.reader.take(pair.put(tensor), mode)
    assert same(taken, tensor) and taken.is_contiguous() and not taken.requires_grad
    assert pair.lane.stats().tickets == (0 if mode == "clone" or tensor.numel() == 0 else 1)
    assert taken.data_ptr() != tensor.data_ptr() or tensor.numel() == 0
    del taken
    assert pair.lane.stats().tickets == 0


@pytest.mark.parametrize("mode", ["cow", "clone"])
def test_what_a_reader_writes_is_seen_by_nobody_else(mode: Mode) -> None:
    """(6)"""
    with together(readers=2) as pair:
        tensor = random(SHAPE, torch.float32)
        before = tensor.clone()
        share = pair.lane.share(uses=3)
        first, second, third = (pair.put(tensor, share=share) for _ in range(3))
        view, other = pair.readers[1].take(first), pair.readers[1].take(second, "cow")
        mine = pair.readers[0].take(first, mode)
        mine.fill_(7)
        mine[0, 0] = 8
        assert float(mine.sum()) == 7 * 3000 + 1
        for seen in (view, other, tensor, pair.readers[0].take(second), pair.readers[1].take(third, "clone")):
            assert same(seen, before)
        other.zero_()
        assert same(view, before) and float(mine.sum()) == 7 * 3000 + 1
        assert same(pair.readers[0].take(third), before)
        del view, other, mine, seen


def test_a_page_that_is_not_written_is_not_copied(pair: Together) -> None:
    """The others are the lane's own, as one can see when something is written there."""
    tensor = torch.zeros(3 * PAGE, dtype=torch.uint8)
    ticket = pair.put(tensor)
    content = read(ticket)
    taken = pair.reader.take(ticket, "cow")
    taken[PAGE] = 1
    producer = torch.frombuffer(
        pair.lane._mapping.owner(pair.lane._base + content.offset), dtype=torch.uint8, count=3 * PAGE
    )
    producer.fill_(9)
    assert taken[0] == 9 and taken[2 * PAGE] == 9
    assert taken[PAGE] == 1 and taken[PAGE + 1] == 0
    del taken, producer


def test_writing_to_a_view_ends_the_process() -> None:
    """With a signal rather than with other bytes for everybody (6)."""
    ended = run(
        """
        tensor = random((10,))
        one, two = (reader.take(ticket, "view") for ticket in [pair.put(tensor)] for reader in pair.readers)
        assert same(one, tensor)
        print("read", flush=True)
        one[3] = 1
        print("written", flush=True)
        """
    )
    assert ended.stdout == "read\n" and ended.returncode == -11, (ended.returncode, ended.stderr)


def test_an_unknown_mode_is_an_error_and_the_ticket_can_still_be_taken(pair: Together) -> None:
    tensor = random((5,))
    ticket = pair.put(tensor)
    for mode in ("copy", "", "View", 1):
        with pytest.raises(ValueError, match="one of view, cow, clone"):
            pair.reader.take(ticket, mode)  # type: ignore[arg-type]
    assert same(pair.reader.take(ticket), tensor)


# --- how long a ticket is out -------------------------------------------------------------------------------


class _Holder:
    """Something that a weak reference can be made to."""

    def __init__(self, held: object) -> None:
        self.held = held


ALIASES: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "slice": lambda tensor: tensor[1:2, 5:6],
    "element": lambda tensor: tensor[2, 999],
    "view": lambda tensor: tensor.view(-1),
    "transposed": lambda tensor: tensor.T,
    "detached": lambda tensor: tensor.detach(),
    "data": lambda tensor: tensor.data,
    "alias": lambda tensor: torch.ops.aten.alias(tensor),
    "of another dtype": lambda tensor: tensor.view(torch.int16),
    "view of a view": lambda tensor: tensor[1:].view(torch.uint8)[:, ::3].T[7:],
    "empty slice": lambda tensor: tensor[:0],
    "expanded": lambda tensor: tensor[None].expand(5, *SHAPE),
    "parameter": lambda tensor: torch.nn.Parameter(tensor),
    "chunks": lambda tensor: tensor.unbind(0)[1:2],
    "storage": lambda tensor: tensor.untyped_storage(),
    "typed storage": lambda tensor: tensor.storage(),  # type: ignore[no-untyped-call]
    "set from storage": lambda tensor: torch.empty(0).set_(tensor.untyped_storage()),
    "graph": lambda tensor: (torch.ones(SHAPE, requires_grad=True) * tensor).sum(),
    "array": lambda tensor: tensor.numpy(),
    "part of an array": lambda tensor: tensor.numpy()[1:, ::7].T,
    "tensor of an array": lambda tensor: torch.from_numpy(tensor.numpy()[1:, ::7]),
    "dlpack capsule": lambda tensor: tensor.__dlpack__(),
    "tensor from dlpack": lambda tensor: torch.utils.dlpack.from_dlpack(tensor.__dlpack__())[1:],
    "array from dlpack": lambda tensor: numpy.from_dlpack(tensor)[1:],
    "cell": lambda tensor: lambda: tensor,
    "bound method": lambda tensor: tensor.add_,
    "iterator": lambda tensor: iter(tensor.unbind(0)),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("mode", ["view", "cow"])
@pytest.mark.parametrize("made", ALIASES.values(), ids=ALIASES)
def test_a_ticket_is_out_as_long_as_any_alias_lives(
    pair: Together, made: Callable[[Tensor], object], mode: Mode
) -> None:
    """(2)"""
    tensor = random(SHAPE, torch.float32)
    taken: Any = pair.reader.take(pair.put(tensor), mode)
    held = _Holder(made(taken))
    assert pair.lane.stats().tickets == 1
    del taken
    gc.collect()
    assert pair.lane.stats().tickets == 1
    tensor.add_(1)
    for _ in range(20):  # whatever else happens in the lane
        pair.reader.discard(pair.put(tensor))
    assert pair.lane.stats().tickets == 1
    del held
    assert pair.lane.stats().tickets == 0  # at once: by reference counts, not by the collector
    assert pair.lane.stats().strays == 0


@pytest.mark.parametrize("mode", ["view", "cow"])
def test_an_alias_reads_the_same_bytes_to_the_end(pair: Together, mode: Mode) -> None:
    """(2): the producer goes on filling the lane meanwhile."""
    tensor = random((2 * SEGMENT,))
    taken = pair.reader.take(pair.put(tensor), mode)
    part = taken[SEGMENT:].view(-1, 16).T
    del taken
    for number in range(60):
        ticket = pair.put(torch.full((5 * SEGMENT,), number, dtype=torch.uint8))
        pair.reader.discard(ticket)
        assert same(part, tensor[SEGMENT:].view(-1, 16).T)
    refused = pair.lane.put(torch.zeros(15 * SEGMENT, dtype=torch.uint8))
    assert isinstance(refused, Refused) and refused.cause == "full"
    del part
    pair.reader.discard(pair.put(torch.zeros(16 * SEGMENT, dtype=torch.uint8)))


@pytest.mark.parametrize("mode", ["view", "cow"])
def test_a_tensor_in_a_reference_cycle_goes_back_when_it_is_collected(pair: Together, mode: Mode) -> None:
    gc.disable()
    try:
        cycle: list[Any] = [pair.reader.take(pair.put(random(SHAPE)), mode)]
        cycle.append(cycle)
        del cycle
        assert pair.lane.stats().tickets == 1
        gc.collect()
        assert pair.lane.stats().tickets == 0
    finally:
        gc.enable()


def test_each_ticket_on_one_extent_goes_back_by_itself(pair: Together) -> None:
    tensor = random(SHAPE)
    share = pair.lane.share(uses=5)
    held = [pair.reader.take(pair.put(tensor, share=share)) for _ in range(5)]
    for left in (4, 3, 2, 1, 0):
        del held[left // 2]
        assert pair.lane.stats().tickets == left
        assert all(same(taken, tensor) for taken in held)


def test_a_ticket_is_out_until_every_reader_has_given_it_back() -> None:
    """(2)"""
    with together(readers=3) as pair:
        ticket = pair.put(random(SHAPE))
        held = [reader.take(ticket) for reader in pair.readers[:2]]
        held.pop()
        assert pair.lane.stats().tickets == 1
        pair.readers[2].discard(ticket)
        assert pair.lane.stats().tickets == 1 and same(held[0], random(SHAPE))
        held.pop()
        stats = pair.lane.stats()
        assert (stats.tickets, stats.taken) == (0, 0)


def test_discarding_gives_a_ticket_back_untaken(pair: Together) -> None:
    pair.reader.discard(pair.put(random(SHAPE)))
    stats = pair.lane.stats()
    assert (stats.tickets, stats.taken, stats.orphans) == (0, 0, 0)


# --- tickets that are not out any more ----------------------------------------------------------------------


@pytest.mark.parametrize("use", ["take", "discard"])
@pytest.mark.parametrize(
    "ended", ["held as view", "held as cow", "cloned", "let go", "discarded", "withdrawn", "used again"]
)
def test_a_ticket_that_is_not_out_is_stale(pair: Together, ended: str, use: str) -> None:
    """(5): an error of its own request, which touches nothing."""
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
        pair.reader.discard(ticket)
    if ended == "used again":
        pair.lane.drain()
        again = pair.put(tensor)
        assert (read(again).slot, read(again).offset) == (read(ticket).slot, read(ticket).offset)
    books = pair.books()
    for _ in range(3):
        with pytest.raises(StaleTicket, match=pair.lane.address):
            getattr(pair.reader, use)(ticket)
    assert pair.books() == books
    assert all(same(taken, tensor) for taken in held)
    if ended == "used again":
        assert same(pair.reader.take(again), tensor)


def test_the_give_back_that_is_not_drained_yet_does_not_make_a_ticket_good(pair: Together) -> None:
    """The producer has not heard of it, so its digest is still there."""
    ticket = pair.put(random(SHAPE))
    pair.reader.take(ticket)
    with pytest.raises(StaleTicket):
        pair.reader.take(ticket)


def test_withdrawing_what_was_given_back_does_nothing() -> None:
    with together(readers=2) as pair:
        tensor = random(SHAPE)
        ticket = pair.put(tensor)
        held = pair.readers[1].take(ticket)
        pair.readers[0].discard(ticket)
        pair.lane.drain()
        for _ in range(2):
            pair.lane.withdraw(ticket)
        assert pair.lane.stats().tickets == 1 and same(held, tensor)
        del held
        pair.lane.withdraw(ticket)
        assert pair.lane.stats().tickets == 0


def test_a_withdrawn_ticket_is_free_at_the_next_put(pair: Together) -> None:
    for _ in range(40):
        pair.lane.withdraw(pair.put(torch.zeros(16 * SEGMENT, dtype=torch.uint8)))
    assert pair.lane.stats().orphans == 0


def test_of_many_threads_that_take_one_ticket_one_gets_it(pair: Together) -> None:
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


def in_threads(functions: list[Callable[[], None]]) -> None:
    """Run these at once; an error in one of them is an error here."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert errors == []


# --- the end of a lane, of a reader -------------------------------------------------------------------------


def ended(reader: Reader, lane: Lane) -> bool:
    """Whether a reader has heard that the producer has ended."""
    return lane.address not in reader.lanes()


@pytest.mark.parametrize("mode", MODES)
def test_tickets_on_their_way_can_be_taken_after_the_producer_has_ended(mode: Mode) -> None:
    with together(linger=3600.0) as pair:
        tensor = random(SHAPE)
        first, second, third = (pair.put(tensor) for _ in range(3))
        held = pair.reader.take(first)
        pair.lane.close()
        eventually(lambda: ended(pair.reader, pair.lane), "the reader hears of the end")
        late = pair.reader.take(second, mode)
        assert same(held, tensor) and same(late, tensor)
        pair.reader.discard(third)
        for stale in (first, second, third):
            with pytest.raises(StaleTicket):
                pair.reader.take(stale)
        del held, late


def test_after_lingering_a_lane_is_unknown_and_its_memory_gone_but_for_what_is_held() -> None:
    with together(linger=0.01) as pair:
        tensor = random(SHAPE)
        first, second = pair.put(tensor), pair.put(tensor)
        held = pair.reader.take(first)
        address = held.data_ptr()
        pair.lane.close()
        eventually(lambda: ended(pair.reader, pair.lane), "the reader hears of the end")

        def unknown() -> bool:
            try:
                pair.reader.take(second, "clone")
            except UnknownLane as error:
                return pair.lane.address in str(error)
            except StaleTicket:
                return False
            return False

        eventually(unknown, "the lane is forgotten")
        with pytest.raises(UnknownLane):
            pair.reader.discard(second)
        assert same(held, tensor) and is_mapped(address)
        del held
        eventually(lambda: not is_mapped(address), "the memory is let go")


def is_mapped(address: int) -> bool:
    """Whether a lane's memory is at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split(" ", 1)[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return "mmlane" in line
    return False


def test_a_reader_that_closes_keeps_what_it_holds_and_the_producer_leaves_it_alone() -> None:
    """(2, 4)"""
    with together(readers=2) as pair:
        tensor = random((4 * SEGMENT,))
        ticket, other = pair.put(tensor), pair.put(tensor)
        view, cow = pair.reader.take(ticket), pair.reader.take(other, "cow")
        pair.readers[1].discard(ticket)
        pair.readers[1].discard(other)
        pair.reader.close()
        pair.reader.close()  # once more is nothing
        sent = pair.put(random((1,)))
        for use in (pair.reader.take, pair.reader.discard):
            with pytest.raises(LaneError, match="closed"):
                use(sent)
        pair.readers[1].discard(sent)
        with pytest.raises(LaneError, match="closed"):
            pair.reader.join(pair.lane.address)
        for number in range(20):
            pair.lane.withdraw(pair.put(torch.full((4 * SEGMENT,), number, dtype=torch.uint8)))
        assert same(view, tensor) and same(cow, tensor)
        part = view[-1:]
        del view
        assert pair.lane.stats().readers == {"tp": 2}
        assert same(part, tensor[-1:])
        del part
        assert pair.lane.stats().readers == {"tp": 2}  # the other is held yet
        cow.fill_(1)
        del cow
        eventually(lambda: pair.lane.stats().readers == {"tp": 1}, "the reader leaves")
        assert pair.lane.stats().tickets == 0 and not pair.lane.is_open


def test_a_reader_that_holds_nothing_leaves_when_it_closes(pair: Together) -> None:
    ticket = pair.put(random(SHAPE))
    pair.reader.close()
    eventually(lambda: pair.lane.stats().readers == {}, "the reader leaves")
    assert pair.lane.stats().tickets == 0  # nobody is left who could have it (4)
    with pytest.raises(LaneError):
        pair.reader.take(ticket)
    assert pair.refused(random((1,))).cause == "not_open"


@pytest.mark.parametrize("first", ["lane", "reader"])
def test_a_closed_reader_keeps_no_memory_of_a_lane_that_has_ended(first: str) -> None:
    """Though a ticket was on its way, which could have been taken for a while: nobody can take it any more."""
    with together(linger=3600.0) as pair:
        held = pair.reader.take(pair.put(random(SHAPE)))
        pair.put(random(SHAPE))
        address = held.data_ptr()
        if first == "lane":
            pair.lane.close()
            eventually(lambda: ended(pair.reader, pair.lane), "the reader hears of the end")
        pair.reader.close()
        pair.lane.close()
        assert same(held, random(SHAPE))
        del held
        eventually(lambda: not is_mapped(address), "the memory is let go")  # while the reader object lives


class Held:
    """Another thread that takes a ticket, and is held just before it runs a line of `_Link.claim`."""

    def __init__(self, reader: Reader, ticket: bytes, line: str) -> None:
        code, start = inspect.getsourcelines(_Link.claim)
        (self._line,) = [number for number, text in enumerate(code, start) if line in text]
        self._arrived, self._go_on = threading.Event(), threading.Event()
        self.got: list[Tensor] = []
        self.refused: list[type[LaneError]] = []  # not the errors: their tracebacks hold what is looked at
        self._thread = threading.Thread(target=self._take, args=(reader, ticket), daemon=True)
        self._thread.start()
        assert self._arrived.wait(DEADLINE)

    def _take(self, reader: Reader, ticket: bytes) -> None:
        sys.settrace(self._enter)
        try:
            self.got.append(reader.take(ticket))
        except LaneError as error:
            self.refused.append(type(error))
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._step if frame.f_code is _Link.claim.__code__ else None

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_lineno == self._line and not self._arrived.is_set():
            self._arrived.set()
            assert self._go_on.wait(DEADLINE)
        return self._step

    def go_on(self) -> None:
        """Let it go on, and wait for its end."""
        self._go_on.set()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()


def waits_in(function: str) -> bool:
    """Whether some thread is in a function of that name, and stays there."""
    for _ in range(50):
        if function not in {frame.f_code.co_name for frame in sys._current_frames().values()}:
            return False
        time.sleep(0.001)
    return True


def test_a_reader_that_closes_before_a_take_has_begun_is_closed_for_it() -> None:
    """(2): never a tensor in memory that the producer believes to be free."""
    with together() as pair:
        held = Held(pair.reader, pair.put(random((10,))), "wanted = digest(ticket)")
        with pair.lane._lock:  # so that the producer does not get to clear the directory
            pair.reader.close()
            eventually(lambda: pair.reader._by_number == {}, "the reader leaves")
            held.go_on()
        assert held.got == [] and held.refused == [StaleHere]


def test_a_reader_that_closes_in_the_middle_of_a_take_waits_for_it() -> None:
    """(2)"""
    with together() as pair:
        tensor = random((10,))
        held = Held(pair.reader, pair.put(tensor), "self._seen[slot] = self._held[slot]")
        pair.reader.close()
        eventually(lambda: waits_in("is_idle") or not pair.lane.is_open, "the reader wants to leave")
        held.go_on()
        assert same(held.got[0], tensor)
        assert pair.lane.stats().readers == {"tp": 1} and pair.lane.stats().tickets == 1
        held.got.clear()
        eventually(lambda: pair.lane.stats().readers == {}, "the reader leaves")


def test_leaving_python_with_tensors_held_is_quiet() -> None:
    """Modules are taken apart while tensors are let go; the kernel tells the producer."""
    ended = run(
        """
        put = [(reader, pair.put(random((PAGE,))), mode) for reader in pair.readers for mode in ("view", "cow")]
        taken = [reader.take(ticket, mode) for reader, ticket, mode in put]
        cycle = [taken[0], taken[2][5:]]
        cycle.append(cycle)
        array = taken[1].view(torch.int16)
        torch.held = taken[3]
        sys.held = taken[0][1:]
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# --- refusals -----------------------------------------------------------------------------------------------


def test_full_says_how_much_and_who_holds_it(pair: Together) -> None:
    tickets = [pair.put(random((4 * SEGMENT,), seed=seed)) for seed in range(4)]
    refused = pair.refused(random((100,)))
    assert refused.cause == "full"
    for part in ("100 bytes", f"{16 * SEGMENT} of {16 * SEGMENT}", "4 tickets", "let tensors go", "capacity"):
        assert part in refused.detail
    pair.reader.discard(tickets.pop())
    pair.reader.discard(pair.put(random((100,))))
    for ticket in tickets:
        pair.reader.discard(ticket)


def test_room_in_pieces_that_are_too_small_is_full_as_well(pair: Together) -> None:
    tickets = [pair.put(random((SEGMENT,), seed=seed)) for seed in range(16)]
    for ticket in tickets[::2]:
        pair.reader.discard(ticket)
    assert pair.refused(random((SEGMENT + 1,))).cause == "full"
    assert pair.lane.stats().taken == 8 * SEGMENT
    for ticket in tickets[1::2]:
        pair.reader.discard(ticket)
    pair.reader.discard(pair.put(random((16 * SEGMENT,))))


def test_oversize_says_how_much_there_is(pair: Together) -> None:
    refused = pair.refused(torch.zeros(16 * SEGMENT + 1, dtype=torch.uint8))
    assert refused.cause == "oversize"
    assert f"{16 * SEGMENT + 1} bytes" in refused.detail and f"capacity of {16 * SEGMENT}" in refused.detail
    pair.reader.discard(pair.put(torch.zeros(16 * SEGMENT, dtype=torch.uint8)))


def test_a_tensor_that_looks_larger_than_any_memory_is_refused(pair: Together) -> None:
    refused = pair.refused(torch.zeros(1).expand(1 << 50))
    assert refused.cause == "oversize" and str(1 << 52) in refused.detail


def test_not_open_says_who_is_missing() -> None:
    lane = Lane({"tp": 2, "dp": 1}, capacity=SEGMENT, segment=SEGMENT)
    with lane, Reader("tp") as reader:
        reader.join(lane.address)
        refused = lane.put(random((5,)))
        assert isinstance(refused, Refused) and refused.cause == "not_open"
        assert "1 of 2 in 'tp'" in refused.detail and "0 of 1 in 'dp'" in refused.detail
        assert not lane.is_open and not lane.wait_open(0.0)
        assert lane.stats().refused == {"not_open": 1} and lane.stats().taken == 0


def test_unsupported_says_what_it_was(pair: Together) -> None:
    refused = pair.refused("a string")
    assert refused.cause == "unsupported" and refused.detail.startswith("str")


def test_closed_says_so_and_closing_twice_is_nothing() -> None:
    with together() as pair:
        ticket = pair.put(random((5,)))
        pair.lane.close()
        pair.lane.close()
        refused = pair.lane.put(random((5,)))
        assert isinstance(refused, Refused) and refused == Refused("closed", "the lane was closed")
        assert not pair.lane.is_open and not pair.lane.wait_open(DEADLINE)
        pair.lane.withdraw(ticket)
        pair.lane.drain()
        assert pair.lane.stats().refused == {"closed": 1}


@pytest.mark.parametrize("point", ["put.allocated", "put.reserved", "put.copied"])
def test_a_lane_that_is_closed_while_something_is_put(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Its memory stays until the copy is done, and the tensor is refused."""
    with together() as pair:

        def probe(name: str) -> None:
            if name == point:
                points.probe = None
                pair.lane.close()

        monkeypatch.setattr(points, "probe", probe)
        refused = pair.lane.put(random((3 * SEGMENT,)))
        assert isinstance(refused, Refused) and refused.cause == "closed"
        assert pair.lane.stats().taken == 0


@pytest.mark.parametrize("point", ["put.allocated", "put.reserved", "put.copied"])
def test_a_reader_that_leaves_while_something_is_put(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """(1): no ticket that only some could take."""
    with together(readers=2) as pair:

        def probe(name: str) -> None:
            if name == point:
                points.probe = None
                pair.readers[1].close()
                eventually(lambda: not pair.lane.is_open, "the producer hears of it")

        monkeypatch.setattr(points, "probe", probe)
        refused = pair.lane.put(random((3 * SEGMENT,)))
        assert isinstance(refused, Refused) and refused.cause == "not_open" and "1 of 2" in refused.detail
        assert pair.lane.stats().taken == 0


@pytest.mark.parametrize("point", ["put.allocated", "put.reserved", "put.copied"])
@pytest.mark.parametrize("error", [RuntimeError("other"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_error_while_something_is_put_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, point: str, error: BaseException
) -> None:
    def probe(name: str) -> None:
        if name == point:
            raise error

    with together() as pair:
        monkeypatch.setattr(points, "probe", probe)
        with pytest.raises(type(error)):
            pair.lane.put(random((3 * SEGMENT,)))
        monkeypatch.setattr(points, "probe", None)
        assert pair.lane.stats().taken == 0
        pair.reader.discard(pair.put(random((16 * SEGMENT,))))
        lane = pair.lane
    assert lane._mapping.address == 0  # nobody is counted as copying still, so the memory was let go


@pytest.mark.parametrize("point", ["take.claimed", "take.mapped"])
@pytest.mark.parametrize("mode", MODES)
def test_an_error_while_something_is_taken_gives_it_back(
    pair: Together, monkeypatch: pytest.MonkeyPatch, point: str, mode: Mode
) -> None:
    def probe(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(points, "probe", probe)
    with pytest.raises(KeyboardInterrupt):
        pair.reader.take(pair.put(random(SHAPE)), mode)
    monkeypatch.setattr(points, "probe", None)
    gc.collect()
    stats = pair.lane.stats()
    assert (stats.tickets, stats.taken, stats.strays) == (0, 0, 0)


# --- many at once -------------------------------------------------------------------------------------------


def test_several_threads_put_and_take(pair: Together) -> None:
    def work(which: int) -> None:
        for turn in range(120):
            size = (17, 3 * PAGE, SEGMENT + 9)[(which + turn) % 3]
            tensor = torch.full((size,), (which * 40 + turn) % 251, dtype=torch.uint8)
            ticket = pair.lane.put(tensor)
            if isinstance(ticket, Refused):
                assert ticket.cause == "full"
                continue
            if turn % 7 == 0:
                pair.lane.withdraw(ticket)
                continue
            taken = pair.reader.take(ticket, MODES[turn % 3])
            assert same(taken, tensor)

    in_threads([lambda which=which: work(which) for which in range(4)])  # type: ignore[misc]
    stats = pair.lane.stats()
    assert (stats.tickets, stats.taken, stats.strays) == (0, 0, 0)


def test_tensors_may_be_let_go_by_any_thread(pair: Together) -> None:
    tensor, share = random((100,)), pair.lane.share(uses=800)
    queue = [[pair.reader.take(pair.put(tensor, share=share)) for _ in range(200)] for _ in range(4)]
    assert pair.lane.stats().tickets == 800
    in_threads([part.clear for part in queue])
    eventually(lambda: pair.lane.stats().tickets == 0, "all are heard of")  # more than the socket holds at once


def test_more_give_backs_at_once_than_the_socket_holds(pair: Together) -> None:
    """They wait in the reader, and go on by themselves when the producer reads."""
    tensor, share = random((10,)), pair.lane.share(uses=20_000)
    tickets = [pair.put(tensor, share=share) for _ in range(20_000)]
    for ticket in tickets:
        pair.reader.discard(ticket)
    eventually(lambda: pair.lane.stats().tickets == 0, "all are heard of")
    assert pair.lane.stats().strays == 0


COLLECTED_ANYWHERE = """
    lane, (reader, other) = pair.lane, pair.readers
    tensors = [random((size,), seed=size) for size in (5, PAGE, 3 * PAGE)]
    left = [0]

    class Last:
        # A finalizer that does all that is allowed wherever Python collects.
        def __init__(self, ticket):
            self.ticket = ticket

        def __del__(self):
            left[0] += 1
            reader.discard(self.ticket)

    class Unsent(Last):
        def __del__(self):
            left[0] += 1
            lane.withdraw(self.ticket)

    def cycle(*what):
        inside = list(what)
        inside.append(inside)

    gc.set_threshold(1, 1, 1)

    def work(which):
        for turn in range(150):
            tensor = tensors[(turn + which) % 3]
            share = lane.share(uses=3 + turn % 4)  # too few, as many, and more
            tickets = [pair.put(tensor, share=share if turn % 3 else None) for _ in range(4)]
            cycle(share)
            del share
            cycle(reader.take(tickets[0]), reader.take(tickets[1], "cow")[:2])
            other.discard(tickets[0]), other.discard(tickets[1]), other.discard(tickets[2])
            cycle(Last(tickets[2]))
            cycle(Unsent(tickets[3]))
            if turn % 10 == 0:
                lane.stats()

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.set_threshold(700, 10, 10)
    gc.collect()
    assert left == [THREADS * 300], left
    eventually(lambda: lane.stats().tickets == 0, "all tickets have ended")
    assert lane.stats().strays == 0
    assert lane.stats().taken == 0
    reader.close(), other.close(), lane.close()
    print("well")
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_are_collected_wherever_python_likes(threads: int) -> None:
    """In the middle of `put`, `take` and `stats` too, while their locks are held: nothing there waits for one."""
    ended = run(COLLECTED_ANYWHERE.replace("THREADS", str(threads)))
    assert (ended.returncode, ended.stdout) == (0, "well\n"), ended.stderr[-3000:]
    assert ended.stderr == ""


@pytest.mark.timeout(120)  # it hangs if it fails
@pytest.mark.parametrize("lock", ["_lock", "_committing"])
def test_letting_go_waits_for_no_lock_of_the_lane(pair: Together, lock: str) -> None:
    """The one above made certain, for the locks of the producer."""
    taken = pair.reader.take(pair.put(random(SHAPE)))
    ticket = pair.put(random((7,)))
    with getattr(pair.lane, lock):
        del taken
        pair.lane.withdraw(ticket)
    assert pair.lane.stats().tickets == 0


@pytest.mark.timeout(120)  # it hangs if it fails
@pytest.mark.parametrize("lock", ["_claiming", "_sending"])
def test_letting_go_waits_for_no_lock_of_the_reader(pair: Together, lock: str) -> None:
    """While this very thread has it, as a collection in the middle of a take or of a give-back would find it."""
    taken, other = pair.reader.take(pair.put(random(SHAPE))), pair.reader.take(pair.put(random((7,))))
    ticket = pair.put(random((8,)))
    with getattr(pair.reader._links[pair.lane.address], lock):
        del taken
        pair.reader.discard(ticket)
    del other  # whoever sends next sends what is left
    assert pair.lane.stats().tickets == 0


def test_no_mapping_and_no_descriptor_is_left_by_many_takes(pair: Together) -> None:
    tensor = random((3 * PAGE,))
    pair.reader.take(pair.put(tensor), "cow")

    def count() -> tuple[int, int]:
        process = Path("/proc/self")
        return (process / "maps").read_text().count("mmlane"), len(list((process / "fd").iterdir()))

    before = count()
    share = pair.lane.share(uses=300)
    held = [pair.reader.take(pair.put(tensor, share=share), "cow") for _ in range(300)]
    assert count()[0] > before[0]
    held.clear()
    for mode in MODES * 100:
        pair.reader.take(pair.put(tensor), mode)
    assert count() == before


def test_where_no_private_mapping_can_be_had_cow_is_a_copy() -> None:
    """A process may have so many mappings and no more: the reader gets a tensor to write to all the same."""
    ended = run(
        """
        import mmap
        reader, other = pair.readers
        tensor = random((3 * PAGE,))
        one, two = pair.put(tensor), pair.put(tensor)
        for ticket in (one, two):
            other.discard(ticket)
        limit = int(open("/proc/sys/vm/max_map_count").read())
        mappings = []
        try:
            while len(mappings) <= limit:  # alternately, lest the kernel joins them
                mappings.append(mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | len(mappings) % 2 * mmap.PROT_WRITE))
        except OSError as error:
            print(error.strerror)
        copy = reader.take(one, "cow")
        assert pair.lane.stats().tickets == 1
        copy.fill_(3)
        del mappings
        cow = reader.take(two, "cow")
        assert pair.lane.stats().tickets == 1
        assert same(cow, tensor) and int(copy.sum()) == 9 * PAGE
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "Cannot allocate memory\n", "")


def test_a_view_is_where_the_mapping_is_and_costs_no_memory(pair: Together) -> None:
    ticket = pair.put(random((2 * SEGMENT,)))
    one = pair.reader.take(ticket, "view")
    mapping = pair.reader._links[pair.lane.address].mapping
    assert 0 <= one.data_ptr() - mapping.address < mapping.nbytes
    assert one.data_ptr() % PAGE == 0
    assert ctypes.string_at(one.data_ptr(), 4) == bytes(one[:4].tolist())
    del one
