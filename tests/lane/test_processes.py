"""Real producers and readers that come late, leave, stand still, fork or end; memory that comes and goes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe, get_context
from multiprocessing.process import BaseProcess
from typing import Any, Literal, get_args

import pytest
import torch

from mmlane.lane import JoinRefused, Lane, LaneError, Mode, Reader, Refused, StaleTicket, UnknownLane, points
from mmlane.lane.producer import SLOTS
from mmlane.lane.ticket import read
from tests.lane import oracle
from tests.lane.processes import (
    DEADLINE,
    Company,
    Gate,
    Peer,
    Producing,
    Reading,
    Sent,
    baseline,
    die_with_the_parent,
    eventually,
    hears_of_the_end,
)

SEGMENT = 64 << 10
CAPACITY = 32 * SEGMENT
DIRECTORY = SLOTS * 8  # bytes of a lane that are always there


def refused(producer: Peer[Producing], nbytes: int = 1000) -> Refused:
    """Why a producer issues no ticket."""
    answer = producer.call(Producing.try_put, 999, nbytes)
    assert isinstance(answer, Refused)
    return answer


def carries(producer: Peer[Producing], *readers: Peer[Reading]) -> None:
    """A lane does what lanes are for."""
    for seed, nbytes in enumerate((7, 5_000, 150_000), 5000):
        sent = producer.call(Producing.put, seed, nbytes)
        for reader in readers:
            reader.call(Reading.let_go, reader.call(Reading.take, sent))


def tickets(producer: Peer[Producing]) -> int:
    """How many tickets are out."""
    return producer.call(Producing.stats).tickets


def looks(producer: Peer[Producing], count: int) -> None:
    """Wait until the control thread has looked after memory this many times more."""
    producer.arm("hand_back.announced", count, "stop")
    assert producer.last_words() == "hand_back.announced"
    producer.wait_stopped()
    producer.go_on()
    producer.disarm()


def put_many(producing: Producing, seed: int, nbytes: int, count: int) -> list[Sent]:
    """So many tickets on one copy of a tensor."""
    return [producing.put(seed, nbytes, uses=count), *(producing.put(seed, nbytes) for _ in range(count - 1))]


def take_many(reading: Reading, many: list[Sent]) -> None:
    for sent in many:
        reading.take(sent)


# --- joining and leaving -----------------------------------------------------------------------------------


def test_a_lane_opens_when_all_have_joined(company: Company) -> None:
    """(1)"""
    producer = company.producer({"tp": 2, "vit": 1})
    address = company.address(producer)
    assert refused(producer).cause == "not_open"
    readers = [company.reader("tp", address)]
    assert refused(producer).detail.startswith("readers that have joined: 1 of 2 in 'tp', 0 of 1 in 'vit'")
    readers.append(company.reader("vit", address))
    assert refused(producer).cause == "not_open"
    assert not producer.call(Producing.is_open)
    readers.append(company.reader("tp", address))
    assert producer.call(Producing.wait_open)
    carries(producer, readers[0], readers[2])
    carries(producer, readers[1])
    assert baseline(producer).refused == {"not_open": 3}


def test_a_late_reader_owes_and_gets_only_what_comes_after_it(company: Company) -> None:
    """(1, 2)"""
    producer, early = company.open(["tp", "tp"])
    before = producer.call(Producing.put, 1, 1000)
    late = company.reader("tp", company.address(producer))
    after = producer.call(Producing.put, 2, 1000)
    for reader in early:
        reader.call(Reading.take, before)
        reader.call(Reading.take, after)
    with pytest.raises(StaleTicket, match="older than"):
        late.call(Reading.take, before)
    for reader in early:
        reader.call(Reading.let_go)
    assert tickets(producer) == 1
    late.call(Reading.take, after)
    assert tickets(producer) == 1
    late.call(Reading.let_go)
    baseline(producer)

    early[0].end()  # one more than needed was there, so the lane stays open
    eventually(lambda: producer.call(Producing.stats).readers == {"tp": 2}, "the producer hears of the leaving")
    carries(producer, early[1], late)
    baseline(producer)


def test_a_reader_leaves_and_comes_back(company: Company) -> None:
    producer, (stays, leaves) = company.open(["tp", "tp"])
    address = company.address(producer)
    on_its_way = producer.call(Producing.put, 1, 1000)
    leaves.call(Reading.close)
    eventually(lambda: not producer.call(Producing.is_open), "the lane shuts")
    assert refused(producer).cause == "not_open"
    with pytest.raises(LaneError, match="closed"):
        leaves.call(Reading.take, on_its_way)
    stays.call(Reading.take, on_its_way)
    stays.call(Reading.let_go)
    baseline(producer)

    leaves.call(Reading.come_back, address)
    assert producer.call(Producing.wait_open)
    carries(producer, stays, leaves)
    baseline(producer)


@pytest.mark.parametrize("mode", ["view", "cow"])
def test_a_reader_that_leaves_keeps_what_it_holds(company: Company, mode: Mode) -> None:
    """(2) It owes it as before, and memory under it is not used again, also when it has come back meanwhile."""
    producer, (stays, leaves) = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT)
    address = company.address(producer)
    held = [producer.call(Producing.put, seed, CAPACITY // 4) for seed in range(2)]
    for sent in held:
        leaves.call(Reading.take, sent, mode)
        stays.call(Reading.take, sent)
    stays.call(Reading.let_go)
    leaves.call(Reading.close)
    assert tickets(producer) == 2
    leaves.call(Reading.come_back, address)
    assert producer.call(Producing.wait_open)
    for _ in range(3):
        carries(producer, stays, leaves)  # in the half that is free
        assert leaves.call(Reading.check) == 2
    assert refused(producer, CAPACITY // 4 * 3).cause == "full"
    leaves.call(Reading.let_go, 1)
    leaves.call(Reading.let_go)
    baseline(producer)
    assert producer.call(Producing.stats).readers == {"tp": 2}


def test_coming_and_going_leaks_nothing(company: Company) -> None:
    producer, (stays, leaves) = company.open(["tp", "tp"])
    address = company.address(producer)

    def there_is() -> list[int]:
        peers = (producer, stays, leaves)
        return [len(oracle.descriptors(peer.pid)) + len(oracle.thread_states(peer.pid)) for peer in peers]

    leaves.call(Reading.come_back, address)
    eventually(lambda: producer.call(Producing.stats).readers == {"tp": 2}, "the former reader is gone")
    before = there_is()
    for _ in range(20):
        leaves.call(Reading.come_back, address)
        assert producer.call(Producing.wait_open)
        carries(producer, stays, leaves)
    eventually(lambda: there_is() == before, f"descriptors and threads are {before} again")
    assert len([trace for trace in oracle.traces([], company.files) if trace.pid == leaves.pid]) <= 3
    assert baseline(producer).readers == {"tp": 2}


def join_for(reading: Reading, address: str, seconds: float) -> None:
    reading.reader.join(address, timeout=seconds)


def test_joining_a_producer_that_stands_still_ends(company: Company) -> None:
    producer = company.producer({"tp": 1})
    address = company.address(producer)
    reader = company.reader("tp")
    before = len(oracle.descriptors(reader.pid))
    producer.stop()
    with pytest.raises(JoinRefused, match=r"no answer within 0\.2 s"):
        reader.call(join_for, address, 0.2)
    assert not oracle.lane_files(reader.pid) and len(oracle.descriptors(reader.pid)) == before
    producer.go_on()
    eventually(lambda: producer.call(Producing.stats).strangers == 1, "the producer sees that it has gone")
    reader.call(Reading.join, address)
    assert producer.call(Producing.wait_open)
    carries(producer, reader)


# --- groups and lanes --------------------------------------------------------------------------------------


def test_a_ticket_belongs_to_the_group_that_first_gives_it_back(company: Company) -> None:
    """(2)"""
    producer, (first, second, other) = company.open(["tp", "tp", "vit"])
    sent = producer.call(Producing.put, 1, 1000)
    for reader in (first, second):
        reader.call(Reading.take, sent)
    first.call(Reading.let_go)
    assert tickets(producer) == 1  # owed by the other of the group, no more by the other group
    second.call(Reading.let_go)
    assert tickets(producer) == 0

    sent = producer.call(Producing.put, 2, 1000)
    other.call(Reading.take, sent)
    assert tickets(producer) == 1
    other.call(Reading.let_go)
    assert tickets(producer) == 0

    sent = producer.call(Producing.put, 3, 1000)
    first.call(Reading.discard, sent)
    assert tickets(producer) == 1
    second.call(Reading.discard, sent)
    assert baseline(producer).strays == 0


def test_another_group_dies_before_and_after_a_ticket_has_found_its_own(company: Company) -> None:
    """(2, 4)"""
    producer, (first, second, *others) = company.open(["tp", "tp", "vit", "vit"])
    sent = producer.call(Producing.put, 1, 1000)
    others[0].kill()
    first.call(Reading.take, sent)
    first.call(Reading.let_go)
    others[1].kill()
    assert tickets(producer) == 1
    second.call(Reading.take, sent)
    second.call(Reading.let_go)
    baseline(producer)


def test_one_reader_and_many_lanes(company: Company) -> None:
    """One lane's death is nothing to the others (4)."""
    reader, other = company.reader("tp"), company.reader("tp")
    producers = [company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT) for _ in range(4)]
    addresses = [company.address(producer) for producer in producers]
    stranger, _ = company.open(["tp"])
    for address in addresses:
        reader.call(Reading.join, address)
        other.call(Reading.join, address)
    assert reader.call(Reading.lanes) == tuple(addresses)
    for seed, producer in enumerate(producers * 3):
        sent = producer.call(Producing.put, seed, 100_000)
        reader.call(Reading.take, sent)
        other.call(Reading.take, sent)
    with pytest.raises(UnknownLane, match="is not joined"):
        reader.call(Reading.take, stranger.call(Producing.put, 1, 1))

    producers[0].kill()
    producers[1].call(Producing.close)
    eventually(lambda: reader.call(Reading.lanes) == tuple(addresses[2:]), "the reader hears of the ends")
    for producer in producers[2:]:
        carries(producer, reader, other)
    for each in (reader, other):
        assert each.call(Reading.check) == 12
        each.call(Reading.let_go)
    for producer in producers[2:]:
        baseline(producer)


