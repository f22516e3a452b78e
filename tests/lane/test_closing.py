"""The end of a lane, of a reader, of a process: a process keeps what it holds until it lets it go.

The numbers are those of the invariants in docs/lane.md.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

from mmlane.lane import Lane, LaneError, Mode, Reader, Refused, StaleTicket, UnknownLane
from mmlane.lane.link import Link
from tests.lane.harness import kernel
from tests.lane.harness.breakpoints import Gate
from tests.lane.harness.lane_with_readers import SEGMENT, lane_with_readers
from tests.lane.harness.payloads import MODES, SHAPE, Sent, random, same
from tests.lane.harness.peers import CAPACITY, Company, Producing, Reading, hears_of_the_end, refused
from tests.lane.harness.programs import run_beside_a_lane
from tests.lane.harness.waiting import DEADLINE, eventually

# --- in processes of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "end", "kill"])
def test_readers_keep_what_they_hold_when_the_producer_ends(company: Company, how: str) -> None:
    """(4) And get what is on its way for as long as they linger; then its memory goes from them."""
    producer = company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT)
    invitation = company.invitation(producer)
    (file,) = kernel.lane_files(producer.pid)
    reader, short = company.reader("tp", invitation), company.reader("tp", invitation, linger=0.2)
    assert producer.call(Producing.wait_open)
    sent = [producer.call(Producing.put, seed, 100_000) for seed in range(4)]
    for each in (reader, short):
        each.call(Reading.take, sent[0], "view")
        each.call(Reading.take, sent[1], "cow")
    if how == "close":
        producer.call(Producing.close)
        assert refused(producer).cause == "closed"
        assert not [trace for trace in kernel.traces([invitation.name], [file]) if trace.pid in (0, producer.pid)]
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
    """The memory stays until the put has ended, and no thread writes to a wakeup event that is closed."""
    producer, (reader,) = company.open(["tp"])
    answer, written = producer.call(put_amid_close, point)
    assert isinstance(answer, Refused) and answer.cause == "closed"
    assert written == 0
    hears_of_the_end(reader)
    assert not kernel.lane_files(producer.pid)


# --- in one process ----------------------------------------------------------------------------------------


def ended(reader: Reader, lane: Lane) -> bool:
    """Whether a reader has heard that the producer has ended."""
    return lane.name not in reader.lanes()


@pytest.mark.parametrize("mode", MODES)
def test_tickets_on_their_way_can_be_taken_after_the_producer_has_ended(mode: Mode) -> None:
    with lane_with_readers(linger=3600.0) as pair:
        tensor = random(SHAPE)
        first, second, third = (pair.put(tensor) for _ in range(3))
        held = pair.reader.take(first)
        pair.lane.close()
        eventually(lambda: ended(pair.reader, pair.lane), "the reader hears of the end")
        late = pair.reader.take(second, mode)
        assert same(held, tensor) and same(late, tensor)
        pair.reader.take(third)
        for stale in (first, second, third):
            with pytest.raises(StaleTicket):
                pair.reader.take(stale)
        del held, late


def test_after_lingering_a_lane_is_unknown_and_its_memory_gone_but_for_what_is_held() -> None:
    with lane_with_readers(linger=0.01) as pair:
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
                return pair.lane.name in str(error)
            except StaleTicket:
                return False
            return False

        eventually(unknown, "the lane is forgotten")
        with pytest.raises(UnknownLane):
            pair.discard(second)
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


def test_a_reader_that_closes_ends_the_lane_and_all_keep_what_they_hold() -> None:
    """(2, 4): what was issued can be taken by the others, and no memory is used again."""
    with lane_with_readers(readers=2) as pair:
        reader, other = pair.readers
        tensor = random((4 * SEGMENT,))
        first, second, late = (pair.put(tensor) for _ in range(3))
        view, cow = reader.take(first), reader.take(second, "cow")
        other.take(first)
        reader.close()
        reader.close()  # once more is nothing
        for use in (reader.take, reader.discard):
            with pytest.raises(LaneError, match="closed"):
                use(late)
        with pytest.raises(LaneError, match="closed"):
            reader.join(pair.lane.invitation)
        eventually(lambda: pair.lane.is_closed, "the producer hears of it")
        assert pair.refused(random((1,))) == Refused("closed", "reader 0 of 'tp' has ended")
        assert same(view, tensor) and same(cow, tensor)
        eventually(lambda: ended(other, pair.lane), "the other reader hears of it")
        part = view[-1:]
        del view
        assert same(other.take(second), tensor) and same(other.take(late), tensor)
        assert same(part, tensor[-1:])
        cow.fill_(1)
        del cow, part


def test_a_reader_that_holds_nothing_ends_the_lane_as_well() -> None:
    with lane_with_readers() as pair:
        ticket = pair.put(random(SHAPE))
        pair.reader.close()
        eventually(lambda: pair.lane.is_closed, "the producer hears of it")
        with pytest.raises(LaneError):
            pair.reader.take(ticket)
        assert pair.refused(random((1,))).cause == "closed" and not pair.lane.wait_open(0.0)


@pytest.mark.parametrize("first", ["lane", "reader"])
def test_a_closed_reader_keeps_no_memory_of_a_lane_that_has_ended(first: str) -> None:
    """Though a ticket was on its way, which could have been taken for a while: no reader can take it any more."""
    with lane_with_readers(linger=3600.0) as pair:
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
    """Another thread that takes a ticket, and is held just before it runs a line of `Link.claim`."""

    def __init__(self, reader: Reader, ticket: bytes, line: str) -> None:
        code, start = inspect.getsourcelines(Link.claim)
        (self._line,) = [number for number, text in enumerate(code, start) if line in text]
        self._arrived, self._go_on = threading.Event(), threading.Event()
        self.got: list[Tensor] = []
        self._thread = threading.Thread(target=self._take, args=(reader, ticket), daemon=True)
        self._thread.start()
        assert self._arrived.wait(DEADLINE)

    def _take(self, reader: Reader, ticket: bytes) -> None:
        sys.settrace(self._enter)
        try:
            self.got.append(reader.take(ticket))
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._step if frame.f_code is Link.claim.__code__ else None

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


@pytest.mark.parametrize("line", ["wanted = digest(ticket)", "self._seen[slot] = claim.watch"])
def test_a_reader_that_closes_amid_a_take(line: str) -> None:
    """(2): never a tensor in memory that the producer believes to be free, since it frees none any more."""
    with lane_with_readers() as pair:
        tensor = random((10,))
        held = Held(pair.reader, pair.put(tensor), line)
        pair.reader.close()
        eventually(lambda: pair.lane.is_closed, "the producer hears of it")
        pair.lane.drain()
        held.go_on()
        assert same(held.got[0], tensor)
        held.got.clear()


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
        lane = pair.lane
        for lock in (lane.guard.lock, lane._committer.committing, *(reader._joining for reader in pair.readers)):
            lock.acquire()
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
