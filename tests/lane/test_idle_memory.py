"""Memory that is committed ahead of need and goes when it is idle; a lane that sleeps when there is no work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlane.lane import Lane, Reader, Refused
from tests.lane.harness import kernel
from tests.lane.harness.lane_with_readers import SEGMENT
from tests.lane.harness.payloads import MODES
from tests.lane.harness.peers import (
    CAPACITY,
    DIRECTORY,
    Company,
    Peer,
    Producing,
    Reading,
    baseline,
    carries,
    falls_asleep,
    open_gate,
    refused,
    shut_gate,
    wait_at_gate,
)
from tests.lane.harness.waiting import eventually


def looks(producer: Peer[Producing], count: int) -> None:
    """Wait until the control thread has looked after memory this many times more."""
    producer.arm("decommit.chosen", count, "stop")
    assert producer.last_words() == "decommit.chosen"
    producer.wait_stopped()
    producer.go_on()
    producer.disarm()


# --- memory ------------------------------------------------------------------------------------------------


def test_memory_is_committed_ahead_of_need(company: Company) -> None:
    """And readers have no page in their page tables that they have not read: nothing has to be unmapped there."""
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT)
    (file,) = kernel.lane_files(producer.pid)
    sent = producer.call(Producing.put, 1, 2 * SEGMENT)
    eventually(lambda: producer.call(Producing.stats).committed_bytes == 4 * SEGMENT, "memory for another one")
    assert kernel.committed(producer.pid, file) == DIRECTORY + 4 * SEGMENT
    before = kernel.in_page_tables(reader.pid, file)
    reader.call(Reading.take, sent)
    assert before < 2 * SEGMENT <= kernel.in_page_tables(reader.pid, file)


def test_memory_is_committed_for_a_put_that_came_before_the_lane_was_open() -> None:
    """So that the first message, which may be a large one, finds memory. As soon as it is open, and not before."""
    with Lane({"tp": 1}, capacity=CAPACITY, segment=SEGMENT) as lane, Reader("tp") as reader:
        early = lane.put(torch.zeros(5 * SEGMENT - 1, dtype=torch.uint8))
        assert isinstance(early, Refused) and early.cause == "not_open"
        assert lane.stats().committed_bytes == 0
        reader.join(lane.invitation)
        eventually(lambda: lane.stats().committed_bytes == 5 * SEGMENT, "memory for what was refused")
        ticket = lane.put(torch.zeros(5 * SEGMENT, dtype=torch.uint8))
        assert isinstance(ticket, bytes)
        reader.discard(ticket)
        assert lane._committer.early == 0  # for the first one only


def test_memory_is_committed_up_to_the_capacity_and_no_further(company: Company) -> None:
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT)
    (file,) = kernel.lane_files(producer.pid)
    for seed in range(32):
        reader.call(Reading.take, producer.call(Producing.put, seed, SEGMENT - seed), "view")
    stats = producer.call(Producing.stats)
    assert (stats.committed_bytes, stats.used_bytes, stats.capacity_bytes) == (CAPACITY, CAPACITY, CAPACITY)
    assert kernel.committed(producer.pid, file) == DIRECTORY + CAPACITY
    assert refused(producer).cause == "full"
    assert refused(producer, CAPACITY + 1).cause == "oversize"
    assert reader.call(Reading.check) == 32

    reader.call(Reading.let_go)
    reader.call(Reading.take, producer.call(Producing.put, 99, CAPACITY))
    reader.call(Reading.let_go)
    baseline(producer)


def test_idle_memory_goes_and_comes_again(company: Company) -> None:
    producer, readers = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = kernel.lane_files(producer.pid)
    for _ in range(3):
        large = producer.call(Producing.put, 1, 500_000)
        small = producer.call(Producing.put, 2, 100)
        numbers = [reader.call(Reading.take, large) for reader in readers]
        for reader in readers:
            reader.call(Reading.take, small)
        assert kernel.committed(producer.pid, file) >= DIRECTORY + 500_000
        for reader, number in zip(readers, numbers, strict=True):
            reader.call(Reading.let_go, number)
        # Where something lies, memory stays.
        eventually(
            lambda: kernel.committed(producer.pid, file) == DIRECTORY + SEGMENT, "the large one's memory goes"
        )
        assert readers[0].call(Reading.check) == readers[1].call(Reading.check) == 1
        for reader in readers:
            reader.call(Reading.let_go)
        eventually(lambda: kernel.committed(producer.pid, file) == DIRECTORY, "all memory goes")
        assert baseline(producer).committed_bytes == 0


def test_a_reader_that_stands_still_keeps_no_memory_and_holds_up_nothing(company: Company) -> None:
    """Also memory that it has read: the producer takes it back without asking a reader."""
    producer, (stopped, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = kernel.lane_files(producer.pid)
    carries(producer, stopped)
    stopped.stop()
    for _ in range(3):
        carries(producer, reader)
        baseline(producer)
        eventually(lambda: kernel.committed(producer.pid, file) == DIRECTORY, "idle memory goes")
    stopped.go_on()
    carries(producer, stopped)
    baseline(producer)


def test_no_reader_brings_back_memory_that_has_gone(company: Company) -> None:
    """To touch a page that has gone is to commit it, behind the producer's back."""
    producer, readers = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = kernel.lane_files(producer.pid)
    for mode in MODES:
        large = producer.call(Producing.put, 1, CAPACITY)
        for reader in readers:
            reader.call(Reading.let_go, reader.call(Reading.take, large, mode))
        baseline(producer)
        eventually(lambda: producer.call(Producing.stats).committed_bytes == 0, "idle memory goes")
        assert kernel.committed(producer.pid, file) == DIRECTORY
        carries(producer, *readers)
        for reader in readers:
            reader.call(Reading.check)
    eventually(lambda: producer.call(Producing.stats).committed_bytes == 0, "idle memory goes")
    assert kernel.committed(producer.pid, file) == DIRECTORY
    assert all(kernel.in_page_tables(reader.pid, file) <= DIRECTORY for reader in readers)


