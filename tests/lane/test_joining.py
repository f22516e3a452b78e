"""Readers that join, leave and come back before a lane is open; groups, and lanes beside each other.

All of them are real processes. Who is a member, and until when: test_membership.
"""

from __future__ import annotations

import pytest

from mmlane.lane import LaneError, Mode, UnknownLane
from tests.lane.harness import kernel
from tests.lane.harness.lane_with_readers import SEGMENT
from tests.lane.harness.peers import CAPACITY, Company, Producing, Reading, baseline, carries, refused, tickets
from tests.lane.harness.waiting import eventually

# --- joining and leaving -----------------------------------------------------------------------------------


def test_a_lane_opens_when_all_have_joined(company: Company) -> None:
    """(1)"""
    producer = company.producer({"tp": 2, "vit": 1})
    invitation = company.invitation(producer)
    assert refused(producer).cause == "not_open"
    readers = [company.reader("tp", invitation)]
    missing = "missing: reader 1 of 'tp', reader 0 of 'vit'"
    eventually(lambda: refused(producer).detail.endswith(missing), "the first has joined")
    readers.append(company.reader("vit", invitation))
    eventually(lambda: refused(producer).detail.endswith("missing: reader 1 of 'tp'"), "the second has joined")
    assert not producer.call(Producing.is_open)
    readers.append(company.reader("tp", invitation))
    assert producer.call(Producing.wait_open)
    carries(producer, readers[0], readers[2])
    carries(producer, readers[1])
    stats = baseline(producer)
    assert stats.joined == {"tp": [0, 1], "vit": [0]} and stats.fallbacks.keys() == {"not_open"}


def test_a_reader_leaves_a_lane_that_waits_and_comes_back(company: Company) -> None:
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    leaves = company.reader("tp", invitation)
    eventually(lambda: producer.call(Producing.stats).joined == {"tp": [0]}, "it has joined")
    leaves.call(Reading.close)
    eventually(lambda: producer.call(Producing.stats).joined == {"tp": []}, "it has left")
    stays = company.reader("tp", invitation)
    eventually(lambda: producer.call(Producing.stats).joined == {"tp": [1]}, "another has joined")
    assert refused(producer).cause == "not_open"
    leaves.call(Reading.come_back, invitation)
    assert producer.call(Producing.wait_open)
    carries(producer, stays, leaves)
    baseline(producer)


@pytest.mark.parametrize("mode", ["view", "cow"])
def test_a_reader_that_leaves_an_open_lane_ends_it_and_keeps_what_it_holds(company: Company, mode: Mode) -> None:
    """(2) So do the others, which can also take what is on its way. Nothing is issued any more."""
    producer, (stays, leaves) = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT)
    held = [producer.call(Producing.put, seed, CAPACITY // 4) for seed in range(2)]
    on_its_way = producer.call(Producing.put, 2, CAPACITY // 4)
    for sent in held:
        leaves.call(Reading.take, sent, mode)
        stays.call(Reading.take, sent)
    leaves.call(Reading.close)
    eventually(lambda: not producer.call(Producing.is_open), "the lane ends")
    assert refused(producer).cause == "closed"
    with pytest.raises(LaneError, match="closed"):
        leaves.call(Reading.take, on_its_way)
    stays.call(Reading.take, on_its_way, mode)
    assert (stays.call(Reading.check), leaves.call(Reading.check)) == (3, 2)
    stays.call(Reading.let_go)
    assert refused(producer).cause == "closed"
    assert leaves.call(Reading.check) == 2


def test_joining_and_leaving_repeatedly_leaks_nothing(company: Company) -> None:
    producer = company.producer({"tp": 2})
    invitation = company.invitation(producer)
    leaves = company.reader("tp", invitation)

    def there_is() -> list[int]:
        peers = (producer, leaves)
        return [len(kernel.descriptors(peer.pid)) + len(kernel.thread_states(peer.pid)) for peer in peers]

    def counts_it() -> bool:
        return producer.call(Producing.stats).joined == {"tp": [0]}

    leaves.call(Reading.come_back, invitation)
    eventually(counts_it, "the producer counts it")
    before = there_is()  # maybe with what is about to end
    for _ in range(20):
        leaves.call(Reading.come_back, invitation)

    def as_few_as_before() -> bool:
        return all(now <= then for now, then in zip(there_is(), before, strict=True))

    eventually(as_few_as_before, f"descriptors and threads are {before} again, or fewer")
    assert len([trace for trace in kernel.traces([], company.files) if trace.pid == leaves.pid]) <= 3
    stays = company.reader("tp", invitation)
    assert producer.call(Producing.wait_open)
    carries(producer, leaves, stays)
    assert baseline(producer).joined == {"tp": [0, 1]}


# --- groups and lanes --------------------------------------------------------------------------------------


def test_a_ticket_belongs_to_the_group_that_first_releases_it(company: Company) -> None:
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
    first.call(Reading.discard, sent)  # the reader's thread does it
    other.call(Reading.discard, producer.call(Producing.put, 4, 1000))
    eventually(lambda: tickets(producer) == 1, "the other ticket is released")
    second.call(Reading.discard, sent)
    assert baseline(producer).malformed_messages == 0


def test_one_reader_and_many_lanes(company: Company) -> None:
    """One lane's death is nothing to the others (4)."""
    reader, other = company.reader("tp"), company.reader("tp")
    producers = [company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT) for _ in range(4)]
    invitations = [company.invitation(producer) for producer in producers]
    names = tuple(invitation.name for invitation in invitations)
    foreign, _ = company.open(["tp"])
    for invitation in invitations:
        reader.call(Reading.join, invitation)
        other.call(Reading.join, invitation)
    assert reader.call(Reading.lanes) == names
    for producer in producers:
        assert producer.call(Producing.wait_open)
    for seed, producer in enumerate(producers * 3):
        sent = producer.call(Producing.put, seed, 100_000)
        reader.call(Reading.take, sent)
        other.call(Reading.take, sent)
    with pytest.raises(UnknownLane, match="is not joined"):
        reader.call(Reading.take, foreign.call(Producing.put, 1, 1))

    producers[0].kill()
    producers[1].call(Producing.close)
    eventually(lambda: reader.call(Reading.lanes) == names[2:], "the reader hears of the ends")
    for producer in producers[2:]:
        carries(producer, reader, other)
    for each in (reader, other):
        assert each.call(Reading.check) == 12
        each.call(Reading.let_go)
    for producer in producers[2:]:
        baseline(producer)