# --- memory ------------------------------------------------------------------------------------------------


def test_memory_is_committed_ahead_of_need(company: Company) -> None:
    """And readers have it in their page tables before they look at it."""
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT)
    (file,) = oracle.lane_files(producer.pid)
    sent = producer.call(Producing.put, 1, 2 * SEGMENT)
    eventually(lambda: producer.call(Producing.stats).warm == 4 * SEGMENT, "memory for another one")
    eventually(lambda: oracle.in_page_tables(reader.pid, file) >= 4 * SEGMENT, "the reader's page tables fill")
    assert oracle.committed(producer.pid, file) == DIRECTORY + 4 * SEGMENT
    reader.call(Reading.take, sent)


def test_memory_is_committed_up_to_the_capacity_and_no_further(company: Company) -> None:
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT)
    (file,) = oracle.lane_files(producer.pid)
    for seed in range(32):
        reader.call(Reading.take, producer.call(Producing.put, seed, SEGMENT - seed), "view")
    stats = producer.call(Producing.stats)
    assert (stats.warm, stats.taken, stats.capacity) == (CAPACITY, CAPACITY, CAPACITY)
    assert oracle.committed(producer.pid, file) == DIRECTORY + CAPACITY
    assert refused(producer).cause == "full"
    assert refused(producer, CAPACITY + 1).cause == "oversize"
    assert reader.call(Reading.check) == 32

    late = company.reader("tp", company.address(producer))  # to one that joins now, all of it is announced
    eventually(lambda: oracle.in_page_tables(late.pid, file) >= CAPACITY, "the late reader's page tables fill")
    reader.call(Reading.let_go)
    whole = producer.call(Producing.put, 99, CAPACITY)
    for each in (reader, late):
        each.call(Reading.take, whole)
        each.call(Reading.let_go)
    baseline(producer)


