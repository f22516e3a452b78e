"""SIGKILL at every named point of the protocol: survivors go on, and nothing of the killed process is left (4)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import Any

import pytest

from mmlane.lane import Invitation, JoinRefused, Mode, failpoints
from tests.lane.harness import kernel
from tests.lane.harness.breakpoints import Where
from tests.lane.harness.child import Died
from tests.lane.harness.lane_with_readers import SEGMENT
from tests.lane.harness.payloads import MODES, Sent
from tests.lane.harness.peers import (
    CAPACITY,
    FOREVER,
    SIZES,
    Company,
    Peer,
    Producing,
    Reading,
    baseline,
    carries,
    hears_of_the_end,
    refused,
)
from tests.lane.harness.waiting import eventually

TIMES = (1, 3)  # a first time and one amid everything
JOINS = 3  # how often the second reader joins before the lane opens: so a join has a third time, too

Case = tuple[str, int, Where]
# Points that the main thread comes past first, and another one too.
BESIDE = tuple(
    name
    for name in (*failpoints.PRODUCER, *failpoints.READER)
    if name.startswith(("commit.", "drain.", "release."))
)


def cases(names: tuple[str, ...]) -> list[Case]:
    found: list[Case] = [(name, nth, "anywhere") for name in names for nth in TIMES]
    return found + [(name, 1, "beside") for name in names if name in BESIDE]


def case_id(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Traffic:
    """A producer and its readers, which do everything that they can do, again and again, until one of them dies.

    lossy: no ticket gets to a reader. The second reader joins, leaves and joins again before the others join.
    """

    def __init__(
        self,
        producer: Peer[Producing],
        invitation: Invitation,
        readers: list[tuple[str, Peer[Reading]]],
        *,
        lossy: bool,
    ) -> None:
        self.producer, self.invitation, self.readers = producer, invitation, readers
        self.lossy = lossy
        self.on_its_way: dict[Peer[Reading], list[Sent]] = {reader: [] for _, reader in readers}
        self.held: dict[Peer[Reading], int] = dict.fromkeys(self.on_its_way, 0)
        self.joined: set[Peer[Reading]] = set()
        self.seeds = count(1)

    @property
    def victim(self) -> Peer[Reading]:
        """The reader that is to die, if one is."""
        return self.readers[1][1]

    def run(self) -> None:
        """Raises Died."""
        self._joining(self.victim, Reading.join)
        for _ in range(1, JOINS):
            self.victim.call(Reading.leave)
            eventually(self._no_reader_has_joined, "the number is free again")
            self._joining(self.victim, Reading.join)
        for _, reader in self.readers:
            self._joining(reader, Reading.join)
        for number in range(100):
            self._wait_until_it_is_open()
            self._put_and_take(number)
            self._wait_for_the_memory_to_go()
        raise AssertionError("no process has died in a hundred rounds: no round reaches this point")

    def _no_reader_has_joined(self) -> bool:
        return not any(self.producer.call(Producing.stats).joined.values())

    def _joining(self, reader: Peer[Reading], join: Callable[[Reading, Invitation], None]) -> None:
        try:
            reader.call(join, self.invitation)
        except JoinRefused as error:
            raise Died(self.producer.exitcode()) from error
        self.joined.add(reader)

    def _wait_until_it_is_open(self) -> None:
        """Raises Died where it never will be: a reader's thread may have reached the point at which it dies."""

        def is_open() -> bool:
            for reader in self.held:
                if not reader.is_alive():
                    raise Died(reader.exitcode())
            return self.producer.call(Producing.is_open)

        eventually(is_open, "the lane opens")

    def _put_and_take(self, number: int) -> None:
        groups = sorted({group for group, _ in self.readers})
        for at, nbytes in enumerate(SIZES * len(groups)):
            seed = next(self.seeds)
            sent = self.producer.call(Producing.put, seed, nbytes, uses=4)
            again = self.producer.call(Producing.put, seed, nbytes)
            discarded = self.producer.call(Producing.put, seed, nbytes)
            self.producer.call(Producing.forget, seed)
            if self.lossy:
                continue
            to = [reader for group, reader in self.readers if group == groups[at % len(groups)]]
            for reader in to:
                reader.call(Reading.discard, discarded)  # its thread does that
                self.on_its_way[reader] += (sent, again)
            for reader in to:
                self.take(reader, MODES[(number + at) % 3])
        if not self.lossy:
            for reader in self.held:  # whatever came last stays on its way to one, while another has let it go
                while self.on_its_way[reader]:
                    self.take(reader, "view")
                assert reader.call(Reading.check) == self.held[reader]
                self.let_go(reader)

    def take(self, reader: Peer[Reading], mode: Mode) -> None:
        """Take the next ticket that is on its way to a reader."""
        reader.call(Reading.take, self.on_its_way[reader][0], mode)
        del self.on_its_way[reader][0]
        self.held[reader] += 1

    def let_go(self, reader: Peer[Reading]) -> None:
        """Let all go that a reader holds."""
        reader.call(Reading.let_go)
        self.held[reader] = 0

    def _wait_for_the_memory_to_go(self) -> None:
        """Raises Died where it never will: a closed lane handles no releases."""

        def has_gone() -> bool:
            for reader in self.held:
                if not reader.is_alive():
                    raise Died(reader.exitcode())
            stats = self.producer.call(Producing.stats)
            return (stats.used_bytes, stats.tickets, stats.extents, stats.committed_bytes) == (0, 0, 0, 0)

        eventually(has_gone, "all comes back, and idle memory goes")

    # --- afterwards ----------------------------------------------------------------------------------------

    def victim_is_gone(self) -> bool:
        """Whether the producer has heard of the victim's death."""
        stats = self.producer.call(Producing.stats)
        return stats.state == "closed" or len(stats.joined["tp"]) == 0

    def all_arrives(self, reader: Peer[Reading]) -> None:
        """What a reader holds is right, and so is what was on its way to it."""
        assert reader.call(Reading.check) == self.held[reader]
        for mode in MODES * len(self.on_its_way[reader]):
            if self.on_its_way[reader]:
                self.take(reader, mode)
        assert reader.call(Reading.check) == self.held[reader]


