"""The end of a lane, of a reader, of a process: who holds something keeps it, and the last of it frees the memory.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlane.lane import Lane, LaneError, Mode, Reader, Refused, StaleHere, StaleTicket, UnknownLane
from mmlane.lane.reader import _Link
from tests.lane.harness import kernel
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.payloads import MODES, SHAPE, Sent, random, same
from tests.lane.harness.peers import CAPACITY, Company, Producing, Reading, hears_of_the_end, refused
from tests.lane.harness.programs import run_beside_a_lane
from tests.lane.harness.together import SEGMENT, Together, together
from tests.lane.harness.waiting import DEADLINE, eventually

# --- in processes of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "end", "kill"])
def test_readers_keep_what_they_hold_when_the_producer_ends(company: Company, how: str) -> None:
    """(4) And get what is on its way for as long as they linger; then its memory goes from them."""
    producer = company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT)
    address = company.invitation(producer)
    (file,) = kernel.lane_files(producer.pid)
    reader, short = company.reader("tp", address), company.reader("tp", address, linger=0.2)
    sent = [producer.call(Producing.put, seed, 100_000) for seed in range(4)]
    for each in (reader, short):
        each.call(Reading.take, sent[0], "view")
        each.call(Reading.take, sent[1], "cow")
    if how == "close":
        producer.call(Producing.close)
        assert refused(producer).cause == "closed"
        assert not [trace for trace in kernel.traces([address], [file]) if trace.pid in (0, producer.pid)]
    elif how == "end":
        producer.end()
    else:
        producer.kill()
    for each in (reader, short):
        hears_of_the_end(each)

    reader.call(Reading.take, sent[2], "view")
    reader.call(Reading.take, sent[3], "clone")
    assert reader.call(Reading.check) == 4

    def is_forgotten() -> bool:
        try:
            short.call(Reading.discard, sent[2])
        except UnknownLane:
            return True
        except StaleTicket:  # it was not at the look before
            return False
        return False

    eventually(is_forgotten, "the lane is forgotten")
    assert short.call(Reading.check) == 2
    assert file in kernel.lane_files(short.pid)
    short.call(Reading.let_go)
    eventually(lambda: not kernel.lane_files(short.pid), "the memory goes with the last tensor")


def put_amid_close(producing: Producing, point: str) -> tuple[Sent | Refused, int]:
    """Put while another thread closes the lane; what comes of it, and bytes that were written to others' files."""
    gate = Gate(point, "main")
    pipes: list[tuple[int, int]] = []

    def close() -> None:
        gate.wait()
        producing.close()
        pipes.extend(os.pipe() for _ in range(20))  # they have the numbers of what the lane has closed
        gate.open()

    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(close)
        answer = producing.try_put(1, 100_000)
        closing.result(DEADLINE)
    written = 0
    for reading_end, writing_end in pipes:
        os.close(writing_end)
        written += len(os.read(reading_end, 1000))
        os.close(reading_end)
    return answer, written


@pytest.mark.parametrize("point", ["put.allocated", "commit.populated", "put.committed", "put.copied"])
def test_a_lane_closed_amid_a_put(company: Company, point: str) -> None:
    """The memory stays until the put is through with it, and nobody rings a bell that is gone."""
    producer, (reader,) = company.open(["tp"])
    answer, written = producer.call(put_amid_close, point)
    assert isinstance(answer, Refused) and answer.cause == "closed"
    assert written == 0
    hears_of_the_end(reader)
    assert not kernel.lane_files(producer.pid)


# --- in one process ----------------------------------------------------------------------------------------


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
            pair.reader.join(pair.lane.invitation)
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
    ended = run_beside_a_lane(
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


def test_leaving_python_waits_for_no_lock() -> None:
    """Threads stand still once Python ends, with the locks that they hold; `scope` closes all after that."""
    ended = run_beside_a_lane(
        """
        for lock in (pair.lane._lock, *(reader._joining for reader in pair.readers)):
            lock.acquire()
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