def test_idle_memory_goes_and_comes_again(company: Company) -> None:
    producer, readers = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = oracle.lane_files(producer.pid)
    for _ in range(3):
        large = producer.call(Producing.put, 1, 500_000)
        small = producer.call(Producing.put, 2, 100)
        numbers = [reader.call(Reading.take, large) for reader in readers]
        for reader in readers:
            reader.call(Reading.take, small)
        assert oracle.committed(producer.pid, file) >= DIRECTORY + 500_000
        for reader, number in zip(readers, numbers, strict=True):
            reader.call(Reading.let_go, number)
        # Where something lies, memory stays.
        eventually(
            lambda: oracle.committed(producer.pid, file) == DIRECTORY + SEGMENT, "the large one's memory goes"
        )
        assert readers[0].call(Reading.check) == readers[1].call(Reading.check) == 1
        for reader in readers:
            reader.call(Reading.let_go)
        eventually(lambda: oracle.committed(producer.pid, file) == DIRECTORY, "all memory goes")
        assert baseline(producer).warm == 0


def test_a_reader_that_stands_still_keeps_memory_but_holds_up_nothing(company: Company) -> None:
    producer, (stopped, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = oracle.lane_files(producer.pid)
    stopped.stop()
    carries(producer, reader)  # the tickets are not the stopped one's, and its socket takes what is said to it
    baseline(producer)
    warm = oracle.committed(producer.pid, file)
    assert warm > DIRECTORY
    looks(producer, 4)
    assert oracle.committed(producer.pid, file) == warm
    carries(producer, reader)
    looks(producer, 4)
    assert oracle.committed(producer.pid, file) >= warm
    stopped.go_on()
    eventually(lambda: oracle.committed(producer.pid, file) == DIRECTORY, "idle memory goes, now that all agree")
    carries(producer, stopped)


def test_a_reader_that_dies_standing_still_keeps_no_memory(company: Company) -> None:
    """(4)"""
    producer, (stopped, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = oracle.lane_files(producer.pid)
    stopped.stop()
    carries(producer, reader)
    looks(producer, 4)
    assert oracle.committed(producer.pid, file) > DIRECTORY
    stopped.kill()
    eventually(lambda: oracle.committed(producer.pid, file) == DIRECTORY, "idle memory goes")


def test_a_reader_that_joins_while_memory_goes_does_not_bring_it_back(company: Company) -> None:
    """To touch a page that has gone is to commit it, behind the producer's back."""
    producer, (stopped, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    address = company.address(producer)
    (file,) = oracle.lane_files(producer.pid)
    large = producer.call(Producing.put, 1, CAPACITY // 2)
    reader.call(Reading.let_go, reader.call(Reading.take, large))
    stopped.stop()
    baseline(producer)
    looks(producer, 4)  # the reader has agreed, the stopped one has been asked
    late = company.reader("vit")
    late.arm("map.acknowledged", action="stop")
    late.start(Reading.join, address)
    assert late.last_words() == "map.acknowledged"
    late.wait_stopped()
    eventually(lambda: producer.call(Producing.stats).readers == {"tp": 1, "vit": 2}, "the late one is in")
    stopped.go_on()
    eventually(lambda: oracle.committed(producer.pid, file) == DIRECTORY, "idle memory goes")
    late.go_on()
    late.answer()
    carries(producer, late, reader)
    # The last of this memory goes when the late one has agreed, and so has heeded all that it was told before.
    eventually(lambda: producer.call(Producing.stats).warm == 0, "idle memory goes again")
    assert oracle.committed(producer.pid, file) == DIRECTORY


def test_an_agreement_to_an_earlier_question_is_none_to_the_last(company: Company) -> None:
    """Memory that was to go, was used, and is to go again, waits until a slow reader has caught up with that."""
    count = CAPACITY // SEGMENT
    producer, (slow, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = oracle.lane_files(producer.pid)

    def use_all_memory() -> None:
        sent = producer.call(Producing.put, 1, CAPACITY)
        reader.call(Reading.let_go, reader.call(Reading.take, sent))
        baseline(producer)

    use_all_memory()
    slow.arm("hand_back.heard", action="stop")
    slow.arm("give_back.sent", count, action="stop")
    assert slow.last_words() == "hand_back.heard"
    slow.wait_stopped()
    use_all_memory()
    looks(producer, 5)  # it is told that the memory is in use, and asked again
    slow.go_on()
    assert slow.last_words() == "give_back.sent"  # the answers to the first question
    slow.wait_stopped()
    looks(producer, 2)
    assert oracle.committed(producer.pid, file) == DIRECTORY + CAPACITY
    slow.go_on()
    eventually(lambda: producer.call(Producing.stats).warm == 0, "idle memory goes")
    assert oracle.committed(producer.pid, file) == DIRECTORY
    carries(producer, slow)


# --- sleep -------------------------------------------------------------------------------------------------


def falls_asleep(peer: Peer[Any], seconds: float) -> dict[int, int]:
    """Wait until no thread of a process was woken for a while; how often each has gone to sleep by then."""

    def quiet() -> dict[int, int]:
        before = oracle.sleeps(peer.pid)
        time.sleep(seconds)  # that nothing happens is no event
        return before if oracle.sleeps(peer.pid) == before else {}

    return eventually(quiet, f"process {peer.pid} is not woken for {seconds:g} s")


def test_give_backs_do_not_wake_the_producer(company: Company) -> None:
    producer, readers = company.open(["tp", "tp"], idle=600.0)
    many = producer.call(put_many, 1, 1000, 1000)
    for reader in readers:
        reader.call(take_many, many)
    before = falls_asleep(producer, 0.3)
    for reader in readers:
        reader.call(Reading.let_go)
    assert oracle.sleeps(producer.pid) == before
    baseline(producer)


def test_nobody_is_woken_for_an_idle_lane(company: Company) -> None:
    """While memory is committed, the producer looks after it; then it does not look any more."""
    producer, readers = company.open(["tp", "tp"], idle=0.1)
    sent = producer.call(Producing.put, 1, 1000)
    for reader in readers:
        reader.call(Reading.let_go, reader.call(Reading.take, sent))
    eventually(lambda: producer.call(Producing.stats).warm == 0, "idle memory goes")
    peers: list[Peer[Any]] = [producer, *readers]
    for peer in peers:
        falls_asleep(peer, 1.0)
    carries(producer, *readers)  # and it wakes up again
    eventually(lambda: producer.call(Producing.stats).warm == 0, "idle memory goes")


# --- those that stand still --------------------------------------------------------------------------------


def test_a_reader_that_stands_still_blocks_neither_put_nor_others(company: Company) -> None:
    """What it owes stays where it is (2); `put` refuses rather than waits."""
    producer, (reader, stopped) = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT)
    stopped.stop()
    sent: list[Sent] = []
    while not isinstance(one := producer.call(Producing.try_put, len(sent), 3 * SEGMENT), Refused):
        sent.append(one)
        reader.call(Reading.let_go, reader.call(Reading.take, one))
    assert one.cause == "full" and len(sent) == CAPACITY // (3 * SEGMENT)
    assert tickets(producer) == len(sent)
    stopped.go_on()
    for each in sent:
        stopped.call(Reading.take, each)
    assert refused(producer, 3 * SEGMENT).cause == "full"
    assert stopped.call(Reading.check) == len(sent)
    stopped.call(Reading.let_go)
    carries(producer, reader, stopped)
    baseline(producer)


def let_go_in_threads(reading: Reading, threads: int) -> Counter[str]:
    """Let all go, several threads at the same time; the points that were come past."""
    reached: list[str] = []
    points.probe = reached.append
    numbers = list(reading.held)
    with ThreadPoolExecutor(threads) as pool:
        for number in range(threads):
            pool.submit(reading.let_go, *numbers[number::threads])
    points.probe = None
    return Counter(reached)


@pytest.mark.parametrize("threads", [1, 4])
def test_no_give_back_is_lost_when_the_socket_is_full(company: Company, threads: int) -> None:
    """(2) The producer stands still, and the reader's socket takes a few hundred messages only."""
    producer, (reader,) = company.open(["tp"])
    many = producer.call(put_many, 1, 1000, 5000)
    reader.call(take_many, many)
    producer.stop()
    reached = reader.call(let_go_in_threads, threads)
    assert reached["give_back.queued"] == 5000
    assert 0 < reached["give_back.sent"] < 2500
    producer.go_on()
    assert baseline(producer).strays == 0
    carries(producer, reader)


def test_a_reader_that_ends_with_its_socket_full_owes_nothing(company: Company) -> None:
    """(4)"""
    producer, (reader, other) = company.open(["tp", "tp"])
    many = producer.call(put_many, 1, 1000, 2000)
    for each in (reader, other):
        each.call(take_many, many)
    producer.stop()
    reader.call(Reading.let_go)
    reader.end()
    producer.go_on()
    other.call(Reading.let_go)
    baseline(producer)


# --- the producer's end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "end", "kill"])
def test_readers_keep_what_they_hold_when_the_producer_ends(company: Company, how: str) -> None:
    """(4) And get what is on its way for as long as they linger; then its memory goes from them."""
    producer = company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT)
    address = company.address(producer)
    (file,) = oracle.lane_files(producer.pid)
    reader, short = company.reader("tp", address), company.reader("tp", address, linger=0.2)
    sent = [producer.call(Producing.put, seed, 100_000) for seed in range(4)]
    for each in (reader, short):
        each.call(Reading.take, sent[0], "view")
        each.call(Reading.take, sent[1], "cow")
    if how == "close":
        producer.call(Producing.close)
        assert refused(producer).cause == "closed"
        assert not [trace for trace in oracle.traces([address], [file]) if trace.pid in (0, producer.pid)]
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
    assert file in oracle.lane_files(short.pid)
    short.call(Reading.let_go)
    eventually(lambda: not oracle.lane_files(short.pid), "the memory goes with the last tensor")


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


@pytest.mark.parametrize("point", ["put.allocated", "grow.populated", "put.reserved", "put.copied"])
def test_a_lane_closed_amid_a_put(company: Company, point: str) -> None:
    """The memory stays until the put is through with it, and nobody rings a bell that is gone."""
    producer, (reader,) = company.open(["tp"])
    answer, written = producer.call(put_amid_close, point)
    assert isinstance(answer, Refused) and answer.cause == "closed"
    assert written == 0
    hears_of_the_end(reader)
    assert not oracle.lane_files(producer.pid)


# --- tickets that are late ---------------------------------------------------------------------------------

_gates: list[Gate] = []  # in a peer


def shut_gate(_: Producing | Reading, point: str, nth: int = 1) -> None:
    _gates.append(Gate(point, nth=nth))


def wait_at_gate(_: Producing | Reading) -> None:
    _gates[-1].wait()


def open_gate(_: Producing | Reading) -> None:
    _gates.pop().open()


def test_a_question_after_a_ticket_that_is_gone_says_nothing_of_the_next_one(company: Company) -> None:
    """(5) A slot is used again at once, and a reader may hear late, and twice, of the ticket that had it."""
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT, idle=0.05, orphan=0.1)
    (file,) = oracle.lane_files(producer.pid)
    reader.call(shut_gate, "revoke.heard", 2)
    reader.stop()
    producer.arm("revoke.announced", 2, "stop")
    first = producer.call(Producing.put, 1, 1000)
    assert producer.last_words() == "revoke.announced"
    producer.wait_stopped()
    producer.go_on()
    reader.go_on()
    reader.call(wait_at_gate)
    assert baseline(producer).orphans == 1
    second = producer.call(Producing.put, 2, 1000)
    assert read(second.ticket).slot == read(first.ticket).slot
    reader.call(Reading.take, second)
    assert oracle.in_page_tables(reader.pid, file) < CAPACITY // 2
    reader.call(open_gate)
    large = producer.call(Producing.put, 3, CAPACITY // 2)  # of its memory the reader hears after all that
    eventually(lambda: oracle.in_page_tables(reader.pid, file) >= CAPACITY // 2, "the reader has caught up")
    for sent in (first, second):
        with pytest.raises(StaleTicket):
            reader.call(Reading.take, sent)
    reader.call(Reading.discard, large)
    assert reader.call(Reading.check) == 1
    reader.call(Reading.let_go)
    assert baseline(producer).strays == 0


# --- forks -------------------------------------------------------------------------------------------------


How = Literal["os.fork", "multiprocessing"]
_children: dict[int, BaseProcess | None] = {}  # in a peer: those that were forked there


def fork(live: Callable[[], object], how: How = "os.fork") -> tuple[int, Any]:
    """Fork a child, which stays until it gets SIGUSR1; its process id, and what `live` returned in it.

    It ends by itself if `live` hangs in there.
    """
    here, there = Pipe()

    def body() -> None:
        signal.alarm(int(DEADLINE / 3))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        there.send(live())
        signal.alarm(int(DEADLINE * 3))
        signal.sigwait({signal.SIGUSR1})

    process: BaseProcess | None = None
    if how == "os.fork":
        pid = os.fork()
        if pid == 0:
            exitcode = 1
            try:
                body()
                exitcode = 0
            finally:
                os._exit(exitcode)  # the frames above are the parent's
    else:
        process = get_context("fork").Process(target=body)
        process.start()
        assert process.pid is not None
        pid = process.pid
    _children[pid] = process
    there.close()
    assert here.poll(DEADLINE), f"the forked child {pid} says nothing"
    return pid, here.recv()


def reap(_: Producing | Reading, pid: int) -> int:
    """Have a child end that was forked here; its exit code."""
    os.kill(pid, signal.SIGUSR1)
    process = _children.pop(pid)
    if process is None:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    process.join(DEADLINE)
    assert process.exitcode is not None
    return process.exitcode


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only as a zombie that nobody waits for."""
    try:
        return "Z" not in oracle.thread_states(pid).values()
    except FileNotFoundError:
        return False


def outcome(attempt: Callable[[], object]) -> str:
    """What comes of something."""
    try:
        return repr(attempt())
    except LaneError as error:
        return f"{type(error).__name__}: {error}"


def fork_a_reader(reading: Reading, address: str, sent: Sent, how: How) -> tuple[int, dict[str, str]]:
    """Have a forked child try all that it must not, and let go what it seems to hold."""

    def live() -> dict[str, str]:
        tried = {
            "take": outcome(lambda: reading.reader.take(sent.ticket)),
            "discard": outcome(lambda: reading.reader.discard(sent.ticket)),
            "join": outcome(lambda: reading.reader.join(address)),
            "lanes": outcome(reading.reader.lanes),
            "check": outcome(reading.check),
            "close": outcome(reading.reader.close),
        }
        reading.held.clear()
        gc.collect()
        return tried

    return fork(live, how)


@pytest.mark.parametrize("how", get_args(How))
def test_a_child_forked_from_a_reader_is_none(company: Company, how: How) -> None:
    """It can do nothing, says nothing, and hides its parent's death from nobody (4)."""
    producer, (reader, other) = company.open(["tp", "tp"])
    address = company.address(producer)
    held, untaken = (producer.call(Producing.put, seed, 10_000) for seed in range(2))
    reader.call(Reading.take, held, "view")
    reader.call(Reading.take, producer.call(Producing.put, 3, 10_000), "cow")
    before = falls_asleep(reader, 0.2)
    pid, tried = reader.call(fork_a_reader, address, untaken, how)
    assert tried.pop("check") == "2"
    assert tried.pop("close") == "None"
    assert tried.pop("lanes") == "()"
    for answer in tried.values():
        assert answer.startswith(f"LaneError: this reader belongs to process {reader.pid}")
    stats = producer.call(Producing.stats)
    assert (stats.tickets, stats.strays, stats.readers) == (3, 0, {"tp": 2})
    assert reader.call(Reading.check) == 2
    assert set(oracle.sleeps(reader.pid)) == set(before)  # no thread has ended

    assert reader.call(reap, pid) == 0
    carries(producer, reader)
    reader.call(Reading.take, untaken)
    assert reader.call(Reading.check) == 3
    pid, tried = reader.call(fork_a_reader, address, untaken, how)
    reader.kill()
    assert is_running(pid)
    eventually(lambda: producer.call(Producing.stats).readers == {"tp": 1}, "the producer hears of the death")
    other.call(Reading.take, held)
    other.call(Reading.let_go)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


def fork_a_producer(producing: Producing, how: How) -> tuple[int, dict[str, str]]:
    """Have a forked child try all that it must not."""

    def live() -> dict[str, str]:
        lane = producing.lane
        return {
            "put": outcome(lambda: lane.put(torch.zeros(3))),
            "stats": outcome(lane.stats),
            "drain": outcome(lane.drain),
            "is_open": outcome(lambda: lane.is_open),
            "wait_open": outcome(lambda: lane.wait_open(0)),
            "close": outcome(lane.close),
        }

    return fork(live, how)


@pytest.mark.parametrize("how", get_args(How))
def test_a_child_forked_from_a_producer_is_none(company: Company, how: How) -> None:
    """It can do nothing, disturbs nothing, and hides its parent's death from nobody (4)."""
    producer, (reader,) = company.open(["tp"])
    (file,) = oracle.lane_files(producer.pid)
    reader.call(Reading.take, producer.call(Producing.put, 1, 10_000))
    pid, tried = producer.call(fork_a_producer, how)
    assert tried.pop("close") == "None"
    for what, answer in tried.items():
        assert answer.startswith("LaneError") and f"belongs to process {producer.pid}" in answer, what
    assert not [trace for trace in oracle.traces([], [file]) if trace.pid == pid]
    carries(producer, reader)
    assert producer.call(reap, pid) == 0
    carries(producer, reader)
    carries(producer, company.reader("tp", company.address(producer)), reader)

    pid, tried = producer.call(fork_a_producer, how)
    producer.kill()
    assert is_running(pid)
    hears_of_the_end(reader)
    assert reader.call(Reading.check) == 1
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


def fork_for_a_lane_of_its_own(producing: Producing) -> tuple[int, list[int]]:
    """Have a forked child be a producer and a reader, both its own."""

    def live() -> list[int]:
        with Lane({"own": 1}, capacity=CAPACITY) as lane, Reader("own") as reader:
            reader.join(lane.address)
            ticket = lane.put(torch.arange(4))
            assert isinstance(ticket, bytes)
            numbers: list[int] = reader.take(ticket).tolist()
            return numbers

    return fork(live)


def test_a_forked_child_can_have_a_lane_of_its_own(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    pid, numbers = producer.call(fork_for_a_lane_of_its_own)
    assert numbers == [0, 1, 2, 3]
    assert producer.call(reap, pid) == 0
    carries(producer, reader)


def fork_amid(producing: Producing, point: str) -> tuple[int, dict[str, str]]:
    """Fork while another thread is at a point of `put`, with whatever it holds there."""
    gate = Gate(point)
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(producing.put, 1, 1000)
        gate.wait()
        result = fork_a_producer(producing, "os.fork")
        gate.open()
        put.result(DEADLINE)
    return result


@pytest.mark.parametrize("point", ["put.allocated", "put.published"])
def test_a_child_forked_while_another_thread_is_in_the_lane_does_not_hang(company: Company, point: str) -> None:
    producer, (reader,) = company.open(["tp"])
    pid, tried = producer.call(fork_amid, point)
    assert [what for what, answer in tried.items() if not answer.startswith("LaneError")] == ["close"]
    assert producer.call(reap, pid) == 0
    carries(producer, reader)


def fork_amid_giving_back(reading: Reading, sent: Sent) -> tuple[int, dict[str, str]]:
    """Fork while another thread is sending what it gives back."""
    gate = Gate("give_back.sent")
    with ThreadPoolExecutor(1) as pool:
        letting_go = pool.submit(reading.let_go, 1)
        gate.wait()
        points.probe = None  # nothing in the child is to wait
        result = fork_a_reader(reading, "mmlane-0-0", sent, "os.fork")
        gate.open()
        letting_go.result(DEADLINE)
    return result


def test_a_child_forked_while_another_thread_gives_back_says_nothing(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    sent = [producer.call(Producing.put, seed, 1000) for seed in range(3)]
    for one in sent[:2]:
        reader.call(Reading.take, one)
    pid, _ = reader.call(fork_amid_giving_back, sent[2])
    stats = producer.call(Producing.stats)
    assert (stats.tickets, stats.strays) == (2, 0)
    assert reader.call(reap, pid) == 0
    reader.call(Reading.take, sent[2])
    reader.call(Reading.let_go)
    baseline(producer)


def fork_amid_joining(reading: Reading, address: str, point: str) -> int:
    """Fork while another thread joins."""
    gate = Gate(point)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(reading.join, address)
        gate.wait()
        pid, _ = fork(lambda: None)
        gate.open()
        joining.result(DEADLINE)
    return pid


@pytest.mark.parametrize(
    "point", ["hello.connected", "hello.sent", "map.received", "map.mapped", "map.acknowledged"]
)
def test_a_child_forked_while_another_thread_joins_hides_no_death(company: Company, point: str) -> None:
    """(4)"""
    producer = company.producer({"tp": 1})
    reader = company.reader("tp")
    pid = reader.call(fork_amid_joining, company.address(producer), point)
    assert producer.call(Producing.wait_open)
    carries(producer, reader)
    reader.kill()
    assert is_running(pid)
    eventually(lambda: producer.call(Producing.stats).readers == {}, "the producer hears of the death")
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


def fork_at_gate(_: Producing) -> int:
    """Fork while another thread is held up at a gate."""
    _gates[-1].wait()
    pid, _nothing = fork(lambda: None)
    _gates.pop().open()
    return pid


@pytest.mark.parametrize("point", ["accept.connected", "accept.welcomed", "accept.joined"])
def test_a_child_forked_while_a_reader_is_let_in_hides_no_death(company: Company, point: str) -> None:
    """(4)"""
    producer = company.producer({"tp": 1})
    reader = company.reader("tp")
    producer.call(shut_gate, point)
    reader.start(Reading.join, company.address(producer))
    pid = producer.call(fork_at_gate)
    reader.answer()
    carries(producer, reader)
    producer.kill()
    assert is_running(pid)
    hears_of_the_end(reader)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


_programs: list[subprocess.Popen[bytes]] = []  # in a peer


def run_a_program(_: Producing | Reading) -> int:
    """Start a program, which gets all descriptors that can be inherited and outlives this process."""
    _programs.append(subprocess.Popen(["sleep", str(DEADLINE * 3)], close_fds=False))
    return _programs[-1].pid


def test_a_program_that_is_started_gets_nothing_of_a_lane(company: Company) -> None:
    """(4)"""
    producer, (reader, other) = company.open(["tp", "tp"])
    programs = [producer.call(run_a_program), reader.call(run_a_program)]
    try:
        assert not [trace for trace in oracle.traces([], company.files) if trace.pid in programs]
        reader.kill()
        eventually(lambda: producer.call(Producing.stats).readers == {"tp": 1}, "the producer hears of the death")
        producer.kill()
        hears_of_the_end(other)
        assert all(map(is_running, programs))
    finally:
        for pid in programs:
            os.kill(pid, signal.SIGKILL)


def fork_after_closing_others(producing: Producing) -> tuple[int, list[int]]:
    """Fork where lanes were closed before, whose descriptors are somebody else's by now."""
    for _ in range(3):
        Lane({"x": 1}, capacity=CAPACITY).close()
    closed = [Lane({"x": 1}, capacity=CAPACITY) for _ in range(3)]
    for lane in closed:
        lane.close()
    others = [fd for _ in range(20) for fd in os.pipe()]

    def live() -> list[int]:
        open_there = oracle.descriptors(os.getpid())
        return [fd for fd in others if fd not in open_there]

    try:
        return fork(live)
    finally:
        for fd in others:
            os.close(fd)


def test_a_fork_after_a_lane_was_closed_closes_nothing_of_others(company: Company) -> None:
    producer, (reader,) = company.open(["tp"])
    pid, missing = producer.call(fork_after_closing_others)
    assert missing == []
    producer.kill()
    hears_of_the_end(reader)
    assert is_running(pid)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not is_running(pid), "the child ends")


# --- the interpreter's end ---------------------------------------------------------------------------------

READER = """
    import os, sys, torch
    from mmlane.lane import Reader

    reader = Reader("tp")
    reader.join(sys.argv[1])
    tickets = sys.stdin.readline().split()
    tensors = [reader.take(bytes.fromhex(ticket), mode) for ticket, mode in zip(tickets, ["view", "cow"] * 2)]
    alias = tensors[0][5:].numpy()
    cycle = [tensors[-1]]
    cycle.append(cycle)
    del cycle
    torch.held_by_a_module = tensors[1][:7]
    assert int(alias[3]) == 1
    if "fork" in sys.argv[2] and os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == (3 if "raise" in sys.argv[2] else 0)
        print("forked", flush=True)
    if "close" in sys.argv[2]:
        reader.close()
    if "raise" in sys.argv[2]:
        sys.exit(3)
"""

PRODUCER = """
    import os, sys, torch
    from mmlane.lane import Lane

    lane = Lane({"tp": 1}, idle=0.05)
    print(lane.address, flush=True)
    assert lane.wait_open(60)
    kept = torch.arange(1000)
    print(lane.put(kept).hex(), flush=True)
    assert sys.stdin.readline().strip() == "taken"
    if "fork" in sys.argv[1] and os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
        assert isinstance(lane.put(kept), bytes)
    if "close" in sys.argv[1]:
        lane.close()
    if "raise" in sys.argv[1]:
        sys.exit(3)
"""

ENDS = ["as it is", "close", "raise", "fork", "fork and close"]


@contextmanager
def script(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Python with this code; it has to be over at the end of the block, without a word on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=die_with_the_parent,
    )
    try:
        yield process
        _, errors = process.communicate(timeout=DEADLINE)
        assert errors == ""
        assert process.returncode == (3 if "raise" in args else 0)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ENDS)
def test_a_reader_ends_with_tensors_held(company: Company, how: str) -> None:
    """Without a word, and what it held is free (4)."""
    producer = company.producer({"tp": 1})
    address = company.address(producer)
    other = company.reader("tp", address)
    assert producer.call(Producing.wait_open)
    with script(READER, address, how) as process:
        assert process.stdin is not None
        eventually(lambda: producer.call(Producing.stats).readers == {"tp": 2}, "the script's reader joins")
        sent = [producer.call(Producing.put, seed, 10_000) for seed in range(4)]
        print(*(one.ticket.hex() for one in sent), file=process.stdin, flush=True)
    for one in sent:
        other.call(Reading.take, one)
    other.call(Reading.let_go)
    baseline(producer)
    carries(producer, other)


@pytest.mark.parametrize("how", ENDS)
def test_a_producer_ends_with_tensors_out(company: Company, how: str) -> None:
    """Without a word, and readers keep what they hold (4)."""
    reader = company.reader("tp")
    with script(PRODUCER, how) as process:
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        reader.call(Reading.join, address)
        company.addresses.add(address)
        company.files |= oracle.lane_files(process.pid)
        sent = Sent(bytes.fromhex(process.stdout.readline()), 0, 8000)
        reader.call(take_numbers, sent)
        print("taken", file=process.stdin, flush=True)
    hears_of_the_end(reader)
    reader.call(Reading.check)
    reader.call(Reading.let_go)


def take_numbers(reading: Reading, sent: Sent) -> None:
    """Take a tensor of numbers, and hold it as the bytes that it is."""
    reading.held[0] = (reading.reader.take(sent.ticket).view(torch.uint8), sent)
