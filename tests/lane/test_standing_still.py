"""Readers that stand still, or handle messages late: no other process waits for them, and no ticket is lost."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmlane.lane import Refused, StaleTicket, failpoints
from mmlane.lane.ticket import read
from tests.lane.harness.lane_with_readers import SEGMENT
from tests.lane.harness.payloads import Sent
from tests.lane.harness.peers import (
    CAPACITY,
    Company,
    Producing,
    Reading,
    baseline,
    carries,
    hears_of_the_end,
    open_gate,
    refused,
    shut_gate,
    tickets,
    wait_at_gate,
)
from tests.lane.harness.waiting import eventually

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
    failpoints.probe = reached.append
    numbers = list(reading.held)
    with ThreadPoolExecutor(threads) as pool:
        for number in range(threads):
            pool.submit(reading.let_go, *numbers[number::threads])
    failpoints.probe = None
    return Counter(reached)


@pytest.mark.parametrize("threads", [1, 4])
def test_no_release_is_lost_when_the_socket_is_full(company: Company, threads: int) -> None:
    """(2) The producer stands still, and the reader's socket takes a few hundred messages only."""
    producer, (reader,) = company.open(["tp"])
    many = producer.call(Producing.put_many, 1, 1000, 5000)
    reader.call(Reading.take_many, many)
    producer.stop()
    reached = reader.call(let_go_in_threads, threads)
    assert reached["release.queued"] == 5000
    assert 0 < reached["release.sent"] < 2500
    producer.go_on()
    assert baseline(producer).malformed_messages == 0
    carries(producer, reader)


def test_a_reader_that_ends_with_its_socket_full_ends_the_lane_like_any(company: Company) -> None:
    """(4) The other keeps what it holds, and what the first has released is not used again."""
    producer, (reader, other) = company.open(["tp", "tp"])
    many = producer.call(Producing.put_many, 1, 1000, 2000)
    for each in (reader, other):
        each.call(Reading.take_many, many)
    producer.stop()
    reader.call(Reading.let_go)
    reader.end()
    producer.go_on()
    eventually(lambda: producer.call(Producing.stats).state == "closed", "the lane is closed")
    assert refused(producer).cause == "closed"
    hears_of_the_end(other)
    assert other.call(Reading.check) == 2000


# --- tickets that are late ---------------------------------------------------------------------------------


def test_a_question_after_a_ticket_that_is_gone_says_nothing_of_the_next_one(company: Company) -> None:
    """(5) A slot is used again at once, and a reader may hear late, and twice, of the ticket that had it."""
    producer, (reader,) = company.open(["tp"], capacity=CAPACITY, segment=SEGMENT, idle=0.05, orphan=0.1)
    reader.call(shut_gate, "recall.heard", 2)
    reader.stop()
    producer.arm("recall.sent", 2, "stop")
    first = producer.call(Producing.put, 1, 1000)
    assert producer.last_words() == "recall.sent"
    producer.wait_stopped()
    producer.go_on()
    reader.go_on()
    reader.call(wait_at_gate)
    assert baseline(producer).lost_tickets == 1
    second = producer.call(Producing.put, 2, 1000)
    assert read(second.ticket).slot == read(first.ticket).slot
    reader.call(Reading.take, second)
    last = producer.call(Producing.put, 3, 1000)
    reader.call(Reading.discard, last)  # which the reader's thread does after all that it has heard
    reader.call(open_gate)
    eventually(lambda: tickets(producer) == 1, "the reader has caught up")
    for sent in (first, second):
        with pytest.raises(StaleTicket):
            reader.call(Reading.take, sent)
    assert reader.call(Reading.check) == 1
    reader.call(Reading.let_go)
    assert baseline(producer).malformed_messages == 0
