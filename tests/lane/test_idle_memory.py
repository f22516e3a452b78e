"""Memory that is committed ahead of need and goes when it is idle; a lane that sleeps when there is no work."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lane.harness import kernel
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
    refused,
)
from tests.lane.harness.together import SEGMENT
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
    """And readers have it in their page tables before they look at it."""
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT)
    (file,) = kernel.lane_files(producer.pid)
    sent = producer.call(Producing.put, 1, 2 * SEGMENT)
    eventually(lambda: producer.call(Producing.stats).warm == 4 * SEGMENT, "memory for another one")
    eventually(lambda: kernel.in_page_tables(reader.pid, file) >= 4 * SEGMENT, "the reader's page tables fill")
    assert kernel.committed(producer.pid, file) == DIRECTORY + 4 * SEGMENT
    reader.call(Reading.take, sent)


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

    late = company.reader("tp", company.invitation(producer))  # to one that joins now, all of it is announced
    eventually(lambda: kernel.in_page_tables(late.pid, file) >= CAPACITY, "the late reader's page tables fill")
    reader.call(Reading.let_go)
    whole = producer.call(Producing.put, 99, CAPACITY)
    for each in (reader, late):
        each.call(Reading.take, whole)
        each.call(Reading.let_go)
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
        assert baseline(producer).warm == 0


def test_a_reader_that_stands_still_keeps_memory_but_holds_up_nothing(company: Company) -> None:
    producer, (stopped, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = kernel.lane_files(producer.pid)
    stopped.stop()
    carries(producer, reader)  # the tickets are not the stopped one's, and its socket takes what is said to it
    baseline(producer)
    warm = kernel.committed(producer.pid, file)
    assert warm > DIRECTORY
    looks(producer, 4)
    assert kernel.committed(producer.pid, file) == warm
    carries(producer, reader)
    looks(producer, 4)
    assert kernel.committed(producer.pid, file) >= warm
    stopped.go_on()
    eventually(lambda: kernel.committed(producer.pid, file) == DIRECTORY, "idle memory goes, now that all agree")
    carries(producer, stopped)


def test_a_reader_that_dies_standing_still_keeps_no_memory(company: Company) -> None:
    """(4)"""
    producer, (stopped, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = kernel.lane_files(producer.pid)
    stopped.stop()
    carries(producer, reader)
    looks(producer, 4)
    assert kernel.committed(producer.pid, file) > DIRECTORY
    stopped.kill()
    eventually(lambda: kernel.committed(producer.pid, file) == DIRECTORY, "idle memory goes")


def test_a_reader_that_joins_while_memory_goes_does_not_bring_it_back(company: Company) -> None:
    """To touch a page that has gone is to commit it, behind the producer's back."""
    producer, (stopped, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    address = company.invitation(producer)
    (file,) = kernel.lane_files(producer.pid)
    large = producer.call(Producing.put, 1, CAPACITY // 2)
    reader.call(Reading.let_go, reader.call(Reading.take, large))
    stopped.stop()
    baseline(producer)
    looks(producer, 4)  # the reader has agreed, the stopped one has been asked
    late = company.reader("vit")
    late.arm("join.acknowledged", action="stop")
    late.start(Reading.join, address)
    assert late.last_words() == "join.acknowledged"
    late.wait_stopped()
    eventually(lambda: producer.call(Producing.stats).readers == {"tp": 1, "vit": 2}, "the late one is in")
    stopped.go_on()
    eventually(lambda: kernel.committed(producer.pid, file) == DIRECTORY, "idle memory goes")
    late.go_on()
    late.answer()
    carries(producer, late, reader)
    # The last of this memory goes when the late one has agreed, and so has heeded all that it was told before.
    eventually(lambda: producer.call(Producing.stats).warm == 0, "idle memory goes again")
    assert kernel.committed(producer.pid, file) == DIRECTORY


def test_an_agreement_to_an_earlier_question_is_none_to_the_last(company: Company) -> None:
    """Memory that was to go, was used, and is to go again, waits until a slow reader has caught up with that."""
    count = CAPACITY // SEGMENT
    producer, (slow, reader) = company.open(["tp", "vit"], capacity=CAPACITY, segment=SEGMENT, idle=0.1)
    (file,) = kernel.lane_files(producer.pid)

    def use_all_memory() -> None:
        sent = producer.call(Producing.put, 1, CAPACITY)
        reader.call(Reading.let_go, reader.call(Reading.take, sent))
        baseline(producer)

    use_all_memory()
    slow.arm("hand_back.heard", action="stop")
    slow.arm("release.sent", count, action="stop")
    assert slow.last_words() == "hand_back.heard"
    slow.wait_stopped()
    use_all_memory()
    looks(producer, 5)  # it is told that the memory is in use, and asked again
    slow.go_on()
    assert slow.last_words() == "release.sent"  # the answers to the first question
    slow.wait_stopped()
    looks(producer, 2)
    assert kernel.committed(producer.pid, file) == DIRECTORY + CAPACITY
    slow.go_on()
    eventually(lambda: producer.call(Producing.stats).warm == 0, "idle memory goes")
    assert kernel.committed(producer.pid, file) == DIRECTORY
    carries(producer, slow)


# --- sleep --------------------------------------------------------------------------------------------------


def test_give_backs_do_not_wake_the_producer(company: Company) -> None:
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