def test_memory_that_was_used_again_stays(company: Company) -> None:
    """Between the look that chose it and its end, a put may take it: it is looked at again then."""
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = kernel.lane_files(producer.pid)
    reader.call(Reading.let_go, reader.call(Reading.take, producer.call(Producing.put, 1, CAPACITY)))
    baseline(producer)
    producer.call(shut_gate, "decommit.chosen", 2)  # at the second look, all of it is idle
    producer.call(wait_at_gate)
    sent = producer.call(Producing.put, 2, CAPACITY)
    producer.call(open_gate)
    reader.call(Reading.take, sent)
    looks(producer, 2)
    assert reader.call(Reading.check) == 1
    assert kernel.committed(producer.pid, file) == DIRECTORY + CAPACITY
    reader.call(Reading.let_go)
    baseline(producer)


# --- sleep --------------------------------------------------------------------------------------------------


def test_releases_do_not_wake_the_producer(company: Company) -> None:
    producer, readers = company.open(["tp", "tp"], idle=600.0)
    many = producer.call(Producing.put_many, 1, 1000, 1000)
    for reader in readers:
        reader.call(Reading.take_many, many)
    before = falls_asleep(producer, 0.3)
    for reader in readers:
        reader.call(Reading.let_go)
    assert kernel.sleeps(producer.pid) == before
    baseline(producer)


@pytest.mark.long
def test_an_idle_lane_wakes_no_process(company: Company) -> None:
    """While memory is committed, the producer looks after it; then it does not look any more."""
    producer, readers = company.open(["tp", "tp"], idle=0.1)
    sent = producer.call(Producing.put, 1, 1000)
    for reader in readers:
        reader.call(Reading.let_go, reader.call(Reading.take, sent))
    eventually(lambda: producer.call(Producing.stats).committed_bytes == 0, "idle memory goes")
    peers: list[Peer[Any]] = [producer, *readers]
    for peer in peers:
        falls_asleep(peer, 1.0)
    carries(producer, *readers)  # and it wakes up again
    eventually(lambda: producer.call(Producing.stats).committed_bytes == 0, "idle memory goes")