def one_that_dies(company: Company, traffic: Traffic, victim: Peer[Any], point: str | None = None) -> None:
    """Go on until the victim has died at its point; all other processes are alive."""
    with pytest.raises((Died, AssertionError)) as end:
        traffic.run()
    # A reader's own thread may have reached the point; then a put may be the first call to fail.
    assert isinstance(end.value, Died) or "cause='closed'" in str(end.value)
    assert victim.exitcode() == -signal.SIGKILL
    assert point is None or victim.last_words() == point
    assert all(peer.is_alive() for peer in company.peers if peer is not victim)


def start(company: Company, groups: tuple[str, ...] = ("tp", "tp"), *, lossy: bool = False) -> Traffic:
    """A lane with these readers, which are yet to join."""
    producer = company.producer(
        {group: groups.count(group) for group in groups},
        capacity=CAPACITY,
        segment=SEGMENT,
        idle=0.1,
        orphan=0.2 if lossy else FOREVER,
    )
    readers = [(group, company.reader(group)) for group in groups]
    return Traffic(producer, company.invitation(producer), readers, lossy=lossy)


def after_a_producers_death(company: Company, traffic: Traffic) -> None:
    """Readers keep what they hold, get what is on its way, and can join another lane (4)."""
    readers = [reader for _, reader in traffic.readers]
    for reader in readers:
        traffic.all_arrives(reader)
    for reader in readers:
        hears_of_the_end(reader)
    kinds = {trace.kind for trace in kernel.traces([traffic.invitation.name], company.files)}
    assert not kinds & {"socket", "file"}

    other = company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT)
    for reader in readers:
        reader.call(Reading.join, company.invitation(other))
    assert other.call(Producing.wait_open)
    carries(other, *readers)
    for reader in readers:
        traffic.all_arrives(reader)
        traffic.let_go(reader)
    baseline(other)


@pytest.mark.parametrize("case", cases(failpoints.PRODUCER), ids=case_id)
def test_a_producer_killed_at(company: Company, case: Case) -> None:
    traffic = start(company, lossy=case[0].startswith("recall."))
    traffic.producer.arm(case[0], case[1], where=case[2])
    one_that_dies(company, traffic, traffic.producer, case[0])
    after_a_producers_death(company, traffic)


def after_a_readers_death(company: Company, traffic: Traffic) -> None:
    """Before the lane opens, another takes its place; later the lane ends, and the others lose nothing (4)."""
    producer = traffic.producer
    survivors = [reader for _, reader in traffic.readers if reader.is_alive()]
    eventually(traffic.victim_is_gone, "the producer hears of the death")
    if producer.call(Producing.stats).state == "closed":
        why = refused(producer)
        assert why.cause == "closed" and "has ended" in why.detail
        for reader in survivors:
            hears_of_the_end(reader)
        eventually(lambda: not kernel.lane_files(producer.pid), "the producer lets go of the memory")
    else:
        group = traffic.readers[1][0]
        why = refused(producer)
        assert why.cause == "not_open" and f"reader 1 of '{group}'" in why.detail
        replacement = company.reader(group, traffic.invitation, number=1)
        for reader in survivors:
            reader.call(Reading.join, traffic.invitation)
        assert producer.call(Producing.wait_open)
        carries(producer, survivors[0], replacement)
        assert baseline(producer).malformed_messages == 0
    for reader in survivors:
        traffic.all_arrives(reader)
        traffic.let_go(reader)

    other = company.producer({"tp": 2}, capacity=CAPACITY, segment=SEGMENT)
    another = company.reader("tp", company.invitation(other), number=1)
    survivors[0].call(Reading.join, company.invitation(other))
    assert other.call(Producing.wait_open)
    carries(other, another, survivors[0])
    baseline(other)


