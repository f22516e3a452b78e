"""Readers that join late, leave and come back; groups, and lanes beside each other. Real processes all of them."""

from __future__ import annotations

import pytest

from mmlane.lane import JoinRefused, LaneError, Mode, StaleTicket, UnknownLane
from tests.lane.harness import kernel
from tests.lane.harness.peers import CAPACITY, Company, Producing, Reading, baseline, carries, refused, tickets
from tests.lane.harness.together import SEGMENT
from tests.lane.harness.waiting import eventually

# --- joining and leaving -----------------------------------------------------------------------------------


def test_a_lane_opens_when_all_have_joined(company: Company) -> None:
    """(1)"""
    producer = company.producer({"tp": 2, "vit": 1})
    address = company.invitation(producer)
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
    late = company.reader("tp", company.invitation(producer))
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
    address = company.invitation(producer)
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
    address = company.invitation(producer)
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
    address = company.invitation(producer)

    def there_is() -> list[int]:
        peers = (producer, stays, leaves)
        return [len(kernel.descriptors(peer.pid)) + len(kernel.thread_states(peer.pid)) for peer in peers]

    leaves.call(Reading.come_back, address)
    eventually(lambda: producer.call(Producing.stats).readers == {"tp": 2}, "the former reader is gone")
    before = there_is()
    for _ in range(20):
        leaves.call(Reading.come_back, address)
        assert producer.call(Producing.wait_open)
        carries(producer, stays, leaves)
    eventually(lambda: there_is() == before, f"descriptors and threads are {before} again")
    assert len([trace for trace in kernel.traces([], company.files) if trace.pid == leaves.pid]) <= 3
    assert baseline(producer).readers == {"tp": 2}


def join_for(reading: Reading, address: str, seconds: float) -> None:
    reading.reader.join(address, timeout=seconds)


def test_joining_a_producer_that_stands_still_ends(company: Company) -> None:
    producer = company.producer({"tp": 1})
    address = company.invitation(producer)
    reader = company.reader("tp")
    before = len(kernel.descriptors(reader.pid))
    producer.stop()
    with pytest.raises(JoinRefused, match=r"no answer within 0\.2 s"):
        reader.call(join_for, address, 0.2)
    assert not kernel.lane_files(reader.pid) and len(kernel.descriptors(reader.pid)) == before
    producer.go_on()
    eventually(lambda: producer.call(Producing.stats).rejected_peers == 1, "the producer sees that it has gone")
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
    assert baseline(producer).malformed_messages == 0


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
    addresses = [company.invitation(producer) for producer in producers]
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