@pytest.mark.parametrize(
    ("case", "groups"),
    [(case, ("tp", "tp")) for case in cases(failpoints.READER)]
    + [
        (case, groups)
        for groups in (("tp", "tp", "vit"), ("tp", "vit"))  # in the latter it is the only one of its group
        for case in cases(failpoints.READER)
        if case[0].startswith(("take.", "release.", "recall."))
    ],
    ids=case_id,
)
def test_a_reader_killed_at(company: Company, case: Case, groups: tuple[str, ...]) -> None:
    traffic = start(company, groups, lossy=case[0].startswith("recall."))
    traffic.victim.arm(case[0], case[1], where=case[2])
    one_that_dies(company, traffic, traffic.victim, case[0])
    after_a_readers_death(company, traffic)


@contextmanager
def killed_after(victim: Peer[Any], seconds: float) -> Iterator[None]:
    """Somewhere in the block, the victim dies."""
    timer = threading.Timer(seconds, os.kill, (victim.pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("seed", range(8))
def test_a_producer_killed_anywhere(company: Company, seed: int) -> None:
    """Between the points, too."""
    traffic = start(company)
    with killed_after(traffic.producer, Random(seed).uniform(0.0, 0.8)):
        one_that_dies(company, traffic, traffic.producer)
    after_a_producers_death(company, traffic)


@pytest.mark.parametrize("seed", range(8))
def test_a_reader_killed_anywhere(company: Company, seed: int) -> None:
    """Between the points, too."""
    traffic = start(company, ("tp", "tp", "vit"))
    with killed_after(traffic.victim, Random(seed).uniform(0.0, 0.8)):
        one_that_dies(company, traffic, traffic.victim)
    after_a_readers_death(company, traffic)


@pytest.mark.parametrize("point", failpoints.READER[: failpoints.READER.index("take.claimed")])
def test_a_reader_whose_producer_is_killed_while_it_joins_keeps_nothing(company: Company, point: str) -> None:
    producer = company.producer({"tp": 1})
    invitation = company.invitation(producer)
    reader = company.reader("tp", linger=0.1)
    reader.arm(point, action="stop")
    reader.start(Reading.join, invitation)
    assert reader.last_words() == point
    reader.wait_stopped()
    producer.kill()
    reader.go_on()
    try:
        reader.answer()
    except JoinRefused as error:
        assert invitation.name in str(error)
    else:
        assert point == "join.acknowledged"  # it was in, and learns of the death as any reader does
    hears_of_the_end(reader)
    eventually(lambda: not kernel.lane_files(reader.pid), "its memory goes")

    other = company.producer({"tp": 1})
    reader.call(Reading.join, company.invitation(other))
    assert other.call(Producing.wait_open)
    carries(other, reader)
    baseline(other)


@pytest.mark.parametrize("point", ["accept.connected", "accept.proven", "accept.welcomed"])
def test_a_producer_whose_reader_is_killed_while_it_joins_keeps_nothing(company: Company, point: str) -> None:
    producer = company.producer({"tp": 1})
    invitation = company.invitation(producer)
    reader = company.reader("tp")
    before = len(list(kernel.descriptors(producer.pid)))
    producer.arm(point, action="stop")
    reader.arm("join.mapped", action="stop")
    reader.start(Reading.join, invitation)
    assert producer.last_words() == point
    producer.wait_stopped()
    reader.kill()
    producer.go_on()
    eventually(lambda: len(list(kernel.descriptors(producer.pid))) == before, "what was for the reader is closed")
    stats = producer.call(Producing.stats)
    assert stats.state == "waiting" and stats.joined == {"tp": []}

    replacement = company.reader("tp", invitation, number=0)
    assert producer.call(Producing.wait_open)
    carries(producer, replacement)
    baseline(producer)


def test_all_killed_at_once_leave_nothing(company: Company) -> None:
    """With tensors held, tickets on their way, a reader in mid-join and memory being committed (4)."""
    producer, readers = company.open(["tp", "tp"], capacity=CAPACITY, segment=SEGMENT)
    waiting = company.producer({"tp": 1})
    joining = company.reader("tp", number=0)
    joining.arm("join.mapped", action="stop")
    joining.start(Reading.join, company.invitation(waiting))
    joining.wait_stopped()
    for seed in range(3):
        sent = producer.call(Producing.put, seed, 70_000)
        readers[0].call(Reading.take, sent, "cow")
    assert kernel.traces(company.names, company.files)
    for peer in company.peers:
        peer.kill()
    company.nothing_is_left()
